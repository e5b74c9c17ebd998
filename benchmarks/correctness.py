"""Does this device compute what jaxcap means? Every part against a reference on the host: `python -m benchmarks.correctness`.

Networks and decoder are held against float64, a whole training step and beam search against float32 on the CPU. Errors
are ‖out − reference‖ / ‖reference‖ over all numbers of a result.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing, workload
from benchmarks.workload import KINDS, Settings
from jaxcap import captioner as captioners
from jaxcap import config as configs
from jaxcap import inference, search
from jaxcap.errors import run_command
from jaxcap.parallel import Parallel
from jaxcap.vocab import BOS, EOS, PAD

PyTree = Any
# How the arithmetic is done: name → (dtype, precision of matrix products, allowed error of outputs, and of gradients).
# "default" is TF32 on NVIDIA cards from Ampere on: 10 bits of mantissa, an error near 3e-4 in one product.
VARIANTS = {
    "float32, highest": ("float32", "highest", 1e-4, 1e-3),
    "float32, default": ("float32", "default", 1e-2, 5e-2),
    "bfloat16": ("bfloat16", "default", 8e-2, 4e-1),
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: its error, how large it may be; for searches also the share of captions that are the same."""

    what: str
    variant: str
    error: float
    limit: float
    same: float | None = None
    least_same: float = 0.0

    @property
    def passed(self) -> bool:
        return self.error <= self.limit and (self.same is None or self.same >= self.least_same)  # NaN never passes


def relative_error(tree: PyTree, reference: PyTree) -> float:
    """‖tree − reference‖ / ‖reference‖ in float64; infinite where anything is not a finite number."""
    one, two = (np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(jax.device_get(t))])
                for t in (tree, reference))
    error = float(np.linalg.norm(one - two) / np.linalg.norm(two))
    return error if np.isfinite(error) else float("inf")


def encoder(of: Settings, model: tuple, variants: list[str], batch: int) -> Iterator[Check]:
    """The frozen network, batch norm folded in, as training and captioning run it."""
    name, size = of.config.encoder.name, configs.encoder_size(of.config)
    _, params, batch_stats = model
    image_BHWC = np.random.default_rng(1).random((batch, size, size, 3), np.float32)
    features = _encode(of, "float64", params, batch_stats, image_BHWC)
    for variant in variants:
        dtype, precision, limit, _ = VARIANTS[variant]
        with jax.default_matmul_precision(precision):
            found = _encode(of, dtype, params, batch_stats, image_BHWC)
        yield Check(f"{name}, {size} px", variant, relative_error(found, features), limit)


def decoder(of: Settings, model: tuple, variants: list[str], batch: int) -> Iterator[Check]:
    """Logits under teacher forcing."""
    captioner, params, _ = model
    random = np.random.default_rng(2)
    features_BPF = workload.features(random, batch, captioner.spec.features)
    inputs_BT = workload.tokens(random, of, batch)[:, :-1]
    logits = _logits(of, "float64", params, features_BPF, inputs_BT)
    for variant in variants:
        dtype, precision, limit, _ = VARIANTS[variant]
        with jax.default_matmul_precision(precision):
            found = _logits(of, dtype, params, features_BPF, inputs_BT)
        yield Check("decoder, logits", variant, relative_error(found, logits), limit)


def training_step(kind: str, of: Settings, model: tuple, variants: list[str], batch: int) -> Iterator[Check]:
    """The change of all parameters in one whole step, distortions and dropout included: clipped gradients.

    Random numbers are the same on every device. The learning rate is 1, so that rounding of the sum does not show. Where the
    encoder learns with a few photos' statistics, single gradients of random weights hang on the last bits of every product (the
    order of float32 sums alone moves them by 3 %): there the norms of all parts' gradients are compared instead.
    """
    phases = tuple(dataclasses.replace(p, optim=dataclasses.replace(p.optim, learning_rate=1.0, schedule="constant"))
                   for p in of.config.phases)
    of = dataclasses.replace(of, config=dataclasses.replace(of.config, phases=phases))
    with jax.default_device(_host()):
        reference, loss = _learned(of, "float32", kind, model, batch, _host())
    what = "norms" if kind == "joint" else "update"
    for variant in variants:
        dtype, precision, limit, gradient_limit = VARIANTS[variant]
        with jax.default_matmul_precision(precision):
            found, found_loss = _learned(of, dtype, kind, model, batch, jax.local_devices()[0])
        yield Check(f"{kind} step, loss", variant, relative_error(found_loss, loss), limit)
        yield Check(f"{kind} step, {what}", variant, relative_error(found, reference), max(gradient_limit, 5e-3 * (what == "norms")))


