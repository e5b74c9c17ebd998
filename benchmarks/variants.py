"""The same step under other flags of XLA and other settings, turn by turn: `python -m benchmarks.variants`."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax

from benchmarks import step_time, timing
from benchmarks.timing import short
from jaxcap.errors import UserError, run_command

PLAIN = "as it is"
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Variant:
    """What is changed for a process: XLA_FLAGS, and settings of the step (key=value)."""

    name: str
    flags: str = ""
    overrides: tuple[str, ...] = ()


# Ideas worth a measurement, by platform. What has paid belongs into jaxcap's defaults; what has not, into RECORDS.md.
VARIANTS = {
    "cpu": (
        Variant("recurrence in one piece", overrides=("decoder.unroll=32",)),
        Variant("vectors of 512 bits", "--xla_cpu_prefer_vector_width=512"),
        Variant("fast arithmetic", "--xla_cpu_enable_fast_math=true"),
        Variant("no concurrent operations", "--xla_cpu_enable_concurrency_optimized_scheduler=false"),
    ),
    "gpu": (
        Variant("recurrence in a loop", overrides=("decoder.unroll=1",)),
        Variant("recurrence by fours", overrides=("decoder.unroll=4",)),
        Variant("no command buffers", "--xla_gpu_enable_command_buffer="),
        Variant("loops in command buffers",
                "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,WHILE,CONDITIONAL"),
        Variant("short command buffers too", "--xla_gpu_graph_min_graph_size=1"),
        Variant("products by cuBLAS alone", "--xla_gpu_enable_triton_gemm=false"),
        Variant("loops unrolled by XLA", "--xla_gpu_enable_while_loop_unrolling=WHILE_LOOP_UNROLLING_AUTO_UNROLL"),
        Variant("loops double buffered", "--xla_gpu_enable_while_loop_unrolling=WHILE_LOOP_UNROLLING_DOUBLE_BUFFER"),
        Variant("every tiling tried", "--xla_gpu_exhaustive_tiling_search=true"),
    ),
    "tpu": (
        Variant("recurrence in a loop", overrides=("decoder.unroll=1",)),
    ),
}


def run(variant: Variant, arguments: argparse.Namespace, environment: dict[str, str], directory: Path) -> dict:
    """Times the steps in a process of their own; {kind: step_time's result}, or {"error": what went wrong}."""
    path = directory / "step_time.json"
    path.unlink(missing_ok=True)
    flags = " ".join(filter(None, (environment.get("XLA_FLAGS", ""), variant.flags)))
    options = ["--tiny"] if arguments.tiny else []
    options += ["--repeats", str(arguments.repeats)] if arguments.repeats else []
    command = [sys.executable, "-m", "benchmarks.step_time", *variant.overrides, "--kinds", *arguments.kinds,
               "--batch", str(arguments.batch), "--dtype", arguments.dtype, "--json", str(path), *options]
    environment = {**environment, "XLA_FLAGS": flags}
    try:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=arguments.limit)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {arguments.limit} s"}
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        return {"error": next((line for line in said if "nknown flag" in line), said[-1])[:200]}
    return {result["kind"]: result for result in json.loads(path.read_text("utf-8"))["results"]}


def rows(found: dict[str, list[dict]], kinds: list[str]) -> list[list[str]]:
    """The table of what each variant has given so far, a dictionary a turn."""
    lines = [["step", "variant", "ms", "min – max of turns", "÷ as it is, median of turns", "loss apart", "compile"]]
    for kind in kinds:
        for name, turns in found.items():
            if "error" in turns[-1]:
                lines.append([kind, name, "failed", *["–"] * 4])
                continue
            plain = [turn[kind] for turn in found[PLAIN][:len(turns)]]
            ms = [turn[kind]["ms"]["median"] for turn in turns]
            ratio = statistics.median(one / other["ms"]["median"] for one, other in zip(ms, plain))
            apart = max(abs(turn[kind]["loss"][0] / other["loss"][0] - 1) for turn, other in zip(turns, plain))
            lines.append([kind, name, short(statistics.median(ms)), f"{short(min(ms))} – {short(max(ms))}", f"{ratio:.3f}",
                          f"{apart:.1e}", short(turns[0][kind]["compile_s"], " s")])
    return lines


def main(argv: list[str] | None = None) -> int:
    environment = dict(os.environ)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process only asks what the device is
    platform = jax.default_backend()
    known = {variant.name: variant for variant in VARIANTS.get(platform, ())}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.variants", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Takes steps of benchmarks.step_time under other flags of XLA's compiler or other settings, in processes of their\n"
                    "own, turn by turn with the step as it is. A ratio below 1 means that the variant is the faster. A flag that XLA does\n"
                    "not know is a variant that failed.",
        epilog=f"variants on this {platform}:\n"
               + "".join(f"  {v.name:<28} {' '.join(filter(None, (v.flags, *v.overrides)))}\n" for v in known.values())
               + "\nexamples:\n"
               "  python -m benchmarks.variants --kinds cached --batch 32\n"
               "  python -m benchmarks.variants --kinds frozen --flags=--xla_cpu_enable_fast_min_max=true")
    parser.add_argument("--kinds", nargs="+", choices=list(step_time.KINDS), default=["cached"],
                        help="kinds of step (default: cached)")
    parser.add_argument("--batch", type=timing.count, default=32, metavar="B", help="photos a step (default: 32)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    parser.add_argument("--only", nargs="+", choices=list(known), metavar="NAME", help="only these variants (default: all)")
    parser.add_argument("--flags", action="append", default=[], metavar="FLAGS",
                        help="also a variant with these XLA_FLAGS; may be given again")
    parser.add_argument("--turns", type=timing.count, default=3, metavar="N", help="processes of each (default: 3)")
    parser.add_argument("--repeats", type=timing.count, metavar="N", help="timings in each process (default: as step_time)")
    parser.add_argument("--limit", type=timing.count, default=300, metavar="S", help="seconds that a process may take (default: 300)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--tiny", action="store_true", help="a miniature that only shows that everything runs")
    arguments = parser.parse_args(argv)
    chosen = [known[name] for name in arguments.only or known] + [Variant(flags, flags) for flags in arguments.flags]
    if not chosen:
        raise UserError(f"there is no variant for a {platform} yet; name one with --flags")
    file = timing.ResultFile(arguments.json, f"variants {arguments.dtype}")
    print(timing.describe(file.result["machine"]), flush=True)
    found = {PLAIN: [], **{variant.name: [] for variant in chosen}}
    with tempfile.TemporaryDirectory(prefix="jaxcap-variants-") as directory:
        for turn in range(arguments.turns):
            for variant in (Variant(PLAIN), *chosen):
                if found[variant.name] and "error" in found[variant.name][-1]:
                    continue
                print(f"  turn {turn + 1} of {arguments.turns}: {variant.name} …", file=sys.stderr, flush=True)
                result = run(variant, arguments, environment, Path(directory))
                if variant.name == PLAIN and "error" in result:
                    raise UserError(f"the step as it is does not run: {result['error']}")
                found[variant.name].append(result)
                table = rows({name: turns for name, turns in found.items() if turns}, arguments.kinds)
                file.result["results"] = [{"variant": name, "turns": turns} for name, turns in found.items()]
                file.save(table)
    print("\n" + timing.table(table))
    for name, turns in found.items():
        if "error" in turns[-1]:
            print(f"{name}: {turns[-1]['error']}")
    file.save(table, finished=True)
    return 0


if __name__ == "__main__":
    run_command(main)
