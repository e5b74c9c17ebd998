"""Times an encoder's convolutions one by one, beside XLA's own and PyTorch's: `python -m benchmarks.convolutions`."""

import argparse
import collections
import functools
import math
import statistics
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.timing import short
from jaxcap import encoders, products
from jaxcap.encoders import dense, layers
from jaxcap.errors import UserError, run_command

PASSES = {"forward": "y", "input": "gradient of the input", "kernel": "gradient of the kernel"}
JAXCAP, XLA, TORCH = "jaxcap", "XLA", "PyTorch"
TOGETHER, DISPATCHES = 8, 16  # on accelerators: convolutions a call, and calls without waiting in between, so that neither costs


class Convolution(NamedTuple):
    """One convolution of a network: of `size` × `size` pixels and `channels` channels by a kernel [height, width, in, out]."""

    size: int
    channels: int
    kernel: tuple[int, int, int, int]
    stride: int
    padding: tuple[tuple[int, int], tuple[int, int]]

    def __str__(self) -> str:
        height, width, into, out = self.kernel
        channels = f"{self.channels}, depthwise" if into < self.channels else f"{into} → {out}"
        stride = f" / {self.stride}" if self.stride > 1 else ""
        return f"{self.size} px, {height}×{width}{stride}, {channels}" + (", padded" if any(map(any, self.padding)) else "")

    @property
    def seen(self) -> tuple[int, ...]:
        """Height and width of the result."""
        return tuple((self.size + sum(pads) - side) // self.stride + 1 for side, pads in zip(self.kernel[:2], self.padding))

    @property
    def gflop(self) -> float:
        """Multiplications and additions for one photo, in 10⁹."""
        return 2e-9 * math.prod(self.seen) * math.prod(self.kernel)

    def inputs(self, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Photos' maps [B, H, W, C], a kernel and the gradient of the result; random, float32."""
        random = np.random.default_rng(0)
        kernel = random.standard_normal(self.kernel, np.float32) / np.sqrt(np.prod(self.kernel[:3]))
        of = (random.standard_normal((batch, height, width, channels), np.float32)
              for height, width, channels in ((self.size, self.size, self.channels), (*self.seen, self.kernel[3])))
        return next(of), kernel.astype(np.float32), next(of)


def of_network(name: str, size: int) -> dict[Convolution, int]:
    """Every convolution that a frozen encoder computes for a photo of that size, and how often."""
    spec = encoders.get(name)
    image_BHWC = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(spec.module().init, jax.random.key(0), image_BHWC)
    found = collections.Counter()

    def walk(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "conv_general_dilated":
                x, kernel = (variable.aval.shape for variable in equation.invars)
                (stride, _), padding = equation.params["window_strides"], equation.params["padding"]
                found[Convolution(x[1], x[3], kernel, stride, tuple(map(tuple, padding)))] += 1
            branches = equation.params.get("branches")  # a platform each, the last one of all that have no form of their own
            for value in [branches[-1]] if branches else equation.params.values():
                if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                    walk(getattr(value, "jaxpr", value))

    folded = jax.eval_shape(functools.partial(encoders.fold, spec), variables)
    walk(jax.make_jaxpr(lambda see, image_BHWC: see(image_BHWC))(folded, image_BHWC).jaxpr)
    return dict(found)


def in_jax(of: Convolution, what: str, batch: int, together: int, dtype: jnp.dtype, *, own: bool,
           kernel_dtype: jnp.dtype | None) -> Callable[[], Any]:
    """A compiled call of `together` of jaxcap's convolution (`layers.convolve`) or, with `own`, of the one that XLA has."""

    def convolve(x_BHWC, kernel):
        if own:
            return dense.ordinary(x_BHWC, kernel, of.stride, of.padding, groups=of.channels // of.kernel[2])
        return layers.convolve(x_BHWC, kernel.astype(kernel_dtype or kernel.dtype), of.stride, of.padding)

    def one(x_BHWC, kernel, dy_BHWC):
        if what == "forward":
            return convolve(x_BHWC, kernel)
        return jax.vjp(convolve, x_BHWC, kernel)[1](dy_BHWC)[0 if what == "input" else 1]

    x_BHWC, kernel, dy_BHWC = (array.astype(dtype) for array in of.inputs(batch))
    given = jax.device_put(([x_BHWC] * together, kernel, [dy_BHWC] * together))  # as many arrays, so that none is computed for another
    compiled = jax.jit(lambda xs, kernel, dys: [one(x_BHWC, kernel, dy_BHWC) for x_BHWC, dy_BHWC in zip(xs, dys)])
    return lambda: compiled(*given)


def in_torch(of: Convolution, what: str, batch: int, together: int, dtype: str) -> Callable[[], Any]:
    """The same in PyTorch (cuDNN or oneDNN), channels last, all of it in `dtype`; on a GPU one CUDA graph."""
    torch, device = timing.torch_here()
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True  # as XLA takes float32 there

    def tensor(array: np.ndarray, *axes: int):
        return torch.from_numpy(array).permute(axes).to(device, getattr(torch, dtype), memory_format=torch.channels_last)

    (top, bottom), (left, right) = of.padding
    around, padding = None, [top, left]
    if (top, left) != (bottom, right):  # TensorFlow's padding before a stride is one sided
        around, padding = (left, right, top, bottom), [0, 0]
    groups = of.channels // of.kernel[2]
    x_BHWC, kernel, dy_BHWC = of.inputs(batch)
    kernel = tensor(kernel, 3, 2, 0, 1)
    xs_BCHW, dys_BCHW = ([tensor(array, 0, 3, 1, 2).clone() for _ in range(together)] for array in (x_BHWC, dy_BHWC))

    def one(x_BCHW, dy_BCHW):
        if around:
            x_BCHW = torch.nn.functional.pad(x_BCHW, around)
        if what == "forward":
            return torch.nn.functional.conv2d(x_BCHW, kernel, None, of.stride, padding, groups=groups)
        asked = [what == "input", what == "kernel", False]
        found = torch.ops.aten.convolution_backward(dy_BCHW, x_BCHW, kernel, None, [of.stride] * 2, padding, [1, 1], False, [0, 0], groups, asked)
        return found[asked.index(True)]

    def call():
        with torch.no_grad():
            return [one(x_BCHW, dy_BCHW) for x_BCHW, dy_BCHW in zip(xs_BCHW, dys_BCHW)]

    if device.type == "cpu":
        return call
    from benchmarks.peers import torch_graph

    graph, _ = torch_graph.capture(call, warm_up=3)
    replayed = types.SimpleNamespace(block_until_ready=torch.cuda.synchronize)  # what `timing.time_calls` waits for

    def replay():
        graph.replay()
        return replayed

    return replay


def measure(of: Convolution, what: str, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Milliseconds of one convolution for the whole batch, by who computes it, turn by turn."""
    dtype, kernel_dtype = products.dtypes(arguments.dtype, jax.default_backend())
    together, dispatches = (1, 1) if jax.default_backend() == "cpu" else (TOGETHER, DISPATCHES)
    case = of, what, arguments.batch, together
    calls = {JAXCAP: in_jax(*case, dtype, own=False, kernel_dtype=kernel_dtype)}
    if jax.default_backend() == "cpu":  # elsewhere the two are one
        calls[XLA] = in_jax(*case, dtype, own=True, kernel_dtype=None)
    if arguments.peer:
        calls[TORCH] = in_torch(*case, arguments.dtype)
    for call in calls.values():
        jax.block_until_ready(call())
    return [{who: timing.time_calls(call, repeats=1, calls=dispatches).ms / together for who, call in calls.items()}
            for _ in range(arguments.turns)]


def rows(results: list[dict], batch: int) -> list[list[str]]:
    """The table of results: the median over the turns, times how often the network has the convolution."""
    who = list(results[0]["ms"])
    lines = [["convolution", "times", "pass", *(column for one in who for column in (f"{one}, ms", "GFLOP/s")),
              *(f"jaxcap ÷ {one}" for one in who[1:])]]
    whole = []
    for what in dict.fromkeys(r["pass"] for r in results):
        of_pass = [r for r in results if r["pass"] == what]
        whole.append({"convolution": "all", "times": sum(r["times"] for r in of_pass), "pass": what,
                      "gflop": sum(r["times"] * r["gflop"] for r in of_pass),
                      "ms": {one: sum(r["times"] * r["ms"][one] for r in of_pass) for one in who}})
    for r in [*results, *whole]:
        speed = {one: r["gflop"] * batch / (r["ms"][one] / 1000) for one in who}
        lines.append([r["convolution"], str(r["times"]), r["pass"],
                      *(column for one in who for column in (short(r["ms"][one]), short(speed[one]))),
                      *(f"{r['ms'][JAXCAP] / r['ms'][one]:.2f}" for one in who[1:])])
    return lines


def chosen(arguments: argparse.Namespace) -> Iterator[tuple[Convolution, int, str]]:
    size = arguments.size or encoders.get(arguments.encoder).image_size
    found = of_network(arguments.encoder, size)
    for of, times in found.items():
        for what in arguments.passes:
            if what == "input" and of.channels == 3:
                continue  # nobody asks for the gradient of a photo
            if arguments.only is None or arguments.only in str(of):
                yield of, times, what


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convolutions", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Times every different convolution of an encoder by itself: as jaxcap computes it (on CPUs as matrix products, by\n"
                    "Winograd, as shifted slices), as XLA's own operation where that is another, and with --peer in PyTorch (oneDNN\n"
                    "or cuDNN, channels last). Milliseconds are for the whole batch, the median over turns in which all of them\n"
                    "take part; the lines `all` count each convolution as often as the network has it. Batch norm, activations and\n"
                    "pooling are left out, and siblings that a block computes as one are one.",
        epilog="examples:\n"
               "  python -m benchmarks.convolutions --peer\n"
               "  python -m benchmarks.convolutions --encoder inception_v3 --batch 32 --passes forward input kernel --only '17 px'\n"
               "  python -m benchmarks.convolutions --encoder efficientnet_lite0 --dtype bfloat16 --json FILE")
    parser.add_argument("--encoder", choices=encoders.names(), default="inception_v3", metavar="NAME", help="(default: inception_v3)")
    parser.add_argument("--batch", type=timing.count, default=8, metavar="B", help="photos at once (default: 8)")
    parser.add_argument("--size", type=timing.count, default=0, metavar="PX", help="side of the photos (default: the published one)")
    parser.add_argument("--passes", nargs="+", choices=list(PASSES), default=["forward"],
                        help="; ".join(f"{name}: {meaning}" for name, meaning in PASSES.items()) + " (default: forward)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of the arithmetic; on a CPU bfloat16 rounds the factors of products only, and XLA's own is in float32")
    parser.add_argument("--only", metavar="TEXT", help="only convolutions whose description contains this, as in '17 px' or '7×1'")
    parser.add_argument("--turns", type=timing.count, default=5, metavar="N", help="timings of each (default: 5)")
    parser.add_argument("--peer", action="store_true", help="compare with PyTorch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    arguments = parser.parse_args(argv)
    timing.initialize()
    to_do = list(chosen(arguments))
    if not to_do:
        raise UserError(f"--only {arguments.only!r}: no convolution of {arguments.encoder} is described so; without it all are listed")
    file = timing.ResultFile(arguments.json, f"convolutions {arguments.encoder} {arguments.dtype}")
    file.result["settings"] = {name: getattr(arguments, name) for name in ("encoder", "batch", "size", "dtype")}
    if arguments.peer:
        file.result["omp_wait_policy"] = timing.calm_torch(file.result["machine"])
    results = file.result["results"]
    print(f"{arguments.encoder}, {arguments.batch} photos, {arguments.dtype}\n{timing.describe(file.result['machine'])}", flush=True)
    for number, (of, times, what) in enumerate(to_do, 1):
        print(f"  {number} of {len(to_do)}: {of}, {what} …", file=sys.stderr, flush=True)
        turns = measure(of, what, arguments)
        results.append({"convolution": str(of), "times": times, "pass": what, "gflop": of.gflop,
                        "ms": {who: statistics.median(turn[who] for turn in turns) for who in turns[0]}, "turns_ms": turns})
        file.save(rows(results, arguments.batch))
    print("\n" + timing.table(rows(results, arguments.batch)))
    file.save(rows(results, arguments.batch), finished=True)
    return 0


if __name__ == "__main__":
    run_command(main)