def beam_search(beam: int, of: Settings, model: tuple, variants: list[str], batch: int) -> Iterator[Check]:
    """Log-probabilities of the best captions against those that float64 gives the same words, how much less probable these are than
    the best ones of the CPU in float32, and how many captions are word for word the same.

    A near tie may fall either way once products are rounded, and then another caption follows.
    """
    captioner, params, batch_stats = model
    # Larger weights than at the start of training, so that words differ in probability. Much larger ones in the recurrence would
    # make it chaotic: then float32 alone is 2e-4 from float64.
    params = {**params, "decoder": {name: (16 if name.startswith("logits") else 2) * w for name, w in params["decoder"].items()}}
    features_BPF = workload.features(np.random.default_rng(3), batch, captioner.spec.features)

    def found_by(dtype: str, device: jax.Device) -> search.Captions:
        devices, config = Parallel(devices=[device]), of.config
        config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, dtype=dtype))
        decode = inference.decoder(captioners.build(config, of.vocabulary), dataclasses.replace(config.search, beam=beam),
                                   configs.encoder_size(config), devices)
        return jax.device_get(decode(devices.replicate(params), None, devices.shard(features_BPF)))

    with jax.default_device(_host()):
        reference = found_by("float32", _host())
    for variant in variants:
        dtype, precision, limit, _ = VARIANTS[variant]
        with jax.default_matmul_precision(precision):
            found = found_by(dtype, jax.local_devices()[0])
        true_B, best_B = (_log_probabilities(of, params, features_BPF, captions) for captions in (found, reference))
        yield Check(f"beam {beam}, log-probability", variant, relative_error(found.log_probs_BK[:, 0], true_B), limit)
        same = float((found.tokens_BKT[:, 0] == reference.tokens_BKT[:, 0]).all(axis=1).mean())
        yield Check(f"beam {beam}, less probable", variant, max(float(1 - best_B.mean() / true_B.mean()), 0.0), limit,
                    same, 0.95 if precision == "highest" else 0.0)


def _host() -> jax.Device:
    return jax.devices("cpu")[0]


def _in(dtype: str, run: Callable, *arrays: PyTree) -> PyTree:
    """`run(*arrays)` compiled: in float64 on the host, or in float32 parameters on the device."""
    if dtype != "float64":
        return jax.device_get(jax.jit(run)(*arrays))
    with jax.enable_x64(True), jax.default_device(_host()):
        wide = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, arrays)
        return jax.device_get(jax.jit(run)(*wide))


def _encode(of: Settings, dtype: str, params: PyTree, batch_stats: PyTree, image_BHWC: np.ndarray) -> np.ndarray:
    config = dataclasses.replace(of.config, encoder=dataclasses.replace(of.config.encoder, dtype="float32"))
    captioner = captioners.build(config, of.vocabulary)
    captioner = dataclasses.replace(captioner, encoder=captioner.spec.module(dtype=jnp.dtype(dtype)))
    return _in(dtype, lambda *a: captioner.frozen_encode(a[0], a[1])(a[2]), params, batch_stats, image_BHWC)


def _logits(of: Settings, dtype: str, params: PyTree, features_BPF: np.ndarray, inputs_BT: np.ndarray) -> np.ndarray:
    captioner = captioners.build(of.config, of.vocabulary)
    captioner = dataclasses.replace(captioner, decoder=captioner.decoder.clone(dtype=jnp.dtype(dtype)))
    return _in(dtype, captioner.logits, params, features_BPF, inputs_BT)


