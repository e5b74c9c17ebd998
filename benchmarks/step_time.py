"""Times training and evaluation steps at im2txt's settings: `python -m benchmarks.step_time`."""

import argparse
import contextlib
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import real_input, timing, top_ops, workload
from benchmarks.step_report import (PAYS, THEN_BATCH, THEN_S, comparison, growing, heading, input_of, named, notes, rows,
                                    saturated, to_go_s)
from benchmarks.program import Program
from benchmarks.timing import Peak, short
from benchmarks.workload import CACHED_8, FIVE
from jaxcap import config as configs
from jaxcap import memory, parallel
from jaxcap.errors import UserError, run_command

PyTree = Any
DEFAULT = {**workload.KINDS, CACHED_8.name: CACHED_8}
KINDS = {**DEFAULT, **FIVE}
INPUTS = ("synthetic", "real")
LONG_S = 90  # from here on what is still to do is worth a word
MOST_TIMES = 64  # the largest batch asked for may be multiplied by, in search of one that saturates the device


def measure(kind: workload.Kind, of: workload.Settings, model: tuple, batch: int, arguments: argparse.Namespace,
            fed: real_input.Feed | None = None) -> dict:
    """Compiles and times one kind of step, and asks XLA what it does; a JSON object. fed: real input, None for synthetic."""
    start = time.perf_counter()
    step = workload.Step(kind, of, *model, batch, fed=fed)
    ready = time.perf_counter()
    traced = step.trace()
    lowered = traced.lower()
    compiled = lowered.compile() if of.config.parallel == "shard_map" else None
    compile_s = time.perf_counter() - ready
    loss = step.loss(step())
    if compiled is None:  # under pmap this has compiled it
        compile_s = time.perf_counter() - ready
    if fed:
        fed.use_up()
    timed = timing.time_calls(step, repeats=arguments.repeats, calls=arguments.steps_per_repeat, steps=step.together)
    last_loss = step.loss(step())
    if not math.isfinite(last_loss):
        raise RuntimeError(f"the loss of the {kind.name} step is {last_loss}: its time means nothing")
    devices, seconds = step.devices.size, timed.ms / 1000
    result = {
        "kind": kind.name, "batch": batch, "input": "real" if fed else "synthetic", "dtype": of.config.encoder.dtype,
        "parallel": of.config.parallel, "skips_cnn": kind.cached, "steps_per_dispatch": step.together, "ms": timed.to_dict(),
        "scaled_down": not arguments.repeats and len(timed.repeats_ms) < timing.MOST,
        "photos_per_s_per_device": batch / seconds / devices,
        "set_up_s": ready - start, "compile_s": compile_s, "loss": [loss, last_loss],
        **costs(lowered, compiled, in_loops(traced.jaxpr), together=kind.together),
        "captions_per_photo": kind.captions,
        "times_faster": {who: then * batch / THEN_BATCH / seconds for who, then in THEN_S.items() if kind.train and not arguments.tiny},
    }
    best = peaks(arguments)
    rate = best and getattr(best, of.config.encoder.dtype)
    result["share_of_peak"] = result["gflop"] / 1000 / seconds / rate if rate and result["gflop"] else None
    result["share_of_bandwidth"] = result["gb"] / seconds / best.gb_per_s if best and best.gb_per_s and result["gb"] else None
    stats = jax.local_devices()[0].memory_stats() or {}
    result["process_peak_gib"] = stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None
    if arguments.profile:
        scopes = top_ops.scopes(compiled.as_text()) if compiled else {}
        result["top_ops"] = top_ops.trace(step, arguments.profile / f"{kind.name}-{batch}{'-real' * bool(fed)}", scopes,
                                          steps=step.together)
    result["took_s"] = time.perf_counter() - start
    return result


