"""Photos a second of everything between a JPEG and the step, and whether a step waits for them: `python -m benchmarks.input`."""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks import feed, step_time, timing, workload
from benchmarks.feed import Rate
from benchmarks.timing import short
from benchmarks.workload import KINDS, Kind, Settings
from jaxcap import config as configs
from jaxcap import vocab
from jaxcap.config import Config
from jaxcap.errors import UserError, run_command
from jaxcap.parallel import Parallel

NARROW = 1.25  # a margin below this, and above its inverse, is called narrow
EATEN = {"cached": ("row numbers", "features"), "frozen": ("row numbers", "photos"), "joint": ("row numbers", "photos"),
         "given": ("row numbers", "photos")}  # step → what can feed it
NEEDED = "decoding photos and reading records"


def verdict(feed_per_s: float, step_per_s: float) -> tuple[str, float]:
    """("compute-bound" or "input-bound", photos/s of the feed over those of the step), where the two run side by side."""
    margin = feed_per_s / step_per_s
    return ("compute-bound" if margin >= 1 else "input-bound"), margin


def verdicts(steps: dict[str, float], fed: Sequence[tuple[str, str, Rate]], batch: int) -> list[dict]:
    """Every step (name → ms) beside everything that could feed it (what, where from, how fast)."""
    found = []
    for name, ms in steps.items():
        eaten = 1000 * batch / ms
        for kind, where, rate in fed:
            if kind in EATEN[name]:
                bound, margin = verdict(rate.per_s, eaten)
                found.append({"step": name, "step_ms": ms, "eats_photos_per_s": eaten, "feed": kind, "from": where,
                              "feed_photos_per_s": rate.per_s, "bound": bound, "margin": margin,
                              "cores_needed": eaten * rate.cpu_ms / 1000})
    return found


def kinds_of(config: Config) -> dict[str, Kind]:
    """The kinds of step that a config's phases take, by the names of `step_time`; of phases alike the last."""
    found = {}
    for number, phase in enumerate(config.phases):
        cached = phase.train == "decoder" and config.augment.cacheable()
        name = "cached" if cached else "frozen" if phase.train == "decoder" else "joint"
        found[name] = Kind(name, phase=number, cached=cached)
    return found


def timed_steps(of: Settings, kinds: dict[str, Kind], repeats: int) -> dict[str, float]:
    """Milliseconds of every kind of step, measured here."""
    model, found = workload.model(of), {}
    for name, kind in kinds.items():
        print(f"  step: {name} …", file=sys.stderr)
        step = workload.Step(kind, of, *model, of.config.batch_size)
        jax.block_until_ready(step())  # compiles it
        found[name] = timing.time_calls(step, repeats=repeats).ms
    return found


def read_steps(path: Path, batch: int) -> tuple[dict[str, float], str]:
    """Milliseconds of the training steps in a file of `benchmarks.step_time --json`, and what device took them."""
    result = step_time.read(path)
    measured = [r for r in result["results"] if "ms" in r and r.get("kind") in EATEN]
    found = {r["kind"]: r["ms"]["median"] for r in measured if r["batch"] == batch}
    if not found:
        there = ", ".join(map(str, sorted({r["batch"] for r in measured})))
        others = f"; it has {there}: say batch_size=…" if there else ""
        raise UserError(f"{path} has no training step of batch {batch}{others}")
    return found, f"{result['machine']['devices']} × {result['machine']['device']}, {result['title']}"


def stage_rows(results: list[dict]) -> list[list[str]]:
    """The table of what was measured."""
    lines = [["stage", "photos/s", "CPU ms a photo", "photos/s a core"]]
    return lines + [[r["stage"], short(r["photos_per_s"]), short(r["cpu_ms_per_photo"]),
                     short(1000 / r["cpu_ms_per_photo"] if r["cpu_ms_per_photo"] else None)] for r in results]


