"""Times frozen encoders, batch norm folded, as the feature cache runs them: `python -m benchmarks.encode`."""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from benchmarks import timing
from benchmarks.timing import short
from jaxcap import encoders
from jaxcap.encoders import EncoderSpec
from jaxcap.errors import UserError, run_command


def ours(spec: EncoderSpec, image_BHWC: np.ndarray) -> Callable[[], jax.Array]:
    """A compiled call that turns uint8 photos on the device into pooled features, with random weights."""
    variables = jax.jit(functools.partial(encoders.init, spec.module(), size=image_BHWC.shape[1]))(jax.random.key(0))
    fold = functools.partial(encoders.fold, spec, few=jax.default_backend() == "cpu")
    look, image_BHWC = jax.jit(fold)(variables), jax.device_put(image_BHWC)

    @jax.jit
    def encode(look, image_BHWC):
        return look(spec.preprocess(image_BHWC / 255)).mean((1, 2))

    return lambda: encode(look, image_BHWC).block_until_ready()


PEER = ("eager", "channels_last", "channels_last+folded", "channels_last+folded+compile")


def peer(spec: EncoderSpec, image_BHWC: np.ndarray, form: str) -> Callable[[], object]:
    """The same in PyTorch: the network of the package efficientnet-lite-pytorch, by another author. form: of `PEER`."""
    try:
        import torch
        from efficientnet_lite_pytorch import EfficientNet
        from torch.nn.utils import fusion
    except ImportError as error:
        raise UserError("--peer needs torch and efficientnet-lite-pytorch: pip install both") from error
    layout = torch.channels_last if "channels_last" in form else torch.contiguous_format
    network = EfficientNet.from_name(spec.name.replace("_lite", "-lite"), image_size=image_BHWC.shape[1]).eval()
    if "folded" in form:
        pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
        for block in network._blocks:
            pairs += [(block, "_expand_conv", "_bn0"), (block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
        for module, conv, norm in pairs:
            if hasattr(module, conv):  # the first block expands nothing
                setattr(module, conv, fusion.fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, torch.nn.Identity())
    network = network.to(memory_format=layout)
    image_BCHW = torch.from_numpy(image_BHWC).permute(0, 3, 1, 2)

    def features(image_BCHW):
        scaled = (image_BCHW.float() - 127) / 128
        return network.extract_features(scaled.contiguous(memory_format=layout)).mean((2, 3))

    if "compile" in form:
        torch._inductor.config.freezing = True  # the filters laid out once, what follows a convolution made part of it
        features = torch.compile(features, dynamic=False)

    def encode():
        with torch.inference_mode():
            return features(image_BCHW)

    return encode


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encode",
        description="Photos a second through a frozen encoder with random weights, at its published input size. With --peer "
                    "the same network runs in PyTorch on the same machine, turn by turn, as it comes, in channels_last, with "
                    "batch norm folded, and compiled; jaxcap's photos/s over those of the fastest of these is the median over the "
                    "turns.")
    parser.add_argument("--encoders", nargs="+", choices=encoders.names(), default=["efficientnet_lite2"], metavar="NAME")
    parser.add_argument("--batch", type=timing.count, default=64, help="photos at once (default: 64)")
    parser.add_argument("--size", type=timing.count, default=0, help="side of the photos (default: the published one)")
    parser.add_argument("--turns", type=timing.count, default=5, help="timings of each (default: 5)")
    parser.add_argument("--peer", action="store_true", help="compare with PyTorch (EfficientNet-Lite only)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    arguments = parser.parse_args(argv)
    for name in arguments.encoders:
        if arguments.peer and "efficientnet" not in name:
            raise UserError(f"--peer knows EfficientNet-Lite only, not {name}")
    timing.initialize()
    if arguments.peer and jax.default_backend() != "cpu":
        raise UserError("--peer compares on CPUs; on this device `python -m benchmarks.peers --kinds eval` does")
    file = timing.ResultFile(arguments.json, "encode float32")
    if arguments.peer:
        file.result["omp_wait_policy"] = timing.calm_torch(file.result["machine"])
    print(timing.describe(file.result["machine"]), flush=True)
    rows = [["encoder", "size", "batch", "photos/s", "ms a photo", "PyTorch, photos/s", "its form", "jaxcap ÷ PyTorch, photos/s"]]
    for name in arguments.encoders:
        print(f"  {name} …", file=sys.stderr)
        spec = encoders.get(name)
        size = arguments.size or spec.image_size
        image_BHWC = np.random.default_rng(0).integers(0, 256, (arguments.batch, size, size, 3), np.uint8)
        calls = {"jaxcap": ours(spec, image_BHWC)}
        if arguments.peer:
            calls |= {form: peer(spec, image_BHWC, form) for form in PEER}
        for call in calls.values():
            call()
        turns = [{who: timing.time_calls(call, repeats=1, calls=1).ms for who, call in calls.items()}
                 for _ in range(arguments.turns)]
        ms = {who: statistics.median(turn[who] for turn in turns) for who in calls}
        best = min((who for who in ms if who != "jaxcap"), key=ms.get, default=None)
        ratio = statistics.median(turn[best] / turn["jaxcap"] for turn in turns) if best else None
        file.result["results"].append({"encoder": name, "size": size, "batch": arguments.batch, "ms": ms, "turns_ms": turns,
                                       "peer": best, "speed_over_peer": ratio})
        rows.append([name, str(size), str(arguments.batch), short(1000 * arguments.batch / ms["jaxcap"]),
                     short(ms["jaxcap"] / arguments.batch), short(best and 1000 * arguments.batch / ms[best]),
                     best or "–", short(ratio, " ×")])
        file.save(rows)
    print("\n" + timing.table(rows))
    file.save(rows, finished=True)
    return 0


if __name__ == "__main__":
    run_command(main)