def order(arguments: argparse.Namespace, batches: Sequence[int], results: list[dict]) -> Iterator[tuple[int, str, str]]:
    """What to measure, as (batch, kind, input): every combination, then of the kinds to saturate the largest batch times two, again
    and again, while `step_report.growing` says of the `results` so far that it may pay and there is memory for it."""
    yield from dict.fromkeys(itertools.product(batches, arguments.kinds, arguments.input))
    stats = jax.local_devices()[0].memory_stats() or {}
    limit_gib = stats.get("bytes_limit", memory.allowed()) / 2**30
    for kind, way in dict.fromkeys(itertools.product(arguments.saturate, arguments.input)):
        batch = max(batches)
        while batch < max(batches) * (4 if arguments.tiny else MOST_TIMES) and growing(results, kind, way, batch, limit_gib):
            batch *= 2
            yield batch, kind, way


def costs(lowered: jax.stages.Lowered, compiled: jax.stages.Compiled | None, looped: float, *, together: int = 1) -> dict:
    """What one device does in one step, by XLA's own count; together: steps of a dispatch.

    gflop: of the program as it is handed to the compiler, so the same on every machine of a platform; a compiled one hides what it gives
    to cuDNN and cuBLAS. None where neither can be counted (under pmap on GPUs). XLA counts the body of a loop once: `looped` is added
    (`in_loops`).
    gb: read and written by the compiled step; without what cuDNN, cuBLAS and loops move (gb_is_lower_bound).
    program_gib: arguments, results and temporaries of the compiled step.
    """
    analysis = lowered.cost_analysis()
    if analysis is not None:
        flops = (analysis["flops"] + looped) / together
    else:  # as jax 0.11 on GPUs: then the compiled program's products, loops included
        flops = sum(k.times * k.flop for k in Program(compiled.as_text()).kernels) / together if compiled else None
    gb = program_gib = lower_bound = None
    if compiled is not None:
        gb = compiled.cost_analysis().get("bytes accessed", 0) / 1e9 or None
        text = compiled.as_text()
        lower_bound = any(mark in text for mark in ("__cudnn", "__cublas", " while("))
        plan = compiled.memory_analysis()
        program_gib = (plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
                       + plan.temp_size_in_bytes) / 2**30
    return {"gflop": None if flops is None else flops / 1e9, "gb": gb, "gb_is_lower_bound": lower_bound, "program_gib": program_gib}


def in_loops(jaxpr: Any) -> float:
    """Floating-point operations of products and convolutions in the rounds of loops that XLA does not count."""
    return _products(jaxpr, all_rounds=True) - _products(jaxpr, all_rounds=False)


