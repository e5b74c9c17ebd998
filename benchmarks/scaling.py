"""Times a step on 1, 2, 4, 8 devices and counts what they exchange: `python -m benchmarks.scaling`."""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import timing, workload
from benchmarks.timing import short
from benchmarks.workload import KINDS, Settings
from jaxcap import captioner as captioners
from jaxcap import config as configs
from jaxcap import optim
from jaxcap import step as steps
from jaxcap.errors import UserError, run_command

OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
VIRTUAL_DEVICES = (1, 2, 4, 8)
PER_DEVICE, PER_VIRTUAL_DEVICE = 32, 4  # photos, at weak scaling
SCALARS = 2  # that a training step sums beside the gradient: its loss and its number of tokens
_FLAG = "--xla_force_host_platform_device_count"
_INSTRUCTION = re.compile(rf"= (?P<shape>\(.*?\)|\S+) (?P<operation>{'|'.join(OPERATIONS)})(?P<start>-start)?\(")


@dataclass(frozen=True)
class Collective:
    """One exchange between all devices. arrays: exchanged by it together. bytes: of them, whole (see `collectives`)."""

    operation: str
    arrays: int
    bytes: int

    def sent(self, devices: int) -> float:
        """Bytes that every device sends if the devices form a ring."""
        if self.operation == "collective-permute":
            return self.bytes
        return self.bytes * (devices - 1) / devices * (2 if self.operation == "all-reduce" else 1)


def collectives(hlo: str, devices: int) -> list[Collective]:
    """The exchanges in a compiled program's text over all `devices`; the body of a loop is counted once.

    Its bytes are those of the result: for an all-gather what every device has in the end, for a reduce-scatter what every
    device has in the beginning. Where an exchange is begun and awaited in two instructions, the first one counts.
    """
    found = []
    for match in _INSTRUCTION.finditer(re.sub(r"/\*.*?\*/|(?<=\])\{[^}]*\}", "", hlo)):
        operation, shape = match["operation"], match["shape"]
        if match["start"] and operation != "all-reduce":  # (what goes in, what comes out, and perhaps the device's own notes)
            shape = _parts(shape)[1]
        sizes = [_bytes(dtype, dimensions) for dtype, dimensions in re.findall(r"(\w+)\[([\d,]*)\]", shape)]
        found.append(Collective(operation, len(sizes), sum(sizes) * (devices if operation == "reduce-scatter" else 1)))
    return found


def _parts(shape: str) -> list[str]:
    """The items of a tuple's shape, tuples themselves perhaps."""
    depth, parts = 0, [""]
    for character in shape[1:-1]:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _bytes(dtype: str, dimensions: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.ceil(math.prod(int(side) for side in dimensions.split(",") if side) * bits / 8)


@functools.cache
def summed_bytes(of: Settings, kind: str, *, few_words: bool = False) -> int:
    """What a training step has to sum over the devices: a gradient of float32 for every parameter that trains, two scalars and,
    where the encoder learns batch statistics, those. few_words: without the words' table, whose rows are gathered."""
    captioner, phase = captioners.build(of.config, of.vocabulary), of.config.phases[KINDS[kind].phase]
    params, batch_stats = captioner.shapes(configs.encoder_size(of.config))
    trainable, _ = optim.split_params(params, phase)
    exchanged = (trainable, batch_stats if phase.batch_norm != "inference" else {})
    table = of.vocabulary * of.config.decoder.embedding * jnp.float32.dtype.itemsize if few_words else 0
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(exchanged)) - table + SCALARS * jnp.float32.dtype.itemsize


def expected_bytes(of: Settings, kind: str, batch: int) -> tuple[int, int]:
    """What a training step of a batch over all devices sums, and what it gathers: where its words are few rows of their table, a
    gradient of float32 for each, and its number."""
    captioner, words = captioners.build(of.config, of.vocabulary), batch * of.tokens
    few_words = steps.reads_few_words(captioner, of.config.phases[KINDS[kind].phase], words)
    return summed_bytes(of, kind, few_words=few_words), few_words * words * 4 * (of.config.decoder.embedding + 1)


def measure(kind: str, mode: str, of: Settings, model: tuple, count: int, arguments: argparse.Namespace) -> dict:
    """One kind of step on `count` devices, at weak and at strong scaling, and what its program exchanges; a JSON object."""
    of = dataclasses.replace(of, config=configs.change(of.config, {"parallel": mode}))
    result = {"kind": kind, "parallel": mode, "devices": count, "weak": None, "strong": None, "collectives": None}
    for way, batch in (("weak", arguments.per_device * count), ("strong", arguments.batch)):
        if way == "strong" and batch == arguments.per_device * count:
            result[way] = result["weak"]
            continue
        if result["collectives"] is not None and kind not in arguments.timed:
            continue  # counted already, at the other batch
        step = workload.Step(KINDS[kind], of, *model, batch, devices=jax.devices()[:count])
        if result["collectives"] is None and mode == "shard_map":
            result |= exchanged(step, of, kind, count, batch)
        if kind in arguments.timed:
            losses = [step.loss(step())]  # under pmap this compiles, which is no time of a step
            timed = timing.time_calls(step, repeats=arguments.repeats, calls=2 if arguments.tiny else 0)
            losses.append(step.loss(step()))
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"the loss of the {kind} step is {losses[-1]}: its time means nothing")
            result[way] = {"batch": batch, "ms": timed.to_dict(), "loss": losses}
    return result


