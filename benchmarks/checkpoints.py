"""Times what a checkpoint costs training: `python -m benchmarks.checkpoints`."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import timing, workload
from benchmarks.timing import short
from benchmarks.workload import KINDS, Step
from jaxcap import config as configs
from jaxcap.checkpoints import Checkpoints
from jaxcap.errors import run_command
from jaxcap.step import TrainState


@jax.jit
def after(state: TrainState) -> TrainState:
    """A state of the same numbers a step later, in other memory: nothing of it is on the host yet."""
    return jax.tree.map(jnp.copy, state)._replace(step=state.step + 1)


def measure(state: TrainState, directory: Path, repeats: int) -> dict:
    """Checkpoints of a state, one after another, and the last one read back; a JSON object. held_ms: training would wait."""
    keeper, held, written = Checkpoints(directory, configs.Checkpoints(keep=1)), [], []
    for _ in range(1 + repeats):
        state = jax.block_until_ready(after(state))
        step, start = int(state.step), time.perf_counter()
        keeper.save(state, {"step": step, "phase": 0, "phase_step": step, "words": 0})
        held.append(1000 * (time.perf_counter() - start))
        keeper.wait()
        written.append(1000 * (time.perf_counter() - start))
    start = time.perf_counter()
    jax.block_until_ready(keeper.restore(step, state))
    restored = 1000 * (time.perf_counter() - start)
    keeper.close()
    arrays = jax.tree.leaves(state)
    return {"arrays": len(arrays), "bytes": sum(array.nbytes for array in arrays), "held_ms": held, "written_ms": written,
            "restored_ms": restored}


def rows(results: list[dict]) -> list[list[str]]:
    lines = [["state of", "arrays", "MiB", "first: waits, ms", "on disk, ms", "later: waits, ms", "on disk, ms", "read back, ms"]]
    for r in results:
        times = [r["held_ms"][0], r["written_ms"][0], statistics.median(r["held_ms"][1:]), statistics.median(r["written_ms"][1:])]
        lines.append([r["encoder"], str(r["arrays"]), short(r["bytes"] / 2**20), *map(short, times), short(r["restored_ms"])])
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoints", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Times checkpoints of a training state at the settings of configs/im2txt.py, which all devices hold alike: how long\n"
                    "training waits while one is taken, and how long until it is on disk, which happens beside training. The first\n"
                    "one stands apart, later ones are medians; then the last one is read back.",
        epilog="examples:\n"
               "  python -m benchmarks.checkpoints\n"
               "  python -m benchmarks.checkpoints encoder.name=efficientnet_lite2 phases.1.optim.name=adam --dir /mnt/runs\n"
               "  XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.checkpoints      8 virtual devices of a CPU\n")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, before the options, as of jaxcap.train")
    parser.add_argument("--repeats", type=timing.count, default=5, metavar="N", help="checkpoints after the first (default: 5)")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="write there, on the disk that is meant (default: where temporary files go)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--tiny", action="store_true", help="a miniature that only shows that everything runs")
    arguments = parser.parse_intermixed_args(argv)
    timing.make_directory("--dir", arguments.dir)
    timing.initialize()
    of = workload.settings(tiny=arguments.tiny, overrides=arguments.overrides)
    file = timing.ResultFile(arguments.json, "checkpoints")
    print(f"{of.config.encoder.name} + {of.config.decoder.name.upper()} {of.config.decoder.hidden}, {of.vocabulary:,} words, devices: {len(jax.devices())}\n"
          f"{timing.describe(file.result['machine'])}", flush=True)
    state = Step(KINDS["joint"], of, *workload.model(of), len(jax.devices())).state
    with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
        file.result["results"].append({"encoder": of.config.encoder.name, **measure(state, Path(directory), arguments.repeats)})
    print("\n" + timing.table(rows(file.result["results"])))
    file.save(rows(file.result["results"]), finished=True)
    return 0


if __name__ == "__main__":
    run_command(main)
