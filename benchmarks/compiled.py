"""Reads what XLA makes of the steps for an accelerator that need not be here: `python -m benchmarks.compiled`."""

import argparse
import sys
import time
from pathlib import Path

import jax

from benchmarks import absent, step_report, timing, workload
from benchmarks.program import PRODUCTS, Kernel, Program
from benchmarks.step_time import DEFAULT, KINDS
from benchmarks.timing import short
from jaxcap import config as configs
from jaxcap.errors import UserError, run_command

TPU_GHZ = {"TPU v4": 1.05, "TPU v5 lite": 1.5, "TPU v5": 1.75, "TPU v6 lite": 1.75}  # of the clock that estimated cycles count
SHOWN = 20
RESIDENT = 6000


def read(kind: workload.Kind, of: workload.Settings, model: tuple, batch: int, devices: list[jax.Device], resident: int,
         text: Path | None = None) -> dict:
    """Compiles one kind of step for the devices and says what one of them is sent to do in a step; a JSON object.

    resident: photos or features that every device keeps; a step that turns over all of them shows only if they are as many as a data
    set has. text: a directory, which exists, for the program as XLA prints it.
    """
    lowered = workload.Step(kind, of, *model, batch, devices=jax.devices("cpu")[:1]).lower(
        {"gpu": "cuda"}.get(platform := _platform(devices), platform), devices, resident)
    start = time.perf_counter()
    compiled = lowered.compile()
    compile_s = time.perf_counter() - start
    plan = compiled.memory_analysis()
    hlo = compiled.as_text()
    if text:
        (text / f"{kind.name}-{batch}.txt").write_text(hlo, "utf-8")
    kernels = Program(hlo).kernels
    best = timing.peak(devices[0].device_kind)
    rate = best and getattr(best, of.config.encoder.dtype)
    moved = _total(kernels, lambda k: k.bytes if k.kind not in PRODUCTS else 0) / kind.together
    flop = _total(kernels, lambda k: k.flop) / kind.together
    cycles = _total(kernels, lambda k: k.cycles or 0) / kind.together
    ghz = next((clock for name, clock in TPU_GHZ.items() if devices[0].device_kind.startswith(name)), None)
    return {
        "kind": kind.name, "batch": batch, "devices": len(devices), "compile_s": compile_s,
        "kernels": _total(kernels, lambda k: 1) / kind.together,
        "by_kind": {name: _total([k for k in kernels if k.kind == name], lambda k: 1) / kind.together
                    for name in sorted({k.kind for k in kernels})},
        "gb": None if ghz else _total(kernels, lambda k: k.bytes) / kind.together / 1e9, "gflop": None if ghz else flop / 1e9,
        "program_gib": (plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
                        + plan.temp_size_in_bytes) / 2**30,
        "at_peak_ms": 1000 * (moved / 1e9 / best.gb_per_s + flop / 1e12 / rate) if platform == "gpu" and rate else None,
        "expected_ms": cycles / ghz / 1e6 if ghz else None,
        "largest": [{"name": k.name, "kind": k.kind, "scope": k.scope, "shape": k.shape, "times": k.times / kind.together,
                     "mb": k.times * k.bytes / kind.together / 1e6, "gflop": k.times * k.flop / kind.together / 1e9,
                     "us": k.times * k.cycles / ghz / 1000 / kind.together if ghz and k.cycles else None}
                    for k in sorted(kernels, key=lambda k: -k.times * ((k.cycles or 0) if ghz else k.bytes))],
    }


def _platform(devices: list[jax.Device]) -> str:
    return {"cuda": "gpu", "rocm": "gpu"}.get(devices[0].platform, devices[0].platform)


def _total(kernels: list[Kernel], of) -> int:
    return sum(kernel.times * of(kernel) for kernel in kernels)


def rows(results: list[dict]) -> list[list[str]]:
    """The table of results."""
    lines = [["step", "batch", "kernels", "convolutions", "products", "GB", "GFLOP", "memory", "compile", "at peak", "XLA expects"]]
    for r in results:
        count = r["by_kind"]
        lines.append([r["kind"], str(r["batch"]), short(r["kernels"]), short(count.get("convolution", 0)), short(count.get("product", 0)),
                      short(r["gb"]), short(r["gflop"]), short(r["program_gib"], " GiB"), short(r["compile_s"], " s"),
                      short(r["at_peak_ms"], " ms"), short(r["expected_ms"], " ms")])
    return lines


def largest(result: dict, count: int) -> str:
    """The kernels that move most, or that XLA expects to take longest, as lines for a terminal."""
    lines = [["kernel", "kind", "times", "MB", "GFLOP", "µs", "gives", "from"]]
    for k in result["largest"][:count]:
        lines.append([k["name"][:40], k["kind"], short(k["times"]), short(k["mb"]), short(k["gflop"]), short(k["us"]), k["shape"][:40],
                      k["scope"][-60:]])
    return timing.table(lines)