def exchanged(step: workload.Step, of: Settings, kind: str, count: int, batch: int) -> dict:
    """What the devices exchange in one step of a batch over all of them, by the compiled program; a JSON object."""
    lowered, (summed, gathered) = step.lower(), expected_bytes(of, kind, batch)
    found = collectives(lowered.compile().as_text(), count)
    by_operation = {operation: [c for c in found if c.operation == operation] for operation in OPERATIONS}
    sums = {operation: {"count": len(group), "arrays": sum(c.arrays for c in group), "bytes": sum(c.bytes for c in group)}
            for operation, group in by_operation.items() if group}
    return {"collectives": sums, "counted_at_batch": batch,
            "all_reduces_asked_for": lowered.as_text().count("stablehlo.all_reduce"),
            "bytes_expected": summed, "bytes_gathered_expected": gathered,
            "bytes_sent_per_device": sum(c.sent(count) for c in found)}


def as_expected(result: dict) -> bool:
    """Whether the program sums and gathers what training has to over the devices, and exchanges nothing else; one alone need not."""
    found = result["collectives"]
    if found is None or result["devices"] == 1:
        return True
    expected = {"all-reduce": result["bytes_expected"], "all-gather": result["bytes_gathered_expected"]}
    return {operation: group["bytes"] for operation, group in found.items()} == {name: size for name, size in expected.items() if size}


def rows(results: list[dict], virtual: bool) -> list[list[str]]:
    """The table of results. On virtual devices no time is set against another."""
    lines = [["step", "mode", "devices", "weak: batch", "ms", "efficiency", "strong: batch", "ms", "faster", "counted at", "all-reduces",
              "others", "MB summed", "MB sent"]]
    alone = {(r["kind"], r["parallel"]): r for r in results if r["devices"] == 1}

    def ms(result: dict | None, way: str) -> float | None:
        return result[way]["ms"]["median"] if result and result[way] else None

    for r in results:
        one, line = alone.get((r["kind"], r["parallel"])), [r["kind"], r["parallel"], str(r["devices"])]
        for way, unit, scale in (("weak", " %", 100), ("strong", " ×", 1)):
            first, now = ms(one, way), ms(r, way)
            against = scale * first / now if first and now and not virtual else None
            line += [str(r[way]["batch"]) if now else "–", short(now), short(against, unit)]
        found = r["collectives"]
        if found is None:
            lines.append([*line, *["–"] * 5])
            continue
        sums = found.get("all-reduce", {"count": 0, "bytes": 0})
        others = ", ".join(f"{group['count']} {operation}" for operation, group in found.items() if operation != "all-reduce")
        lines.append([*line, str(r["counted_at_batch"]), f"{r['all_reduces_asked_for']} → {sums['count']}", others or "none",
                      short(sums["bytes"] / 1e6) + ("" if as_expected(r) else " WRONG"), short(r["bytes_sent_per_device"] / 1e6)])
    return lines


def environment(devices: int, given: dict[str, str]) -> dict[str, str]:
    """`given`, changed so that JAX starts with that many virtual devices."""
    kept = [flag for flag in given.get("XLA_FLAGS", "").split() if not flag.startswith(_FLAG)]
    return {**given, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join([*kept, f"{_FLAG}={devices}"])}