def verdict_rows(found: list[dict]) -> list[list[str]]:
    """The table of what follows."""
    lines = [["step", "ms", "eats photos/s", "fed with", "from", "photos/s", "margin", "verdict", "cores needed"]]
    for v in found:
        narrow = "narrowly " if 1 / NARROW < v["margin"] < NARROW else ""
        lines.append([v["step"], short(v["step_ms"]), short(v["eats_photos_per_s"]), v["feed"], v["from"],
                      short(v["feed_photos_per_s"]), short(v["margin"], " ×"), narrow + v["bound"], short(v["cores_needed"])])
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.input", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Photos a second of every part of the way from a JPEG to the step, each by itself and as training has them\n"
                    "together (grain, then the device), by the clock and by processor time with all threads and workers. Then\n"
                    "the verdict: a step that eats fewer photos than it is fed is compute-bound, any other waits for it.\n\n"
                    "Without a config it draws photos of noise (500 × 375 JPEGs, quality 90) in a temporary directory, prepares\n"
                    "them with jaxcap.prepare and takes the settings of configs/im2txt.py. With one, the records are those of\n"
                    "its prepared data set; JPEGs are drawn all the same. Files come from the system's cache, not from the disk.",
        epilog="The step's time is measured here, or taken from --steps or --step-ms, perhaps of another machine: the verdict\n"
               "then is about that device fed by this machine's cores. On a CPU, step and feed share the cores: `cores needed`\n"
               "is what the feed takes of them at the step's pace. Where grain or a decoder is not installed, only the device\n"
               "and the way to it are timed.\n\n"
               "examples:\n"
               "  python -m benchmarks.input\n"
               "  python -m benchmarks.input --steps steps_float32.json --workers 0 4 16\n"
               "  python -m benchmarks.input configs/flickr8k_lite2.py batch_size=64 --step-ms 2.5\n")
    parser.add_argument("config", nargs="?", help="a page of configs/ whose data set is prepared (default: drawn photos)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="steps to time: cached, frozen, joint, as the config has them "
                        "(default: cached and frozen; with a config all of its own)")
    parser.add_argument("--steps", type=Path, metavar="FILE.json", help="take the steps' times from benchmarks.step_time --json")
    parser.add_argument("--step-ms", type=timing.amount, metavar="MS", help="take this for the time of a step that reads photos")
    parser.add_argument("--workers", nargs="+", type=int, metavar="N", help="grain's worker processes (default: 0, one a core)")
    parser.add_argument("--photos", type=timing.count, default=256, metavar="N", help="photos to draw (default: 256)")
    parser.add_argument("--seconds", type=timing.amount, default=3.0, metavar="S", help="how long a timing goes on (default: 3)")
    parser.add_argument("--repeats", type=timing.count, default=0, metavar="N", help="timings of a step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--tiny", action="store_true", help="a miniature that only shows that everything runs")
    arguments = parser.parse_intermixed_args(argv)
    given = [word for word in (arguments.config, *arguments.overrides) if word is not None]
    arguments.config, arguments.overrides = configs.page_and_settings(given)
    if arguments.tiny:
        arguments.photos, arguments.seconds, arguments.repeats = 24, 0.05, arguments.repeats or 2
        arguments.workers = arguments.workers or [0]
    if min(arguments.workers or [0]) < 0:
        raise UserError("--workers must not be negative")
    if arguments.steps and arguments.step_ms:
        raise UserError("--steps and --step-ms both say how long a step takes; give one of them")
    return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    """The benchmark with options that have been checked; its exit status."""
    timing.initialize()
    of = workload.settings(tiny=arguments.tiny)
    if arguments.config:
        config = configs.load(arguments.config, arguments.overrides)
        kinds = default = kinds_of(config)
    else:
        config = configs.check(configs.override(of.config, arguments.overrides))
        kinds, default = {"cached": KINDS["cached"], **kinds_of(config)}, ("cached", "frozen")
    if unknown := [kind for kind in arguments.kinds or [] if kind not in kinds]:
        raise UserError(f"--kinds {unknown[0]}: the config has {', '.join(kinds)}")
    chosen = {name: kinds[name] for name in arguments.kinds or default if name in kinds}
    devices = Parallel(config.parallel)
    devices.check_batch(config.batch_size)
    steps, whose = ({"given": arguments.step_ms}, "--step-ms") if arguments.step_ms else (None, "measured here")
    if arguments.steps:
        steps, whose = read_steps(arguments.steps, config.batch_size)
    if steps is None and "cached" in chosen and config.decoder.image == "attention":
        raise UserError("a step from cached maps for attention is not timed here; give its time with --step-ms")

    file = timing.ResultFile(arguments.json, "input")
    file.result["settings"] = {"config": dataclasses.asdict(config), "tiny": arguments.tiny, "steps": whose}
    found, fed, words = file.result["results"], [], of.vocabulary
    about = file.result["machine"]
    print(f"photos stored at {config.data.size} px, batch {config.batch_size}\n{timing.describe(about)}", flush=True)

    def note(stage: str, rate: Rate) -> None:
        print(f"  {stage}: {short(rate.per_s)} photos/s", file=sys.stderr)
        found.append({"stage": stage, **rate.to_dict()})
        file.save(stage_rows(found))

    def note_feed(kind: str, where: str, rate: Rate) -> None:
        fed.append((kind, where, rate))
        note(f"pipeline: {kind}, {where}", rate)

    try:
        import cv2  # noqa: F401
        import grain  # noqa: F401
        import simplejpeg  # noqa: F401

        from jaxcap.data import records
    except ImportError as error:
        if arguments.config:
            raise UserError(f"a prepared data set is read with {error.name}, not installed here: pip install jaxcap") from error
        print(f"{error.name} is not installed: {NEEDED} are left out")
        for stage, rate in feed.on_device(config, devices, arguments.seconds):
            note(stage, rate)
        for kind, where, rate in feed.plain_feeds(config, devices, arguments.photos, arguments.seconds):
            note_feed(kind, where, rate)
    else:
        split = records.open_split(config.data, config.data.train) if arguments.config else None
        jpegs = [feed.draw(random, *(feed.TINY_SIDES if arguments.tiny else feed.SIDES)) for random in
                 map(np.random.default_rng, range(arguments.photos))]
        print(f"drawn JPEGs of {np.mean(list(map(len, jpegs))) / 1000:.0f} kB", flush=True)
        with tempfile.TemporaryDirectory() as directory:
            drawn, rate = feed.prepare(jpegs, config.data, Path(directory))
            note("prepare, a thread a core", rate)
            note("decode and resize a JPEG, one thread", feed.decoding(jpegs, config.data.size, arguments.seconds))
            split = split or records.open_split(drawn, drawn.train)
            note("read records, one thread", feed.reading(split, config.batch_size, arguments.seconds))
            for stage, rate in feed.on_device(config, devices, arguments.seconds):
                note(stage, rate)
            limits = dataclasses.asdict(config.vocabulary) if arguments.config else {"min_count": 1}
            vocabulary = vocab.build((text for captions in split.captions for text in captions), **limits)
            words = len(vocabulary) if arguments.config else words
            workers = arguments.workers or [0, about["cores"]]
            for kind, where, rate in feed.feeds(config, devices, split, vocabulary, workers, arguments.seconds):
                note_feed(kind, where, rate)
    print("\n" + timing.table(stage_rows(found)), flush=True)
    if steps is None:
        tokens = config.data.max_words + 1 if arguments.config else of.tokens
        steps = timed_steps(Settings(config, words, tokens), chosen, arguments.repeats)
    file.result["verdicts"] = verdicts(steps, fed, config.batch_size)
    print(f"\nsteps of {config.batch_size} photos: {whose}\n{timing.table(verdict_rows(file.result['verdicts']))}")
    file.save(verdict_rows(file.result["verdicts"]), finished=True)
    return 0


if __name__ == "__main__":
    run_command(main)
