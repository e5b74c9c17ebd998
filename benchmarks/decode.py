"""Times the writing of captions, greedy and with beams, at im2txt's settings: `python -m benchmarks.decode`."""

import argparse
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import timing, workload
from benchmarks.timing import Timing, short
from jaxcap import config as configs
from jaxcap import inference
from jaxcap.errors import UserError, run_command
from jaxcap.parallel import Parallel

BATCHES, TINY_BATCHES = (1, 32, 256), (1, 8)
BEAMS, TINY_BEAMS = (1, 3, 10), (3,)
LATENCY_CALLS, LATENCY_S = 100, 5.0  # calls waited for one by one, unless they take longer together
LONGEST_CALL_S = 10.0  # of a batch that nobody asked for: what will take longer is left out


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of `values` that `percent` % of them do not exceed (nearest rank): p99 of fewer than 100 is the largest."""
    return sorted(values)[max(math.ceil(percent / 100 * len(values)), 1) - 1]


def latencies(call: Callable[[], Any]) -> list[float]:
    """Milliseconds of single calls, from dispatch to result, each waited for before the next one."""

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    one_s = once()
    count = min(max(int(LATENCY_S / one_s), timing.FEWEST), LATENCY_CALLS)
    return [1000 * once() for _ in range(count)]


def measure(source: str, beam: int, batch: int, of: workload.Settings, model: tuple, devices: Parallel,
            arguments: argparse.Namespace) -> dict:
    """Captions of a batch from "photos" or from "features", sent from the host every time; a JSON object."""
    captioner, params, batch_stats = model
    random = np.random.default_rng(0)
    if source == "photos":
        drawn = [workload.photos(random, batch, of.config.data.size) for _ in range(2)]
    else:
        drawn = [workload.features(random, batch, captioner.spec.features) for _ in range(2)]
    seen = itertools.cycle(drawn)
    search = dataclasses.replace(of.config.search, beam=beam)
    decode = inference.decoder(captioner, search, configs.encoder_size(of.config), devices)

    look = devices.replicate(inference.look(captioner, params, batch_stats, None if source == "photos" else drawn))

    def call():
        return decode(params, look, devices.shard(next(seen)))

    start = time.perf_counter()
    words = float((np.asarray(call().tokens_BKT)[:, 0] != 0).sum(1).mean())
    compile_s = time.perf_counter() - start
    waits_ms = latencies(call)
    if percentile(waits_ms, 50) > 1000 * timing.SLOW_STEP_S and not arguments.repeats:
        timed = Timing(tuple(waits_ms), 1)  # a call this long hides its dispatch anyway: it need not be timed twice
    else:
        timed = timing.time_calls(call, repeats=arguments.repeats, calls=arguments.calls_per_repeat)
    return {"source": source, "beam": beam, "batch": batch, "dtype": of.config.decoder.dtype, "ms": timed.to_dict(),
            "captions_per_s": 1000 * batch / timed.ms, "words": words, "compile_s": compile_s,
            "latency_ms": {"p50": percentile(waits_ms, 50), "p99": percentile(waits_ms, 99), "calls": waits_ms}}


def expected_s(results: list[dict], source: str, beam: int, batch: int) -> float:
    """Seconds that a call will take if it grows with the batch, from the largest smaller one measured; 0 if there is none."""
    smaller = [r for r in results if "ms" in r and (r["source"], r["beam"]) == (source, beam) and r["batch"] < batch]
    if not smaller:
        return 0.0
    nearest = max(smaller, key=lambda r: r["batch"])
    return nearest["ms"]["median"] / 1000 * batch / nearest["batch"]


def default_batches(devices: int, tiny: bool) -> list[int]:
    """Batches that can be shared out evenly, rising, so that a small one tells how long a large one will take."""
    return [batch for batch in (TINY_BATCHES if tiny else BATCHES) if batch % devices == 0] or [devices]


def search_name(beam: int) -> str:
    """What a table calls a search."""
    return "greedy" if beam == 1 else f"beam {beam}"


def rows(results: list[dict]) -> list[list[str]]:
    """The table of results."""
    lines = [["from", "search", "batch", "captions/s", "ms a batch", "min – max", "p50, ms", "p99, ms", "words", "compile"]]
    for r in results:
        line = [r["source"], search_name(r["beam"]), str(r["batch"])]
        if "ms" not in r:
            lines.append([*line, "failed" if "error" in r else "left out", *["–"] * (len(lines[0]) - 4)])
            continue
        wait = r["latency_ms"]
        few = "" if len(wait["calls"]) >= 100 else f" (largest of {len(wait['calls'])})"
        lines.append([*line, short(r["captions_per_s"]), short(r["ms"]["median"]),
                      Timing(tuple(r["ms"]["repeats"]), 1).spread, short(wait["p50"]), short(wait["p99"]) + few,
                      short(r["words"]), short(r["compile_s"], " s")])
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Captions a second at the settings of configs/im2txt.py, from photos (CNN and search in one compiled\n"
                    "function) and from features, and how long one call takes. The weights are random, so that hardly any\n"
                    "caption ends early and the longest one allowed is written: a trained captioner stops sooner.\n\n"
                    "  captions/s, ms a batch   calls dispatched one after another, as captioning a folder does\n"
                    f"  p50, p99                 single calls, each waited for: {LATENCY_CALLS} of them, or as many as fit into "
                    f"{LATENCY_S:.0f} s\n"
                    "                           (then the output says of how many p99 is the largest)",
        epilog=f"Without --batch, a batch that would take longer than {LONGEST_CALL_S:.0f} s a call is left out,\n"
               "and the output says so.\n\n"
               "examples:\n"
               "  python -m benchmarks.decode\n"
               "  python -m benchmarks.decode --sources features --beam 3 --batch 1 2 4 8 16 32 64 128 256\n"
               "  python -m benchmarks.decode --dtype bfloat16 --json decode.json\n")
    parser.add_argument("--sources", nargs="+", choices=("photos", "features"), default=["photos", "features"])
    parser.add_argument("--beam", nargs="+", type=timing.count, metavar="K",
                        help=f"beam sizes; 1 is greedy (default: {' '.join(map(str, BEAMS))})")
    parser.add_argument("--batch", nargs="+", type=timing.count, metavar="B",
                        help=f"photos at once (default: {' '.join(map(str, BATCHES))})")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    parser.add_argument("--repeats", type=timing.count, default=0, metavar="N", help="timings")
    parser.add_argument("--calls-per-repeat", type=timing.count, default=0, metavar="N", help="batches a timing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--tiny", action="store_true", help="a miniature that only shows that everything runs")
    arguments = parser.parse_args(argv)
    beams = arguments.beam or (TINY_BEAMS if arguments.tiny else BEAMS)
    if arguments.tiny:
        arguments.repeats, arguments.calls_per_repeat = arguments.repeats or 5, arguments.calls_per_repeat or 1

    timing.initialize()
    of = workload.settings(tiny=arguments.tiny, dtype=arguments.dtype)
    if max(beams) >= of.vocabulary:
        raise UserError(f"--beam {max(beams)} is more than the vocabulary of {of.vocabulary} words has to offer")
    devices = Parallel(of.config.parallel)
    batches = arguments.batch or default_batches(devices.size, arguments.tiny)
    for batch in batches:
        devices.check_batch(batch, "--batch")
    file = timing.ResultFile(arguments.json, f"decode {arguments.dtype}")
    print(f"captions of at most {of.config.search.max_words} words, {of.config.encoder.name} + LSTM "
          f"{of.config.decoder.hidden}, {of.vocabulary:,} words, random weights\n"
          f"{timing.describe(file.result['machine'])}", flush=True)
    captioner, *variables = workload.model(of)
    model = (captioner, *devices.replicate(tuple(variables)))
    results = file.result["results"]
    for batch, source, beam in itertools.product(batches, arguments.sources, beams):
        print(f"  {source}, beam {beam}, batch {batch} …", end="", file=sys.stderr, flush=True)
        result = {"source": source, "beam": beam, "batch": batch}
        expected = expected_s(results, source, beam, batch)
        if not arguments.batch and expected > LONGEST_CALL_S:
            results.append(result | {"left_out": expected})
            print(f" left out: about {short(expected)} s a call here (--batch {batch} times it all the same)", file=sys.stderr)
            continue
        try:
            results.append(measure(source, beam, batch, of, model, devices, arguments))
            print(f" {short(results[-1]['ms']['median'])} ms", file=sys.stderr)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:  # above all: more than fits into the device's memory
            file.result["ok"] = False
            results.append(result | {"error": str(error).splitlines()[0][:300]})
            print(f" failed: {results[-1]['error']}", file=sys.stderr)
        file.save(rows(results))
    print("\n" + timing.table(rows(results)))
    file.save(rows(results), finished=True)
    return 0 if file.result["ok"] else 1


if __name__ == "__main__":
    run_command(main)
