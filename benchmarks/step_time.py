"""Times training and evaluation steps at im2txt's settings: `python -m benchmarks.step_time`."""

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import jax

from benchmarks import timing, top_ops, workload
from benchmarks.timing import Peak, Timing, short
from benchmarks.workload import KINDS
from jaxcap import parallel
from jaxcap.errors import UserError, run_command

# Seconds that a step of 32 photos took in 2016 on one NVIDIA K20, a card of 3.5 TFLOP/s in float32; both from the
# announcement of im2txt (Google Research blog, 22 September 2016).
THEN_S = {"TensorFlow 2016": 0.7, "DistBelief 2016": 3.0}
THEN_BATCH, THEN_CARD, THEN_TFLOPS = 32, "one NVIDIA K20", 3.52


def measure(kind: workload.Kind, of: workload.Settings, model: tuple, batch: int, arguments: argparse.Namespace) -> dict:
    """Compiles and times one kind of step, and asks XLA what it does; a JSON object."""
    start = time.perf_counter()
    step = workload.Step(kind, of, *model, batch)
    ready = time.perf_counter()
    lowered = step.lower()
    compiled = lowered.compile() if of.config.parallel == "shard_map" else None
    loss = step.loss(step())  # under pmap this compiles; otherwise it takes the program compiled above
    compile_s = time.perf_counter() - ready
    timed = timing.time_calls(step, repeats=arguments.repeats, calls=arguments.steps_per_repeat)
    last_loss = step.loss(step())
    if not math.isfinite(last_loss):
        raise RuntimeError(f"the loss of the {kind.name} step is {last_loss}: its time means nothing")
    devices, seconds = step.devices.size, timed.ms / 1000
    result = {
        "kind": kind.name, "batch": batch, "dtype": of.config.encoder.dtype, "parallel": of.config.parallel,
        "skips_cnn": kind.cached, "ms": timed.to_dict(), "photos_per_s_per_device": batch / seconds / devices,
        "set_up_s": ready - start, "compile_s": compile_s, "loss": [loss, last_loss],
        **costs(lowered, compiled, of, batch // devices, train=kind.train),
        "times_faster": {who: then * batch / THEN_BATCH / seconds for who, then in THEN_S.items()} if kind.train else {},
    }
    best = peaks(arguments)
    rate = best and getattr(best, of.config.encoder.dtype)
    result["share_of_peak"] = result["gflop"] / 1000 / seconds / rate if rate else None
    result["share_of_bandwidth"] = result["gb"] / seconds / best.gb_per_s if best and result["gb"] else None
    memory = jax.local_devices()[0].memory_stats() or {}
    result["process_peak_gib"] = memory["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in memory else None
    if arguments.profile:
        scopes = top_ops.scopes(compiled.as_text()) if compiled else {}
        result["top_ops"] = top_ops.trace(step, arguments.profile / f"{kind.name}-{batch}", scopes)
    return result


def costs(lowered: jax.stages.Lowered, compiled: jax.stages.Compiled | None, of: workload.Settings, rows: int, *,
          train: bool) -> dict:
    """What one device does in one step, by XLA's own count.

    gflop: of the program as it is handed to the compiler, so the same on every machine; a compiled one hides what it gives
    to cuDNN and cuBLAS. XLA counts the body of a loop once: the LSTM's other T − 1 recurrent products are added here.
    gb: read and written by the compiled step; without what cuDNN, cuBLAS and loops move (gb_is_lower_bound).
    program_gib: arguments, results and temporaries of the compiled step.
    """
    hidden = of.config.decoder.hidden
    one_product = 2 * rows * hidden * 4 * hidden
    flops = lowered.cost_analysis()["flops"] + (of.tokens - 1) * one_product * (2 if train else 1)
    gb = program_gib = lower_bound = None
    if compiled is not None:
        gb = compiled.cost_analysis().get("bytes accessed", 0) / 1e9 or None
        lower_bound = any(mark in compiled.as_text() for mark in ("__cudnn", "__cublas"))
        plan = compiled.memory_analysis()
        program_gib = (plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
                       + plan.temp_size_in_bytes) / 2**30
    return {"gflop": flops / 1e9, "gb": gb, "gb_is_lower_bound": lower_bound, "program_gib": program_gib}


def peaks(arguments: argparse.Namespace) -> Peak | None:
    """The device's peak from the table or, before that, from the command line."""
    known = timing.peak(jax.devices()[0].device_kind)
    if arguments.peak_tflops is None and arguments.peak_gb_per_s is None:
        return known
    known = known or Peak(math.nan, math.nan, math.inf)
    tflops = arguments.peak_tflops
    return dataclasses.replace(known, float32=tflops or known.float32, bfloat16=tflops or known.bfloat16,
                               gb_per_s=arguments.peak_gb_per_s or known.gb_per_s)


def rows(results: list[dict]) -> list[list[str]]:
    """The table of results."""
    lines = [["step", "batch", "ms", "min – max", "photos/s/device", "GFLOP", "GB", "of peak", "memory", "compile",
              *(f"× {who}" for who in THEN_S)]]
    for r in results:
        name = r["kind"] + (" *" if r.get("skips_cnn") else "")
        if "error" in r:
            lines.append([name, str(r["batch"]), "failed", *["–"] * (len(lines[0]) - 3)])
            continue
        spread = Timing(tuple(r["ms"]["repeats"]), 1).spread
        gb = ("≥ " if r["gb_is_lower_bound"] else "") + short(r["gb"])
        share = None if r["share_of_peak"] is None else 100 * r["share_of_peak"]
        memory = short(r["program_gib"], " GiB")
        lines.append([name, str(r["batch"]), short(r["ms"]["median"]), spread, short(r["photos_per_s_per_device"]),
                      short(r["gflop"]), gb, short(share, " %"), memory, short(r["compile_s"], " s"),
                      *(short(r["times_faster"].get(who), " ×") for who in THEN_S)])
    return lines


def heading(of: workload.Settings, about: dict, best: Peak | None) -> str:
    """What is measured, on what, and what it is set beside."""
    config = of.config
    lines = [
        f"jaxcap, one step: {config.encoder.name} at {config.encoder.size} px out of {config.data.size} px uint8, LSTM "
        f"{config.decoder.hidden}, embedding {config.decoder.embedding}, {of.vocabulary:,} words, {of.tokens} tokens a "
        f"caption; {config.encoder.dtype}, {config.parallel}; random data",
        timing.describe(about),
        f"beside it: {', '.join(f'{who} {s} s' for who, s in THEN_S.items())} for 32 photos on {THEN_CARD}",
    ]
    if best is not None and (rate := getattr(best, config.encoder.dtype)):
        lines.append(f"a device like this does at most {short(rate)} TFLOP/s in {config.encoder.dtype} (as XLA multiplies), "
                     f"{rate / THEN_TFLOPS:.0f} times a K20 in float32")
    return "\n".join(lines)


def comparison(old: dict, new: dict) -> str:
    """Two result files side by side, with a warning where they do not compare."""
    warnings = [f"{what} differs: {old['machine'][what]} → {new['machine'][what]}"
                for what in ("device", "devices", "cores", "jax") if old["machine"][what] != new["machine"][what]]
    if old["settings"] != new["settings"]:
        warnings.append("the settings differ")

    def key(r):
        return r["kind"], r["batch"], r["dtype"], r["parallel"]

    before = {key(r): r["ms"] for r in old["results"] if "ms" in r}
    lines = [["step", "batch", "dtype", "before, ms", "now, ms", "change", ""]]
    for r in new["results"]:
        if "ms" not in r or key(r) not in before:
            continue
        was, now = before[key(r)], r["ms"]
        apart = now["min"] > was["max"] or now["max"] < was["min"]
        lines.append([r["kind"], str(r["batch"]), r["dtype"], short(was["median"]), short(now["median"]),
                      f"{100 * (now['median'] / was['median'] - 1):+.1f} %", "" if apart else "within the spread"])
    if len(lines) == 1:
        return "nothing to compare: no step, batch, dtype and parallel mode is in both"
    title = f"against commit {old['machine']['commit'] or 'unknown'} of {old['machine']['date']}"
    return "\n".join([title, *(f"  beware: {warning}" for warning in warnings), timing.table(lines)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_time", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Times one step at the settings of configs/im2txt.py, with jaxcap's own step, wrapped as training wraps it.\n\n"
                    "  cached   decoder only, from features that are resident on the device; it skips the CNN (marked *)\n"
                    "  eval     loss of a batch of photos, central crop, no gradients\n"
                    "  frozen   phase 1: distortions, frozen CNN, decoder learns\n"
                    "  joint    phase 2: distortions, everything learns, batch statistics, L2\n\n"
                    "Times are medians over repeats, after warm-up; compilation is timed apart. `of peak` is XLA's count of\n"
                    "arithmetic over the time and the device's datasheet; `memory` is what the compiled step plans.",
        epilog="Where a step takes seconds, as on a CPU, fewer steps are timed and the output says so; the batch stays.\n\n"
               "examples:\n"
               "  python -m benchmarks.step_time\n"
               "  python -m benchmarks.step_time --batch 32 256 --dtype bfloat16 --json now.json\n"
               "  python -m benchmarks.step_time --kinds cached --compare benchmarks/records/FILE.json\n"
               "  python -m benchmarks.step_time --kinds joint --profile /tmp/trace      where the time goes")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="kinds of step (default: all)")
    parser.add_argument("--batch", nargs="+", type=int, metavar="B", help="photos a step over all devices (default: 32)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    parser.add_argument("--parallel", choices=("shard_map", "pmap"), default="shard_map", help="how the step is wrapped")
    parser.add_argument("--repeats", type=int, default=0, metavar="N",
                        help=f"timings (default: {timing.MOST}, or {timing.FEWEST} where a step is slow)")
    parser.add_argument("--steps-per-repeat", type=int, default=0, metavar="N",
                        help=f"steps a timing, dispatched without waiting (default: about {timing.REPEAT_S} s of them)")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="the device's peak, where the table does not have it")
    parser.add_argument("--peak-gb-per-s", type=float, metavar="X", help="and that of its memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="set the result beside an earlier one")
    parser.add_argument("--profile", type=Path, metavar="DIR",
                        help="also trace three steps of each kind into DIR and list the slowest operations")
    parser.add_argument("--tiny", action="store_true", help="a miniature that only shows that everything runs")
    arguments = parser.parse_args(argv)

    if arguments.tiny:
        arguments.repeats, arguments.steps_per_repeat = arguments.repeats or 5, arguments.steps_per_repeat or 2
    old = read(arguments.compare) if arguments.compare else None
    timing.initialize()
    of = workload.settings(tiny=arguments.tiny, dtype=arguments.dtype, parallel=arguments.parallel)
    batches = arguments.batch or [of.config.batch_size]
    if min(batches) < 1:
        raise UserError(f"--batch must be at least 1, not {min(batches)}")
    for batch in batches:
        parallel.Parallel(of.config.parallel).check_batch(batch, "--batch")
    file = timing.ResultFile(arguments.json, f"step_time {arguments.dtype}")
    file.result["settings"] = {"config": dataclasses.asdict(of.config), "vocabulary": of.vocabulary, "tokens": of.tokens,
                               "tiny": arguments.tiny}
    print(heading(of, file.result["machine"], peaks(arguments)), flush=True)
    model = workload.model(of)
    results = file.result["results"]
    for batch in batches:
        for kind in arguments.kinds:
            print(f"  {kind}, batch {batch} …", end="", file=sys.stderr, flush=True)
            try:
                result = measure(KINDS[kind], of, model, batch, arguments)
                slow = f", {len(result['ms']['repeats'])} repeats of 1 step, for it is slow here" \
                    if result["ms"]["median"] > 1000 * timing.SLOW_STEP_S and not arguments.repeats else ""
                print(f" {short(result['ms']['median'])} ms{slow}", file=sys.stderr)
            except jax.errors.JaxRuntimeError as error:  # above all: more than fits into the device's memory
                file.result["ok"] = False
                result = {"kind": kind, "batch": batch, "error": str(error).splitlines()[0][:300]}
                print(f" failed: {result['error']}", file=sys.stderr)
            results.append(result)
            file.save(rows(results))
    print("\n" + timing.table(rows(results)))
    if "cached" in arguments.kinds:
        print("* skips the CNN: its photos' features were computed before")
    for result in results:
        if "top_ops" in result:
            print(f"\nwhere the time of {result['kind']}, batch {result['batch']}, goes\n{top_ops.table(result['top_ops'])}")
    if old is not None:
        print("\n" + comparison(old, file.result))
    file.save(rows(results), finished=True)
    return 0 if file.result["ok"] else 1


def read(path: Path) -> dict:
    """An earlier result file. Raises `UserError` if it is none."""
    try:
        result = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(result, dict) or not {"results", "machine", "settings"} <= set(result):
        raise UserError(f"{path} was not written by benchmarks.step_time --json")
    return result


if __name__ == "__main__":
    run_command(main)