def comparison(old: dict, new: dict) -> str:
    """The numbers of two result files side by side, for the steps that both have, with a warning where they do not compare."""

    def about(file):
        return {"device": file["device"]["kind"], "devices": file["device"]["count"], "jax": file["machine"]["jax"],
                "resident": file["settings"].get("resident", "the benchmark's own few")}

    before = {(r["kind"], r["batch"]): r for r in old["results"]}
    lines = [["step", "batch", "kernels", "GB", "memory, GiB", "at peak, ms", "XLA expects, ms"]]
    for r in new["results"]:
        if was := before.get((r["kind"], r["batch"])):
            lines.append([r["kind"], str(r["batch"]), *(f"{short(was[key])} → {short(r[key])}" if r[key] is not None else "–" for key in (
                "kernels", "gb", "program_gib", "at_peak_ms", "expected_ms"))])
    return step_report.against(old, new, about, lines, "step and batch")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compiles the steps of configs/im2txt.py for a GPU or TPU that need not be here and reads the program: how many\n"
                    "kernels a device is sent in a step, what they move and compute, and the memory that the step plans. XLA's\n"
                    "compiler for it is enough: pip install 'jaxcap[cuda]' or 'jaxcap[tpu]', on Linux, on any machine.\n\n"
                    "`at peak`: what the products and convolutions take at the card's peak, and what all other kernels read and\n"
                    "write at its memory's; only what stays in a cache can be faster. `XLA expects`: the cycles that XLA for TPUs writes\n"
                    "beside each operation, at the chip's clock. Neither is a measured time: for that, `benchmarks.step_time`.\n"
                    "Without a card XLA cannot try which product's form is fastest, so a card's own program differs in that.",
        epilog="examples:\n"
               "  python -m benchmarks.compiled --device h200 --dtype bfloat16\n"
               "  python -m benchmarks.compiled --device v5e:2x2 --devices 4 --batch 128 --kinds joint --largest 30\n"
               "  python -m benchmarks.compiled --device h200 --json now.json --compare before.json")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of jaxcap.train, such as decoder.hidden=1024")
    parser.add_argument("--device", default="h200", metavar="NAME",
                        help=f"{', '.join(absent.GPUS)}, a TPU's topology such as v5e:2x2, or {absent.HERE} (default: h200)")
    parser.add_argument("--devices", type=timing.count, default=1, metavar="N", help="how many of them (default: 1)")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(DEFAULT), help="kinds of step, see benchmarks.step_time")
    parser.add_argument("--batch", nargs="+", type=timing.count, default=[], metavar="N", help="photos on all devices (default: 32)")
    parser.add_argument("--resident", type=timing.count, default=RESIDENT, metavar="N",
                        help=f"photos, or features of them, that every device keeps (default: {RESIDENT:,}, Flickr8k's training set)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the arithmetic (default: bfloat16)")
    parser.add_argument("--largest", nargs="?", type=timing.count, const=SHOWN, default=0, metavar="N",
                        help=f"also list the N kernels of every step that weigh most (default: {SHOWN})")
    parser.add_argument("--text", type=Path, metavar="DIR", help="write the compiled programs there, as XLA prints them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="set the result beside an earlier one")
    parser.add_argument("--tiny", action="store_true", help="a miniature that only shows that everything runs")
    return run(parser.parse_intermixed_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """The benchmark with its options; its exit status."""
    old = timing.read_result(arguments.compare, "compiled") if arguments.compare else None
    if old and old["device"]["name"] != arguments.device:
        raise UserError(f"--compare {arguments.compare} was compiled for {old['device']['name']}, not for {arguments.device}")
    timing.make_directory("--text", arguments.text)
    timing.initialize()
    devices = absent.devices(arguments.device, arguments.devices)
    of = workload.settings(tiny=arguments.tiny, dtype=arguments.dtype, overrides=arguments.overrides)
    file = timing.ResultFile(arguments.json, f"compiled for {arguments.device} {arguments.dtype}")
    file.result["device"] = {"name": arguments.device, "kind": devices[0].device_kind, "count": len(devices)}
    file.result["settings"] = {"config": configs.to_dict(of.config), "vocabulary": of.vocabulary, "tokens": of.tokens, "tiny": arguments.tiny,
                               "resident": arguments.resident}
    batches = arguments.batch or [of.config.batch_size]
    for batch in batches:
        if batch % len(devices):
            raise UserError(f"--batch {batch} cannot be divided by {len(devices)} devices")
    model = workload.model(of, platform=_platform(devices))
    print(f"compiled for {len(devices)} × {devices[0].device_kind}, {arguments.dtype} · {timing.describe(file.result['machine'])}", flush=True)
    for batch in batches:
        for name in arguments.kinds:
            print(f"  {name}, batch {batch} …", end="", file=sys.stderr, flush=True)
            file.result["results"].append(result := read(KINDS[name], of, model, batch, devices, arguments.resident, arguments.text))
            print(f" {short(result['kernels'])} kernels", file=sys.stderr)
            file.save(rows(file.result["results"]))
    print("\n" + timing.table(rows(file.result["results"])))
    for result in file.result["results"] if arguments.largest else ():
        print(f"\n{result['kind']}, batch {result['batch']}\n{largest(result, arguments.largest)}")
    for result in file.result["results"]:
        result["largest"] = result["largest"][:SHOWN]
    file.save(rows(file.result["results"]), finished=True)
    if old is not None:
        print("\n" + comparison(old, file.result))
    return 0


if __name__ == "__main__":
    run_command(main)
