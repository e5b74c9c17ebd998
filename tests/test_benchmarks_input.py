"""The timing of input: what is counted, what follows from it, and tiny runs. No speed is asserted."""

import json
import multiprocessing
import sys

import jax
import numpy as np
import pytest

from benchmarks import feed, timing, workload
from benchmarks import input as inputs
from benchmarks.feed import Rate
from jaxcap import config as configs
from jaxcap.data import photos
from jaxcap.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_verdict():
    assert inputs.verdict(200, 100) == ("compute-bound", 2.0)
    assert inputs.verdict(50, 100) == ("input-bound", 0.5)
    assert inputs.verdict(100, 100)[0] == "compute-bound"


def test_every_step_is_set_beside_what_can_feed_it():
    fed = [("row numbers", "resident data", Rate(1000, 1.0, 0.0)), ("features", "host memory", Rate(1000, 2.0, 1.0)),
           ("photos", "records, 0 workers", Rate(100, 1.0, 0.5)), ("photos", "records, 4 workers", Rate(1000, 2.0, 8.0))]
    found = inputs.verdicts({"cached": 100.0, "joint": 125.0, "given": 1.0}, fed, 32)
    by = {(v["step"], v["from"]): v for v in found}
    assert set(by) == {("cached", "resident data"), ("cached", "host memory"),
                       *((step, where) for step in ("joint", "given") for where in
                         ("resident data", "records, 0 workers", "records, 4 workers"))}
    assert by["joint", "resident data"]["eats_photos_per_s"] == 256 and by["cached", "host memory"]["eats_photos_per_s"] == 320
    assert by["joint", "records, 4 workers"]["bound"] == "compute-bound"
    slow = by["joint", "records, 0 workers"]
    assert (slow["bound"], slow["margin"]) == ("input-bound", 100 / 256)
    assert by["joint", "records, 4 workers"]["cores_needed"] == pytest.approx(256 * 8 / 1000)
    assert "narrowly compute-bound" not in str(inputs.verdict_rows(found))
    narrow = by["joint", "resident data"] | {"margin": 0.9, "bound": "input-bound"}
    assert "narrowly input-bound" in str(inputs.verdict_rows([narrow]))


def test_rates(monkeypatch):
    assert Rate(200, 4.0, 1.0).per_s == 50 and Rate(200, 4.0, 1.0).cpu_ms == 5
    calls = []
    found = feed.rate(lambda: calls.append(1), 32, seconds=0.0)
    assert found.photos == 32 * feed.FEWEST_CALLS and len(calls) == 2 + feed.FEWEST_CALLS  # two warm up


def test_workers_count_while_they_work():
    worker = multiprocessing.get_context("spawn").Process(target=sum, args=(range(1 << 60),), daemon=True)
    before, own = feed.cpu_s(), feed.time.process_time()
    worker.start()
    try:
        deadline = feed.time.monotonic() + 20
        while feed.cpu_s() - before < 0.3 + feed.time.process_time() - own:
            assert feed.time.monotonic() < deadline, "the worker's time is not seen"
            feed.time.sleep(0.05)
    finally:
        worker.kill()
        worker.join()


def test_drawn_photos_are_jpegs_as_large_as_photos():
    jpeg = feed.draw(np.random.default_rng(0), *feed.SIDES)
    assert photos.decode(jpeg).shape == (375, 500, 3) and 40_000 < len(jpeg) < 200_000
    assert feed.draw(np.random.default_rng(0), *feed.SIDES) == jpeg != feed.draw(np.random.default_rng(1), *feed.SIDES)


def test_kinds_of_steps():
    kinds = inputs.kinds_of(workload.settings().config)
    assert {name: (kind.phase, kind.cached) for name, kind in kinds.items()} == {"frozen": (0, False), "joint": (1, False)}
    still = configs.load(str(workload.IM2TXT), ["augment.crop=false", "augment.flip=false", "augment.color=false"])
    kinds = inputs.kinds_of(still)
    assert {name: (kind.phase, kind.cached) for name, kind in kinds.items()} == {"cached": (0, True), "joint": (1, False)}


def test_a_step_is_compiled_before_it_is_timed(monkeypatch):
    taken = []

    def step(*_):
        return lambda: taken.append("a step")

    monkeypatch.setattr(workload, "Step", step)
    monkeypatch.setattr(timing, "time_calls", lambda call, repeats: taken.append("timed") or timing.Timing((2.0,), 1))
    of = workload.settings(tiny=True)
    assert inputs.timed_steps(of, {"cached": workload.KINDS["cached"]}, 1) == {"cached": 2.0} and taken == ["a step", "timed"]


def test_a_tiny_run(tmp_path, capsys):
    path = tmp_path / "input.json"
    assert inputs.main(["--tiny", "--kinds", "cached", "--json", str(path)]) == 0
    result = json.loads(path.read_text("utf-8"))
    stages = {r["stage"]: r for r in result["results"]}
    assert list(stages) == ["prepare, a thread a core", "decode and resize a JPEG, one thread", "read records, one thread",
                            "send to the device", "distort on the device", "pipeline: row numbers, resident data",
                            "pipeline: features, host memory", "pipeline: photos, records, 0 workers"]
    assert stages["prepare, a thread a core"]["photos"] == 24
    assert all(r["photos_per_s"] == r["photos"] / r["wall_s"] and r["cpu_s"] > 0 for r in stages.values())
    assert [(v["step"], v["feed"]) for v in result["verdicts"]] == [("cached", "row numbers"), ("cached", "features")]
    said = capsys.readouterr().out
    assert "bound" in said and "measured here" in said


def test_a_machine_without_grain_still_times_its_device(tmp_path, monkeypatch, capsys):
    steps = tmp_path / "steps.json"
    file = timing.ResultFile(steps, "step_time float32")
    file.result |= {"settings": dict.fromkeys(("config", "vocabulary", "tokens", "tiny")), "results": [
        {"kind": "frozen", "batch": 8, "ms": {"median": 1e-6}}, {"kind": "eval", "batch": 8, "ms": {"median": 1.0}},
        {"kind": "joint", "batch": 32, "ms": {"median": 1.0}}]}
    file.result["machine"] |= {"device": "a card", "devices": 1}
    file.save([["step"]], finished=True)
    monkeypatch.setitem(sys.modules, "grain", None)
    path = tmp_path / "input.json"
    assert inputs.main(["--tiny", "--steps", str(steps), "--json", str(path)]) == 0
    result = json.loads(path.read_text("utf-8"))
    assert [(v["step"], v["feed"], v["bound"]) for v in result["verdicts"]] == \
        [("frozen", "row numbers", "input-bound"), ("frozen", "photos", "input-bound")]  # no feed serves 8 photos a nanosecond
    said = capsys.readouterr().out
    assert "grain is not installed: decoding photos and reading records are left out" in said and "1 × a card" in said
    with pytest.raises(UserError, match="has no training step of batch 16; it has 8, 32"):
        inputs.main(["--tiny", "batch_size=16", "--steps", str(steps)])


def test_wrong_options_are_refused(tmp_path):
    for options, message in ((["--workers", "-1"], "--workers must not be negative"), (["--steps", "x.json", "--step-ms", "1"], "give one of them"),
                             (["--tiny", "--kinds", "eval"], "--kinds eval: the config has cached, frozen, joint"),
                             (["--tiny", "batch_size=12"], "cannot be divided by the 8 devices"),
                             ([str(workload.IM2TXT), f"data.dir={tmp_path}", "--step-ms", "1"], "is not prepared at size 346")):
        with pytest.raises(UserError, match=message):
            inputs.main(options)