def _log_probabilities(of: Settings, params: PyTree, features_BPF: np.ndarray, captions: search.Captions) -> np.ndarray:
    """log p of each photo's first caption [B], word by word in float64; its end marker counts where it has one."""
    words_BT, finished_B = captions.tokens_BKT[:, 0], captions.finished_BK[:, 0]
    inputs_BT = np.pad(words_BT, ((0, 0), (1, 0)), constant_values=BOS)
    logits_BTV = np.asarray(_logits(of, "float64", params, features_BPF, inputs_BT), np.float64)  # the decoder gives float32
    lengths_B = (words_BT != PAD).sum(1)
    targets_BT = np.where(np.arange(inputs_BT.shape[1]) == lengths_B[:, None], EOS, np.pad(words_BT, ((0, 0), (0, 1))))
    log_probs_BT = (np.take_along_axis(logits_BTV, targets_BT[:, :, None], axis=2)[:, :, 0]
                    - np.logaddexp.reduce(logits_BTV, axis=2))
    return np.where(np.arange(inputs_BT.shape[1]) < (lengths_B + finished_B)[:, None], log_probs_BT, 0).sum(1)


def _learned(of: Settings, dtype: str, kind: str, model: tuple, batch: int, device: jax.Device) -> tuple[PyTree, float]:
    """What a step changes, or of a joint one the norms of its gradient's parts; and its loss."""
    config = configs.change(of.config, {"encoder.dtype": dtype, "decoder.dtype": dtype})
    captioner = captioners.build(config, of.vocabulary)
    step = workload.Step(KINDS[kind], dataclasses.replace(of, config=config), captioner, *model[1:], batch, devices=[device])
    reported = step()
    if kind == "joint":
        return reported.norms, step.loss(reported)
    return jax.tree.map(lambda new, old: np.asarray(new) - old, step.params, model[1]), step.loss(reported)


def checks(of: Settings, *, tiny: bool, workers: int = 1) -> Iterator[Check]:
    """All of them, `workers` at a time: nearly all that they do is to compile."""
    model, batch, variants = workload.model(of), of.config.batch_size, list(VARIANTS)
    if tiny:
        variants = variants[-1:]
    begun = [decoder(of, model, variants, batch)]
    begun += [beam_search(beam, of, model, variants, batch) for beam in ((3,) if tiny else (1, 3))]
    begun += [training_step("cached", of, model, variants, batch), encoder(of, model, variants, 4),
              training_step("joint", of, model, variants[:2], 4)]
    for name in () if tiny else ("efficientnet_lite0", "inception_v2", "googlenet", "densenet121"):  # every kind of layer
        other = dataclasses.replace(of, config=configs.change(of.config, {"encoder.name": name, "encoder.size": 224}))
        begun.append(encoder(other, workload.model(other), variants[:1], 4))
    with futures.ThreadPoolExecutor(workers) as pool:
        for found in pool.map(list, begun):
            yield from found


def rows(found: list[Check]) -> list[list[str]]:
    lines = [["what", "arithmetic", "error", "limit", "same", "verdict"]]
    for check in found:
        same = "" if check.same is None else f"{check.same:.0%}"
        lines.append([check.what, check.variant, f"{check.error:.1e}", f"{check.limit:.0e}", same,
                      "ok" if check.passed else "WRONG"])
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.correctness",
        description="Five encoders, the decoder, gradients of whole training steps and beam search on this "
                    "device against references in float64 or on the CPU. Exit status 1 if an error is over its limit.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--tiny", action="store_true", help="a miniature that only shows that everything runs")
    arguments = parser.parse_args(argv)
    timing.initialize()
    file = timing.ResultFile(arguments.json, "correctness")
    print(timing.describe(file.result["machine"]), flush=True)
    found: list[Check] = []
    start = time.perf_counter()
    workers = min(max(file.result["machine"]["cores"] // 2, 1), 8)
    for check in checks(workload.settings(tiny=arguments.tiny), tiny=arguments.tiny, workers=workers):
        found.append(check)
        print(f"  {time.perf_counter() - start:5.0f} s  {check.what}, {check.variant}: {check.error:.1e}", file=sys.stderr)
        file.result["ok"] = all(c.passed for c in found)
        file.result["results"] = [{**dataclasses.asdict(c), "error": min(c.error, 1e300), "passed": c.passed} for c in found]
        file.save(rows(found))
    print("\n" + timing.table(rows(found)))
    file.save(rows(found), finished=True)
    return 0 if file.result["ok"] else 1


if __name__ == "__main__":
    run_command(main)
