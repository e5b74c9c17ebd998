"""Times a trained run's captions of a whole split, as evaluation writes them: `python -m benchmarks.captions RUN`."""

import argparse
import time
from pathlib import Path

import numpy as np

from benchmarks import timing
from benchmarks.decode import BEAMS, search_name
from benchmarks.timing import Timing, short
from jaxcap import config as configs
from jaxcap import evaluate, features, progress, runs
from jaxcap.data import records
from jaxcap.data.records import Split
from jaxcap.errors import run_command
from jaxcap.parallel import Parallel
from jaxcap.runs import Run


def measure(configuration: configs.Config, run: Run, split: Split, features_NPF: np.ndarray | None, repeats: int) -> dict:
    """A run's captions of all photos of a split, from features where they are given; a JSON object."""
    evaluator = evaluate.Evaluator(configuration, run.captioner, run.vocab, Parallel(configuration.parallel), split)

    def call():
        return evaluator.captions(run.params, run.batch_stats, features_NPF)

    start = time.perf_counter()
    words = float(np.mean([len(run.vocab.tokenize(caption.text)) for caption in call().values()]))
    first_s = time.perf_counter() - start
    timed = timing.time_calls(call, repeats=repeats, calls=1)
    return {"source": "photos" if features_NPF is None else "features", "beam": configuration.search.beam, "photos": len(split), "ms": timed.to_dict(),
            "captions_per_s": 1000 * len(split) / timed.ms, "words": words, "compile_s": first_s - timed.ms / 1000}


def rows(results: list[dict]) -> list[list[str]]:
    """The table of results."""
    lines = [["from", "search", "photos", "captions/s", "ms", "min – max", "words", "compile"]]
    for r in results:
        lines.append([r["source"], search_name(r["beam"]), f"{r['photos']:,}", short(r["captions_per_s"]),
                      short(r["ms"]["median"]), Timing(tuple(r["ms"]["repeats"]), 1).spread, short(r["words"]), short(r["compile_s"], " s")])
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.captions", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Captions a second of a trained run for a whole split, by its own settings but for the beam, from cached\n"
                    "features where there are any. benchmarks.decode times im2txt's size with random weights, which hardly ever\n"
                    "end a caption; a trained captioner stops sooner, and on CPUs the next photo takes the place of one that is done.",
        epilog="examples:\n"
               "  python -m benchmarks.captions runs/flickr8k_lite2-20260101-120000\n"
               "  python -m benchmarks.captions runs/flickr8k_lite2-20260101-120000 --beam 3 --repeats 10 --json captions.json\n")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--split", default="val", help="the split to caption (default: val)")
    parser.add_argument("--beam", nargs="+", type=timing.count, default=list(BEAMS), metavar="K",
                        help=f"beam sizes; 1 is greedy (default: {' '.join(map(str, BEAMS))})")
    parser.add_argument("--repeats", type=timing.count, default=0, metavar="N", help="timings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    arguments = parser.parse_args(argv)

    timing.initialize()
    run = runs.load(arguments.run)
    changed = [configs.change(run.config, {"search.beam": beam}) for beam in arguments.beam]
    split = records.open_split(run.config.data, arguments.split)
    found = features.find(split, run.config, run.params, run.batch_stats)
    file = timing.ResultFile(arguments.json, "captions of a run")
    print(f"{len(split):,} photos of {split.name}: {run.config.encoder.name} + {run.config.decoder.name} {run.config.decoder.hidden}, "
          f"{len(run.vocab):,} words\n{timing.describe(file.result['machine'])}", flush=True)
    progress.silent, results = True, file.result["results"]
    for configuration in changed:
        results.append(measure(configuration, run, split, found, arguments.repeats))
        file.save(rows(results))
    print("\n" + timing.table(rows(results)))
    file.save(rows(results), finished=True)
    return 0


if __name__ == "__main__":
    run_command(main)
