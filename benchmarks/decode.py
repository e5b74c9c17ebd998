"""Times the writing of captions, greedy and beam 3, at im2txt's settings: `python -m benchmarks.decode`."""

import argparse
import dataclasses
import itertools
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import timing, workload
from benchmarks.timing import short
from jaxcap import config as configs
from jaxcap import inference
from jaxcap.errors import UserError, run_command
from jaxcap.parallel import Parallel


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
    start = time.perf_counter()
    words = float((np.asarray(decode(params, batch_stats, devices.shard(next(seen))).tokens_BKT)[:, 0] != 0).sum(1).mean())
    compile_s = time.perf_counter() - start
    timed = timing.time_calls(lambda: decode(params, batch_stats, devices.shard(next(seen))),
                              repeats=arguments.repeats, calls=arguments.calls_per_repeat)
    return {"source": source, "beam": beam, "batch": batch, "dtype": of.config.decoder.dtype, "ms": timed.to_dict(),
            "captions_per_s": 1000 * batch / timed.ms, "words": words, "compile_s": compile_s}


def rows(results: list[dict]) -> list[list[str]]:
    lines = [["from", "search", "batch", "captions/s", "ms a batch", "min – max", "words", "compile"]]
    for r in results:
        lines.append([r["source"], "greedy" if r["beam"] == 1 else f"beam {r['beam']}", str(r["batch"]),
                      short(r["captions_per_s"]), short(r["ms"]["median"]),
                      timing.Timing(tuple(r["ms"]["repeats"]), 1).spread, short(r["words"]), short(r["compile_s"], " s")])
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode",
        description="Captions a second at the settings of configs/im2txt.py, from photos (CNN and search in one compiled "
                    "function) and from features. The weights are random, so that hardly any caption ends early and the "
                    "longest one allowed is written: a trained captioner stops sooner.")
    parser.add_argument("--sources", nargs="+", choices=("photos", "features"), default=["photos", "features"])
    parser.add_argument("--beam", nargs="+", type=int, default=[3, 1], metavar="K", help="beam sizes; 1 is greedy")
    parser.add_argument("--batch", nargs="+", type=int, default=[256, 32, 1], metavar="B", help="photos at once")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    parser.add_argument("--repeats", type=int, default=0, metavar="N", help="timings")
    parser.add_argument("--calls-per-repeat", type=int, default=0, metavar="N", help="batches a timing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--tiny", action="store_true", help="a miniature that only shows that everything runs")
    arguments = parser.parse_args(argv)
    if min(arguments.batch) < 1 or min(arguments.beam) < 1:
        raise UserError("--batch and --beam must be at least 1")
    if arguments.tiny:
        arguments.repeats, arguments.calls_per_repeat = arguments.repeats or 5, arguments.calls_per_repeat or 1

    timing.initialize()
    of = workload.settings(tiny=arguments.tiny, dtype=arguments.dtype)
    devices = Parallel(of.config.parallel)
    for batch in arguments.batch:
        devices.check_batch(batch, "--batch")
    file = timing.ResultFile(arguments.json, f"decode {arguments.dtype}")
    print(f"captions of at most {of.config.search.max_words} words, {of.config.encoder.name} + LSTM "
          f"{of.config.decoder.hidden}, {of.vocabulary:,} words, random weights\n"
          f"{timing.describe(file.result['machine'])}", flush=True)
    captioner, *variables = workload.model(of)
    model = (captioner, *devices.replicate(tuple(variables)))
    results = file.result["results"]
    for batch, source, beam in itertools.product(arguments.batch, arguments.sources, arguments.beam):
        print(f"  {source}, beam {beam}, batch {batch} …", file=sys.stderr)
        results.append(measure(source, beam, batch, of, model, devices, arguments))
        file.save(rows(results))
    print("\n" + timing.table(rows(results)))
    file.save(rows(results), finished=True)
    return 0


if __name__ == "__main__":
    run_command(main)