def _products(jaxpr: Any, *, all_rounds: bool) -> float:
    """Their floating-point operations; of a loop in all rounds, or in those that its compiled body holds and that stand behind it."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            left, right = (variable.aval.shape for variable in equation.invars)
            dimensions = params["dimension_numbers"]
            summed = [left[i] for i in dimensions[0][0]] if name == "dot_general" else np.delete(right, dimensions.rhs_spec[0])
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(map(int, summed))
            continue
        values = [each for value in params.values() for each in (value if isinstance(value, (tuple, list)) else [value])]
        within = [_products(each, all_rounds=all_rounds) for each in values if hasattr(each, "eqns")]
        if name == "scan":
            unroll = min(params["unroll"], params["length"])
            within = [(params["length"] if all_rounds else unroll + params["length"] % unroll) * sum(within)]
        total += max(within, default=0) if name == "cond" else sum(within)
    return total


def peaks(arguments: argparse.Namespace) -> Peak | None:
    """The device's peak from the table or, before that, from the command line."""
    known = timing.peak(jax.devices()[0].device_kind)
    if arguments.peak_tflops is None and arguments.peak_gb_per_s is None:
        return known
    known = known or Peak(None, None, None)
    tflops = arguments.peak_tflops
    return dataclasses.replace(known, float32=tflops or known.float32, bfloat16=tflops or known.bfloat16,
                               gb_per_s=arguments.peak_gb_per_s or known.gb_per_s)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_time", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Times one step at the settings of configs/im2txt.py, with jaxcap's own step, wrapped as training wraps it.\n\n"
                    "  cached   decoder only, from features that are resident on the device; it skips the CNN (marked *)\n"
                    "  cached_8 the same, eight steps a dispatch, as training sends them to an accelerator\n"
                    "  eval     loss of a batch of photos, central crop, no gradients\n"
                    "  frozen   phase 1: distortions, frozen CNN, decoder learns\n"
                    "  joint    phase 2: distortions, everything learns, batch statistics, L2\n"
                    "  frozen_5, joint_5   the same, but every photo is looked at once for five captions\n\n"
                    "Synthetic input, the default, is random photos or features that are resident on the device. Real input is\n"
                    "what training has where they are not: photos that jaxcap.prepare made of drawn JPEGs, read from records by\n"
                    "grain's workers ahead of the step and sent batch by batch (from the system's cache, not the disk); for\n"
                    "`cached`, features of a file in memory, read by threads. Captions are drawn alike for both: random words,\n"
                    "20 tokens, none of them padding. With both, every step has two rows.\n\n"
                    "Times are medians over repeats, after warm-up; compilation is timed apart. `of peak` is XLA's count of\n"
                    "arithmetic over the time and the device's datasheet; `memory` is what the compiled step plans.",
        epilog="Where a step takes seconds, as on a CPU, fewer steps are timed and the output says so; the batch stays.\n"
               "What will take minutes is announced.\n\n"
               "examples:\n"
               "  python -m benchmarks.step_time\n"
               "  python -m benchmarks.step_time --batch 32 256 --dtype bfloat16 --json now.json\n"
               "  python -m benchmarks.step_time --kinds joint --saturate      the batch from which on photos/s stay the same\n"
               "  python -m benchmarks.step_time encoder.name=densenet121 encoder.size=224 --kinds frozen joint\n"
               "  python -m benchmarks.step_time --input synthetic real --kinds frozen joint      does the step wait?\n"
               "  python -m benchmarks.step_time --kinds cached --compare benchmarks/records/FILE.json\n"
               "  python -m benchmarks.step_time --kinds joint --profile /tmp/trace      where the time goes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, before the options, as of "
                        "jaxcap.train: then the step is no longer im2txt's, and the output says so")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(DEFAULT),
                        help=f"kinds of step (default: {' '.join(DEFAULT)})")
    parser.add_argument("--batch", nargs="+", type=timing.count, metavar="B", help="photos a step over all devices (default: 32)")
    parser.add_argument("--saturate", nargs="*", choices=list(KINDS), metavar="KIND",
                        help="then double the largest batch, of these kinds or of all that are timed, while photos/s grow by "
                             f"{100 * PAYS - 100:.0f} %% or more and memory lasts, and say which batch saturates the device")
    parser.add_argument("--input", nargs="+", choices=INPUTS, default=["synthetic"],
                        help="what the step reads: resident random data, or what is read and sent (default: synthetic)")
    parser.add_argument("--real-config", metavar="PAGE", default="", help="a page of configs/ whose prepared photos are the real "
                        "input, in place of drawn ones; at the size of the benchmark")
    parser.add_argument("--workers", type=int, metavar="N",
                        help="processes that read photos (default: the 4 of configs/im2txt.py, at most one a core)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    parser.add_argument("--parallel", choices=("shard_map", "pmap"), default="shard_map", help="how the step is wrapped")
    parser.add_argument("--repeats", type=timing.count, default=0, metavar="N",
                        help=f"timings (default: {timing.MOST}, or {timing.FEWEST} where a step is slow)")
    parser.add_argument("--steps-per-repeat", type=timing.count, default=0, metavar="N",
                        help=f"dispatches a timing, without waiting in between (default: about {timing.REPEAT_S} s of them)")
    parser.add_argument("--peak-tflops", type=timing.amount, metavar="X", help="the device's peak, where the table does not have it")
    parser.add_argument("--peak-gb-per-s", type=timing.amount, metavar="X", help="and that of its memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="set the result beside an earlier one")
    parser.add_argument("--profile", type=Path, metavar="DIR",
                        help="also trace three steps of each kind into DIR and list the slowest operations")
    parser.add_argument("--tiny", action="store_true", help="a miniature that only shows that everything runs")
    arguments = parser.parse_intermixed_args(argv)

    if arguments.tiny:
        arguments.repeats, arguments.steps_per_repeat = arguments.repeats or 5, arguments.steps_per_repeat or 2
        arguments.workers = arguments.workers or 0
    arguments.saturate = [] if arguments.saturate is None else arguments.saturate or arguments.kinds
    if left_out := [kind for kind in arguments.saturate if kind not in arguments.kinds]:
        raise UserError(f"--saturate {left_out[0]}: this kind is not timed; name it in --kinds too")
    if "real" not in arguments.input and (arguments.real_config or arguments.workers):
        raise UserError("--real-config and --workers are about real input: add --input real")
    if (arguments.workers or 0) < 0:
        raise UserError(f"--workers must not be negative, not {arguments.workers}")
    return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    """The benchmark with options that have been checked; its exit status."""
    old = read(arguments.compare, INPUTS) if arguments.compare else None
    timing.make_directory("--profile", arguments.profile)
    timing.initialize()
    of = workload.settings(tiny=arguments.tiny, dtype=arguments.dtype, parallel=arguments.parallel, overrides=arguments.overrides)
    batches = arguments.batch or [of.config.batch_size]
    for batch in batches:
        parallel.Parallel(of.config.parallel).check_batch(batch, "--batch")
    file = timing.ResultFile(arguments.json, f"step_time {arguments.dtype}")
    file.result["settings"] = {"config": configs.to_dict(of.config), "vocabulary": of.vocabulary, "tokens": of.tokens,
                               "tiny": arguments.tiny}
    results, about = file.result["results"], file.result["machine"]
    workers = min(of.config.data.workers, about["cores"]) if arguments.workers is None else arguments.workers
    opened = real_input.opened(of, [KINDS[kind] for kind in arguments.kinds], workers=workers, page=arguments.real_config,
                               tiny=arguments.tiny)
    with opened if "real" in arguments.input else contextlib.nullcontext() as source:
        if source:
            file.result["real_input"] = source.about
        print(heading(of, about, peaks(arguments), source and source.about, arguments.overrides), flush=True)
        model = workload.model(of)
        to_do = dict.fromkeys(itertools.product(batches, arguments.kinds, arguments.input))
        for batch, kind, way in order(arguments, batches, results):
            to_go = to_go_s(results, [(kind, batch) for batch, kind, _ in to_do] or [(kind, batch)])
            to_do.pop((batch, kind, way), None)
            hint = f" (about {to_go / 60:.0f} minutes to go)" if to_go >= LONG_S else ""
            result = {"kind": kind, "batch": batch, "input": way}
            print(f"  {named(result)}{hint} …", end="", file=sys.stderr, flush=True)
            try:
                feed = source.open(KINDS[kind], batch, model[0].spec.features) if way == "real" else None
                with contextlib.closing(feed) if feed else contextlib.nullcontext() as fed:
                    result = measure(KINDS[kind], of, model, batch, arguments, fed)
                slow = f", {timing.FEWEST} repeats only, for it is slow here" if result["scaled_down"] else ""
                print(f" {short(result['ms']['median'])} ms{slow}", file=sys.stderr)
            except (jax.errors.JaxRuntimeError, MemoryError) as error:  # above all: more than fits into the device's memory
                file.result["ok"] &= batch not in batches  # nobody asked for a larger one
                result["error"] = str(error).splitlines()[0][:300]
                print(f" failed: {result['error']}", file=sys.stderr)
            results.append(result)
            file.save(rows(results))
    saturation = saturated([r for r in results if r["kind"] in arguments.saturate])
    print("\n" + "\n".join([timing.table(rows(results)), *notes(results), *saturation]))
    for result in results:
        if "top_ops" in result:
            print(f"\nwhere the time of {named(result)} goes\n{top_ops.table(result['top_ops'])}")
    file.save(rows(results), finished=True)
    if old is not None:
        print("\n" + comparison(old, file.result))
    return 0 if file.result["ok"] else 1


def read(path: Path, inputs: Sequence[str] = ("synthetic",)) -> dict:
    """An earlier result file, of its rows only those with such input. Raises `UserError` if it is none.

    Rows with real input may have waited for it: who asks what a step takes does not want them.
    """
    result = timing.read_result(path, "step_time")
    return result | {"results": [r for r in result["results"] if input_of(r) in inputs]}


if __name__ == "__main__":
    run_command(main)