def in_child(counts: Sequence[int], arguments: argparse.Namespace) -> list[dict]:
    """The results of a process of its own, with enough virtual devices: a process cannot change their number."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "result.json"
        command = [sys.executable, "-m", "benchmarks.scaling", "--devices", *counts, "--kinds", *arguments.kinds,
                   "--parallel", *arguments.parallel, "--timed", *arguments.timed, "--per-device", arguments.per_device,
                   "--batch", arguments.batch, "--repeats", arguments.repeats, "--dtype", arguments.dtype, "--json", path]
        done = subprocess.run([*map(str, command), *(["--tiny"] if arguments.tiny else [])], stdout=subprocess.DEVNULL,
                              cwd=Path(__file__).parents[1], env=environment(max(counts), dict(os.environ)))
        if not path.exists():
            raise UserError(f"the process with {max(counts)} virtual devices ended with status {done.returncode}: see above")
        return json.loads(path.read_text("utf-8"))["results"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Times training steps of configs/im2txt.py on more and more devices, and counts what they exchange in the\n"
                    "compiled program.\n\n"
                    "  weak      the batch of a device stays, so the whole batch grows; efficiency is time on one device / time\n"
                    "  strong    the whole batch stays and is cut finer; faster is the same ratio\n"
                    "  counted at    the batch, of the two, whose program the rest of the row is of; where its words are more than a quarter\n"
                    "                of their table, all of that is summed, else the rows that were read are gathered\n"
                    "  all-reduces   asked for by the step (one an array) → left once XLA has combined them\n"
                    "  MB summed     by all-reduces; checked against the parameters that train (and batch statistics), 4 bytes\n"
                    "                each, and two scalars: exit status 1 where a byte more or less is exchanged\n"
                    "  MB sent       by every device in a ring, 2 (n − 1) / n of that",
        epilog="Where there is only a CPU, a process with virtual devices stands in for a machine with several. They share the\n"
               "same cores, so their times say nothing about several devices; counts and bytes carry over. pmap lets nobody see\n"
               "its program; a test holds that it exchanges the same.\n\n"
               "examples:\n"
               "  python -m benchmarks.scaling\n"
               "  python -m benchmarks.scaling --kinds cached --per-device 32 --batch 256 --json scaling.json\n"
               "  JAX_PLATFORMS=cpu python -m benchmarks.scaling --devices 8 --timed\n")
    parser.add_argument("--devices", nargs="+", type=timing.count, metavar="N", help="numbers of devices (default: 1 2 4 8, as there are)")
    trained = [name for name, kind in KINDS.items() if kind.train]
    parser.add_argument("--kinds", nargs="+", choices=trained, default=["cached", "joint"])
    parser.add_argument("--parallel", nargs="+", choices=("shard_map", "pmap"), default=["shard_map", "pmap"])
    parser.add_argument("--timed", nargs="*", choices=trained,
                        help="kinds that are timed, the others only counted (default: all; on virtual devices cached)")
    parser.add_argument("--per-device", type=timing.count, metavar="B",
                        help=f"photos a device at weak scaling (default: {PER_DEVICE}; on virtual devices {PER_VIRTUAL_DEVICE})")
    parser.add_argument("--batch", type=timing.count, metavar="B", help="photos over all devices at strong scaling (default: 32)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    parser.add_argument("--repeats", type=timing.count, default=0, metavar="N", help="timings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--tiny", action="store_true", help="a miniature that only shows that everything runs")
    arguments = parser.parse_args(argv)
    timing.initialize()
    of = workload.settings(tiny=arguments.tiny, dtype=arguments.dtype)
    virtual = jax.devices()[0].platform == "cpu"
    counts = arguments.devices or [n for n in VIRTUAL_DEVICES if virtual or n <= len(jax.devices())]
    arguments.per_device = arguments.per_device or (PER_VIRTUAL_DEVICE if virtual else PER_DEVICE)
    arguments.batch = arguments.batch or of.config.batch_size
    arguments.repeats = arguments.repeats or (2 if arguments.tiny else timing.FEWEST if virtual else 0)
    if arguments.timed is None:
        arguments.timed = [kind for kind in arguments.kinds if kind == "cached" or not virtual or arguments.tiny]
    if uneven := [n for n in counts if arguments.batch % n]:
        raise UserError(f"--batch={arguments.batch} cannot be divided by {uneven[0]} devices")
    if not virtual and max(counts) > len(jax.devices()):
        raise UserError(f"--devices {max(counts)}: this machine has {len(jax.devices())}; with JAX_PLATFORMS=cpu virtual ones "
                        "stand in")

    file = timing.ResultFile(arguments.json, f"scaling {arguments.dtype}")
    file.result["virtual"] = virtual
    file.result["settings"] = {"config": dataclasses.asdict(of.config), "vocabulary": of.vocabulary, "tokens": of.tokens,
                               "tiny": arguments.tiny}
    print(f"{of.config.encoder.name} + LSTM {of.config.decoder.hidden}, {of.vocabulary:,} words, {arguments.dtype}\n"
          f"{timing.describe(file.result['machine'])}", flush=True)
    note = "virtual devices share the same cores: counts and bytes carry over to real ones, times do not"
    if virtual:
        print(note)
    results, here = file.result["results"], len(jax.devices()) >= max(counts)
    if here:
        model = workload.model(of)
        for count, kind, mode in itertools.product(counts, arguments.kinds, arguments.parallel):
            print(f"  {kind}, {mode}, devices {count} …", file=sys.stderr)
            results.append(measure(kind, mode, of, model, count, arguments))
            file.save(rows(results, virtual))
    else:
        results += in_child(counts, arguments)
    results.sort(key=lambda r: (arguments.kinds.index(r["kind"]), arguments.parallel.index(r["parallel"]), r["devices"]))
    print("\n" + timing.table(rows(results, virtual)))
    if untimed := [kind for kind in arguments.kinds if kind not in arguments.timed]:
        print(f"not timed here: {', '.join(untimed)} (--timed {' '.join(arguments.kinds)} does it)")
    if virtual:
        print(note)
    file.result["ok"] = all(map(as_expected, results))
    file.save(rows(results, virtual), finished=True)
    return 0 if file.result["ok"] else 1


if __name__ == "__main__":
    run_command(main)
