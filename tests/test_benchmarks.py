"""The benchmarks: that they run at tiny sizes, say what they mean, and notice what is wrong. No speed is asserted."""

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import rnn

from benchmarks import (checkpoints, compiled, convolutions, correctness, encode, projection, real_input, recurrence, step_report, step_time,
                        summary, timing, top_ops, variants, workload)
from benchmarks import input as inputs
from benchmarks.peers import __main__ as peers
from benchmarks.peers import forms
from benchmarks.workload import KINDS
from jaxcap import captioner as captioners
from jaxcap import encoders
from jaxcap.data import records
from jaxcap.encoders import dense, few
from jaxcap.errors import UserError
from jaxcap.vocab import BOS, EOS, PAD

REPOSITORY = Path(__file__).parents[1]


class Noted(real_input.Feed):
    """Notes what is read, and hands every batch out with the captions of the first: losses then tell photos apart."""

    made = []

    def __init__(self, iterator, workers):
        super().__init__(iterator, workers)
        self.batches, self.closed = [], 0
        self.made.append(self)

    def __next__(self):
        self.batches.append(super().__next__())
        return self.batches[-1]._replace(tokens_BT1=self.batches[0].tokens_BT1)

    def close(self):
        self.closed += 1
        super().close()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What a tiny `step_time` wrote, on eight devices; `Noted.made` are the feeds of its rows with real input."""
    path = tmp_path_factory.mktemp("step_time") / "tiny.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_input, "Feed", Noted)
        status = step_time.main(["--tiny", "--kinds", "cached", "eval", "--input", "synthetic", "real", "--peak-tflops", "1",
                                 "--json", str(path)])
    assert status == 0 and not path.with_name("tiny.json.partial").exists()
    return path


def test_step_time_of_five_captions_a_look(tmp_path, capsys):
    path = tmp_path / "five.json"
    assert step_time.main(["--tiny", "--kinds", "frozen", "frozen_5", "--input", "synthetic", "real", "--json", str(path)]) == 0
    one, _, five, real = json.loads(path.read_text("utf-8"))["results"]
    assert (one["captions_per_photo"], five["captions_per_photo"], real["captions_per_photo"]) == (1, 5, 5)
    assert one["gflop"] < five["gflop"] < 5 * one["gflop"]  # the decoder's part is five times as much, the CNN's is the same
    assert math.isclose(five["gflop"], real["gflop"], rel_tol=0.01)
    assert "share one look" in capsys.readouterr().out


def test_a_training_step_is_set_beside_2016_and_evaluation_is_not():
    of = workload.settings(tiny=True)
    arguments = argparse.Namespace(tiny=False, repeats=1, steps_per_repeat=1, peak_tflops=None, peak_gb_per_s=None, profile=None)
    trained, evaluated = (step_time.measure(KINDS[kind], of, workload.model(of), 8, arguments) for kind in ("cached", "eval"))
    # 0.7 s for 32 photos is 0.175 s for 8; evaluation is no training step and has nothing beside it.
    assert trained["times_faster"] == pytest.approx({who: ms / trained["ms"]["median"] for who, ms in (
        ("TensorFlow 2016", 175), ("DistBelief 2016", 750))})
    assert evaluated["times_faster"] == {}


def test_step_time_of_other_settings(tmp_path, capsys):
    path = tmp_path / "unrolled.json"
    arguments = ["--tiny", "--repeats", "1", "--steps-per-repeat", "1", "--kinds", "cached", "--json", str(path)]
    gflop = []
    for overrides in ([], ["decoder.unroll=2"], ["decoder.unroll=8"], ["decoder.hidden=48"]):  # and what 0 means on accelerators: test_accelerators.py
        assert step_time.main([*overrides, *arguments]) == 0
        assert ("NOT im2txt's settings: " + " ".join(overrides) in capsys.readouterr().out) == bool(overrides)
        (result,) = json.loads(path.read_text("utf-8"))["results"]
        gflop.append(result["gflop"])
    assert gflop[1] == pytest.approx(gflop[0], rel=0.05) and gflop[2] == pytest.approx(gflop[0], rel=0.05)  # but for loops' counters
    assert gflop[3] > 1.3 * gflop[0]
    with pytest.raises(UserError, match="decoder.unroll must be a finite number that is not negative"):
        step_time.main(["decoder.unroll=-1", *arguments])
    with pytest.raises(UserError, match="did you mean 'decoder.unroll'"):
        step_time.main(["decoder.unrol=2", *arguments])


def test_step_time_writes_every_number(measured):
    result = json.loads(measured.read_text("utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result["ok"] and result["settings"]["tokens"] == 5 and result["machine"]["devices"] == 8
    for r in result["results"]:
        assert len(r["ms"]["repeats"]) >= 5 and r["ms"]["min"] <= r["ms"]["median"] <= r["ms"]["max"]
        assert math.isclose(r["photos_per_s_per_device"], 8 * 1000 / r["ms"]["median"] / 8)
        assert math.isclose(r["share_of_peak"], r["gflop"] / 1000 / (r["ms"]["median"] / 1000))
        numbers = [*r["ms"]["repeats"], *r["loss"], *(r[k] for k in ("gflop", "gb", "program_gib", "compile_s"))]
        assert all(math.isfinite(n) and n > 0 for n in numbers)
    cached, _, evaluated, _ = result["results"]
    assert [(r["kind"], r["skips_cnn"], r["input"]) for r in result["results"]] == [
        ("cached", True, "synthetic"), ("cached", True, "real"), ("eval", False, "synthetic"), ("eval", False, "real")]
    assert "24 photos (drawn JPEGs of 60 × 45" in result["real_input"]["photos"]
    assert [line[:3] for line in result["table"][1:3]] == [["cached *", "8", "synthetic"], ["cached *", "8", "real"]]
    # Nobody timed a miniature in 2016.
    assert cached["times_faster"] == {} and result["table"][1][-2:] == ["–", "–"]
    assert evaluated["gflop"] > cached["gflop"]  # the one that runs the CNN


def test_real_input_is_read_anew_for_every_step(measured):
    cached, evaluated = Noted.made
    real = json.loads(measured.read_text("utf-8"))["results"][3]
    # Nothing but the photos differs between the first evaluation and the last.
    assert real["loss"][0] != real["loss"][1]
    for fed, field, shape in ((cached, "features_BPF", (8, 1, 320)), (evaluated, "image_BHWC", (8, 32, 32, 3))):
        assert fed.closed == 1 and fed.workers == 0
        seen = [getattr(batch, field) for batch in fed.batches]
        assert len(seen) == 1 + 1 + 1 + 2 + 5 * 2 + 1  # ready, first loss, warm-up twice, repeats, last loss
        assert all(array.shape == shape for array in seen)
        assert not any(np.array_equal(a, b) for a, b in zip(seen, seen[1:]))
        tokens_NT = np.concatenate([batch.tokens_BT1 for batch in fed.batches])
        assert tokens_NT.shape[1] == 5 + 1 and PAD not in tokens_NT  # as many as with synthetic input
        assert (tokens_NT[:, 0] == BOS).all() and (tokens_NT[:, -1] == EOS).all() and len(np.unique(tokens_NT)) > 40
        assert all(batch.index_B is None for batch in fed.batches)


def test_real_input_may_be_a_prepared_data_set(tmp_path):
    of = workload.settings(tiny=True)
    data, _ = real_input.drawn(of.config.data, tmp_path, tiny=True)
    page = tmp_path / "page.py"
    page.write_text("from dataclasses import replace\n\nfrom jaxcap.config import SHAPES, Data\n\n"
                    f"CONFIG = replace(SHAPES, data=Data(name='folder', label='drawn', dir={data.dir!r}, size=24))\n", "utf-8")
    with real_input.opened(of, [KINDS["eval"]], workers=0, page=str(page)) as source:
        read = next(source.open(KINDS["eval"], 8, 0)).image_BHWC
    there = records.open_split(data, "train").images(range(24))
    assert all((photo == there).all(axis=(1, 2, 3)).any() for photo in read)
    page.write_text(page.read_text("utf-8").replace("drawn", "another"), "utf-8")
    with pytest.raises(UserError, match="not prepared at size 32"):
        step_time.main(["--tiny", "--input", "real", "--real-config", str(page)])


@pytest.mark.parametrize("name", ["cv2", "simplejpeg"])
def test_real_input_names_the_package_that_is_missing(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"--input real needs {name}, which is not installed here"):
        step_time.main(["--tiny", "--input", "synthetic", "real"])


def test_a_step_that_fails_leaves_no_reader_behind(monkeypatch, tmp_path):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no more memory")

    monkeypatch.setattr(step_time, "measure", fail)
    monkeypatch.setattr(workload, "model", lambda of: (SimpleNamespace(spec=SimpleNamespace(features=64)), {}, {}))
    monkeypatch.setattr(real_input, "Feed", Noted)
    before = len(Noted.made)
    assert step_time.main(["--tiny", "--kinds", "eval", "--input", "real", "--json", str(tmp_path / "a.json")]) == 1
    (fed,) = Noted.made[before:]
    result = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert fed.closed == 1 and not result["ok"]
    assert result["results"] == [{"kind": "eval", "batch": 8, "input": "real", "error": "RESOURCE_EXHAUSTED: no more memory"}]


def test_options_about_input_that_cannot_be():
    for options in (["--workers", "2"], ["--real-config", "configs/im2txt.py"]):
        with pytest.raises(UserError, match="add --input real"):
            step_time.main(options)
    with pytest.raises(UserError, match="--workers must not be negative"):
        step_time.main(["--input", "real", "--workers", "-1"])


def test_what_is_still_to_do_is_estimated_where_steps_are_slow():
    def row(kind, batch, step_ms, took_s, calls=1):
        return {"kind": kind, "batch": batch, "ms": {"median": step_ms, "calls_per_repeat": calls}, "took_s": took_s}

    failed = {"kind": "frozen", "batch": 32, "error": "no memory"}
    slow = [row("cached", 32, 900.0, 9.0, 2), row("eval", 32, 2500.0, 30.0), failed]
    assert step_report.to_go_s(slow[:1], [("eval", 32), ("joint", 32)]) == 0  # the decoder's time says nothing of the CNN's
    assert step_report.to_go_s(slow, [("frozen", 32), ("joint", 32)]) == 30 + 4.5 * 30
    assert step_report.to_go_s([*slow, row("joint", 32, 12_000.0, 100.0)], [("joint", 64), ("cached", 64)]) == 200 + 18
    assert step_report.to_go_s([row("eval", 32, 5.0, 12.0, 100)], [("joint", 32)]) == 0  # quick steps: every row takes as long


def test_notes_say_what_was_left_out_and_what_real_input_costs():
    def row(way, median, **more):
        times = {"median": median, "min": median - 5, "max": median + 5}
        return {"kind": "frozen", "batch": 32, "input": way, "ms": times} | more

    assert step_report.notes([row("synthetic", 100.0)]) == []
    assert step_report.notes([row("synthetic", 100.0), row("real", 125.0)]) == \
        ["real input instead of synthetic, frozen, batch 32: +25.0 %"]
    (slow, cost) = step_report.notes([row("synthetic", 100.0, scaled_down=True), row("real", 101.0)])
    assert slow.startswith("5 repeats instead of 10") and slow.endswith("frozen, batch 32, synthetic")
    assert cost.endswith("+1.0 %, within the spread")


def test_saturation_is_looked_for_as_long_as_it_pays():
    def row(batch: int, rate: float, gib: float | None = 1.0, kind: str = "joint") -> dict:
        return {"kind": kind, "batch": batch, "input": "synthetic", "ms": {}, "photos_per_s_per_device": rate, "program_gib": gib}

    arguments = SimpleNamespace(kinds=["joint"], input=["synthetic"], saturate=["joint"], tiny=False)

    def batches(rate, most_gib: float = 0.0, fails: int = 0) -> list[int]:
        """What is measured where a batch gives `rate` photos a second and plans `most_gib` times itself, and one fails."""
        results = []
        for batch, kind, _ in step_time.order(arguments, [8, 32], results):
            failed = {"kind": kind, "batch": batch, "input": "synthetic", "error": "out of memory"}
            results.append(failed if batch == fails else row(batch, rate(batch), most_gib * batch))
        return [r["batch"] for r in results]

    assert batches(lambda batch: min(batch, 100)) == [8, 32, 64, 128, 256]  # 256 is no faster than 128, and that ends it
    assert batches(lambda batch: 100) == [8, 32, 64]
    assert batches(lambda batch: batch, most_gib=1e9) == [8, 32]  # twice that would not fit
    assert batches(lambda batch: batch, fails=128) == [8, 32, 64, 128]
    assert batches(lambda batch: batch)[-1] == 32 * step_time.MOST_TIMES
    arguments.saturate = []
    assert batches(lambda batch: batch) == [8, 32]

    assert step_report.saturated([row(32, 90.0), row(64, 98.0), row(128, 100.0), row(32, 5.0, kind="cached")]) == [
        "joint, synthetic: saturated from batch 64, 98.0 photos/s/device; up to batch 128 at most 100",
        "cached, synthetic: still growing at batch 32, 5.00 photos/s/device, the largest that was tried or had memory"]


def test_step_time_looks_for_the_batch_that_saturates(tmp_path, capsys):
    with pytest.raises(UserError, match="--saturate joint: this kind is not timed"):
        step_time.main(["--tiny", "--kinds", "cached", "--saturate", "joint"])
    assert step_time.main(["--tiny", "--kinds", "cached", "--batch", "8", "--saturate", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [r["batch"] for r in found] in ([8, 16], [8, 16, 32])
    assert re.search(r"cached, synthetic: (saturated from|still growing at) batch \d+, ", capsys.readouterr().out)


def test_compare(measured, tmp_path):
    old = json.loads(measured.read_text("utf-8"))
    new = json.loads(measured.read_text("utf-8"))
    text = step_time.comparison(old, new)
    assert text.count("within the spread") == 4 and "beware" not in text
    del old["settings"]["config"]["decoder"]["unroll"]  # a setting that came later had its default
    assert "beware" not in step_time.comparison(old, new)
    config = old["settings"]["config"]
    other = old | {"settings": old["settings"] | {"tokens": 6, "config": config | {"batch_size": 16}}}
    assert re.search(r"beware: the settings differ, batch_size: 16 → 8\n  beware: the settings differ, tokens: 6 → 5", step_time.comparison(other, new))
    later = old | {"settings": old["settings"] | {"config": config | {"no_such": 1}}}
    assert "another version's: there is no setting 'no_such'" in step_time.comparison(later, new)
    # A row stands beside one with the same input; files from before there was a choice have synthetic rows only.
    earlier = old | {"results": [{k: v for k, v in r.items() if k != "input"} for r in old["results"] if r["input"] != "real"]}
    lines = step_time.comparison(earlier, new).splitlines()[3:]
    assert [line.split()[:3] for line in lines] == [["cached", "8", "synthetic"], ["eval", "8", "synthetic"]]
    only_real = new | {"results": [r for r in new["results"] if r["input"] == "real"]}
    assert "nothing to compare" in step_time.comparison(earlier, only_real)
    assert "the real input differs" in step_time.comparison(old, new | {"real_input": {"photos": "others"}})
    # Who asks a file what a step takes gets synthetic rows.
    assert [r["input"] for r in step_time.read(measured)["results"]] == ["synthetic"] * 2
    assert step_time.read(measured, step_time.INPUTS) == new
    for r in old["results"]:
        r["ms"] = {name: value / 1000 for name, value in r["ms"].items() if name in ("median", "min", "max")}
    old["machine"]["device"] = "another card"
    text = step_time.comparison(old, new)
    assert "+99900.0 %" in text and "within" not in text and "device differs: another card" in text
    with pytest.raises(UserError, match="--batch=12 cannot be divided by the 8 devices"):
        step_time.main(["--batch", "12"])


@pytest.mark.parametrize("changes", [{"title": "peers torch float32"}, {"title": None}, {"machine": {}}, {"settings": {"config": {}}},
                                     {"settings": None}])
def test_what_another_benchmark_wrote_is_refused_before_anything_is_measured(measured, tmp_path, changes):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(json.loads(measured.read_text("utf-8")) | changes), "utf-8")
    for main, arguments in ((step_time.main, ["--tiny", "--compare", str(path)]), (inputs.main, ["--tiny", "--steps", str(path)]),
                            (projection.main, [str(path)])):
        with pytest.raises(UserError, match="other.json was not written by benchmarks.step_time --json"):
            main(arguments)
    with pytest.raises(UserError, match="other.json was not written by benchmarks.compiled --json"):
        compiled.main(["--device", "cpu", "--tiny", "--compare", str(path)])


@pytest.mark.parametrize(("module", "options"), [(step_time, []), (compiled, ["--device", "cpu"])], ids=["step_time", "compiled"])
def test_a_comparison_that_fails_leaves_what_was_measured(tmp_path, monkeypatch, module, options):
    monkeypatch.setattr(timing, "read_result", lambda *_: {"results": [], "device": {"name": "cpu"}})
    monkeypatch.setattr(module, "comparison", lambda *_: 1 / 0)
    path = tmp_path / "new.json"
    with pytest.raises(ZeroDivisionError):
        module.main(["--tiny", "--kinds", "cached", *options, "--json", str(path), "--compare", "old.json"])
    assert json.loads(path.read_text("utf-8"))["results"]


def test_pmap_runs_the_same_step(measured, tmp_path):
    path = tmp_path / "pmap.json"
    assert step_time.main(["--tiny", "--kinds", "cached", "--parallel", "pmap", "--json", str(path)]) == 0
    (ours,), (theirs, *_) = (json.loads(p.read_text("utf-8"))["results"] for p in (path, measured))
    assert math.isclose(ours["loss"][0], theirs["loss"][0], rel_tol=1e-5) and ours["gflop"] == theirs["gflop"]


@pytest.mark.parametrize("B", [32, 128], ids=["loss at once", "loss in chunks"])
def test_arithmetic_is_counted_in_full(B):
    """XLA's count, loops included, is the sum of the decoder's matrix products at im2txt's sizes and little else."""
    of = workload.settings()
    captioner = captioners.build(of.config, of.vocabulary)
    key = jax.random.PRNGKey(0)
    decoder = captioner.decoder.init(key, jnp.ones((1, 1, 2048)), jnp.ones((1, 1), jnp.int32))["params"]
    step = workload.Step(KINDS["cached"], of, captioner, {"encoder": {}, "decoder": decoder}, {}, B, devices=jax.devices()[:1])
    traced = step.trace()
    lowered, looped = traced.lower(), step_time.in_loops(traced.jaxpr)
    counted = step_time.costs(lowered, None, looped)["gflop"]
    T, E, D, V, F = 20, 512, 512, 12_000, 2048
    forward = B * T * D * V + B * (T + 1) * E * 4 * D + B * T * D * 4 * D + B * F * E
    backward = 2 * forward - B * F * E  # the frozen features need no gradient
    assert counted == pytest.approx(2 * (forward + backward) / 1e9, rel=0.02)
    if B == 32:  # where XLA counts only compiled programs, products are counted in their text
        uncounted = SimpleNamespace(cost_analysis=lambda: None)
        assert step_time.costs(uncounted, None, looped)["gflop"] is None
        counted = step_time.costs(uncounted, lowered.compile(), looped, together=2)["gflop"]
        assert counted == pytest.approx((forward + backward) / 1e9, rel=0.02)


def test_arithmetic_of_all_rounds_of_loops_is_counted():
    def twice(x, kernel):  # within another loop, and half of it under a condition
        return jax.lax.scan(lambda x, _: (jax.lax.cond(x[0, 0] > 0, lambda x: x @ kernel, lambda x: x, x), None), x @ kernel, length=5, unroll=2)[0]

    jaxpr = jax.make_jaxpr(lambda x, kernel: jax.lax.map(lambda x: twice(x, kernel), x))(jnp.ones((3, 4, 8)), jnp.ones((8, 8)))
    one = 2 * 4 * 8 * 8  # XLA counts one of three, in it the product before the loop, two in its body and one behind it
    assert step_time.in_loops(jaxpr) == (3 * (1 + 5) - (1 + 2 + 1)) * one
    jaxpr = jax.make_jaxpr(lambda x: jax.lax.map(lambda x: dense.ordinary(x, jnp.ones((3, 3, 4, 6)), 1, "SAME", 2), x))(jnp.ones((5, 2, 7, 7, 8)))
    assert step_time.in_loops(jaxpr) == 4 * 2 * (2 * 7 * 7 * 6) * (3 * 3 * 4)


def test_arithmetic_of_an_encoder_that_sees_few_photos_at_a_time_is_counted_in_full(monkeypatch):
    of, gflop = workload.settings(tiny=True), []
    arguments = argparse.Namespace(tiny=True, repeats=1, steps_per_repeat=1, peak_tflops=None, peak_gb_per_s=None, profile=None)
    for cache in (1 << 30, 4 * 24 * 24 * 3):  # of a core: for the whole batch, or for a photo
        monkeypatch.setattr(few, "CACHE", cache)
        result = step_time.measure(KINDS["eval"], of, workload.model(of), 64, arguments)
        assert result["gb_is_lower_bound"]
        gflop.append(result["gflop"])
    assert gflop[1] == pytest.approx(gflop[0], rel=0.01)


def test_time_calls_counts_and_warms_up():
    calls = []
    timed = timing.time_calls(lambda: calls.append(1) or jnp.ones(()), repeats=6, calls=4)
    assert len(timed.repeats_ms) == 6 and timed.calls == 4 and len(calls) == 1 + 2 + 6 * 4
    assert timing.Timing((3.0, 1.0, 2.0), 1).ms == 2.0


@pytest.mark.parametrize(("command", "option", "value"), [
    ("step_time", "--batch", "0"), ("step_time", "--repeats", "-1"), ("step_time", "--peak-tflops", "nan"), ("decode", "--batch", "0"),
    ("decode", "--beam", "-3"), ("input", "--step-ms", "0"), ("input", "--seconds", "inf"), ("scaling", "--devices", "0"),
    ("projection", "--gb-per-s", "0"), ("peers.__main__", "--turns", "0"), ("peers.__main__", "--turn-s", "nan"), ("encode", "--size", "0"), ("metrics", "--photos", "0"),
    ("training", "--steps", "0"),
])
def test_numbers_that_measure_nothing_are_refused(command, option, value, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{command}").main([option, value])
    assert ended.value.code == 2
    assert re.search(f"error: argument {option}: must be (at least 1|a finite number above 0), not {value}", capsys.readouterr().err)


def test_a_result_file_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="is a directory; name a file"):
        timing.ResultFile(tmp_path, "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--json .*file cannot be written to: "):  # before anything is measured
        timing.ResultFile(tmp_path / "file" / "a.json", "x")
    file = timing.ResultFile(tmp_path / "gone" / "a.json", "x")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="--json .*a.json cannot be written"):
        file.save([["a"]])


def test_the_summary_goes_on_after_a_file_that_it_cannot_read(measured, tmp_path, capsys):
    written = measured.read_text("utf-8")
    for name, text in {"b.json": written, "a.json": written[:100], "c.json": "[]", "d.json.partial": written}.items():
        (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / "e.json").write_text(json.dumps(json.loads(written) | {"table": []}), "utf-8")
    assert summary.main([str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out.count("step_time float32: ok") == 1 and said.out.count("step_time float32: cut short") == 1
    assert re.findall(r"(\w\.json) (is not valid JSON|was not written by a benchmark's --json)", said.err) == [
        ("a.json", "is not valid JSON"), *((f"{name}.json", "was not written by a benchmark's --json") for name in "ce")]


def test_the_summary_needs_a_directory(tmp_path, capsys):
    assert summary.main([str(tmp_path)]) == 0 and "no results in" in capsys.readouterr().out
    with pytest.raises(UserError, match="nowhere is not a directory; name the one"):
        summary.main([str(tmp_path / "nowhere")])
    for arguments, status in ((["--help"], 0), ([], 2)):
        with pytest.raises(SystemExit) as ended:
            summary.main(arguments)
        assert ended.value.code == status


def test_peaks():
    assert timing.peak("NVIDIA H100 80GB HBM3").gb_per_s == 3350 and timing.peak("NVIDIA H100 PCIe").gb_per_s == 2000
    assert timing.peak("NVIDIA L40S").bfloat16 == 362 and timing.peak("cpu") is None
    # A name within another is another card.
    assert timing.peak("NVIDIA L40").bfloat16 == 181 and timing.peak("NVIDIA L4").bfloat16 == 121
    assert timing.peak("NVIDIA RTX A1000") is None and timing.peak("NVIDIA GH200 480GB").gb_per_s == 4000
    assert timing.peak("NVIDIA H100 NVL").gb_per_s == 3900 and timing.peak("NVIDIA H200 NVL").bfloat16 == 835
    assert [timing.peak(f"NVIDIA {card}").gb_per_s for card in ("A100-SXM4-40GB", "A100-SXM4-80GB", "A100 80GB PCIe")] == [1555, 2039, 1935]
    assert timing.peak("Tesla V100-PCIE-16GB").float32 == 14 and timing.peak("Tesla V100-SXM2-32GB").float32 == 15.7
    for card in ("GeForce RTX 4090 Laptop GPU", "GeForce RTX 4090 D", "H100 80GB HBM3 MIG 1g.10gb"):
        assert timing.peak(f"NVIDIA {card}") is None


def test_a_peak_of_which_one_half_is_given(tmp_path):
    path = tmp_path / "new.json"
    for option, share, other in (("--peak-tflops", "share_of_peak", "share_of_bandwidth"),
                                 ("--peak-gb-per-s", "share_of_bandwidth", "share_of_peak")):
        step_time.main(["--tiny", "--kinds", "cached", option, "1", "--json", str(path)])
        (result,) = json.loads(path.read_text("utf-8"))["results"]
        assert result[share] > 0 and result[other] is None


def test_more_than_the_host_can_hold_is_a_row_that_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_time, "measure", lambda *_: np.ones((2**40, 2**10)))
    path = tmp_path / "new.json"
    assert step_time.main(["--tiny", "--kinds", "cached", "--json", str(path)]) == 1
    (result,) = json.loads(path.read_text("utf-8"))["results"]
    assert "Unable to allocate" in result["error"] and "failed" in capsys.readouterr().out


@pytest.mark.parametrize(("load", "policy"), [(0.5, None), (0.7, "passive")])
def test_threads_of_pytorch_do_not_spin_on_a_busy_machine(monkeypatch, load, policy):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert timing.calm_torch({"load": load, "cores": 2}) == "active"  # who sets it means it
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert timing.calm_torch({"load": load, "cores": 2}) == policy == os.environ.get("OMP_WAIT_POLICY")


def test_correctness_notices_what_is_wrong():
    right = {"a": np.ones(3, np.float32), "b": np.full(2, 2.0, np.float32)}
    assert correctness.relative_error(right, right) == 0
    assert correctness.relative_error(jax.tree.map(lambda x: 1.1 * x, right), right) == pytest.approx(0.1, rel=1e-5)
    assert correctness.relative_error({**right, "a": np.array([1, np.nan, 1])}, right) == math.inf
    assert correctness.Check("x", "y", 0.01, 0.01).passed and not correctness.Check("x", "y", math.inf, 0.01).passed
    assert not correctness.Check("x", "y", 0.0, 0.01, same=0.9, least_same=0.95).passed


def test_top_ops_knows_where_operations_come_from():
    hlo = '  %dot.7 = f32[2]{0} dot(%a), metadata={op_name="jit(train_step)/lstm/dot_general" x=1}\n  ROOT add.1 = f32[] add(%a)'
    assert top_ops.scopes(hlo) == {"dot.7": "lstm/dot_general"}


def on_gpu(out: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OUT": str(out), "TINY": "1", "XLA_FLAGS": "", "PYTHON": sys.executable, **environment}
    return subprocess.run(["bash", "benchmarks/on_gpu.sh"], cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_the_gpu_script_imports_nothing_that_its_machine_lacks():
    """A bare machine with jax, flax, optax, orbax, sacrebleu, tqdm and regex runs it."""
    script = ("import sys\n"
              "for name in ('h5py', 'cramjam', 'safetensors', 'grain', 'array_record', 'tensorflow_datasets', 'simplejpeg', 'cv2',\n"
              "             'PIL', 'tensorboardX', 'pycocoevalcap'):\n"
              "    sys.modules[name] = None\n"
              "import benchmarks.correctness, benchmarks.decode, benchmarks.encode, benchmarks.input, benchmarks.projection\n"
              "import benchmarks.convolutions, benchmarks.recurrence, benchmarks.scaling, benchmarks.step_time, benchmarks.training, benchmarks.variants\n"
              "from jaxcap.errors import run_command\n"
              "run_command(lambda: benchmarks.step_time.main(['--tiny', '--input', 'real']))\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "error: --input real needs grain, which" in done.stderr, done.stderr[-2000:]


def test_on_gpu_script_runs_every_part_once(tmp_path):
    done = on_gpu(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    parts = ["correctness", "decode", "profile", "steps", "training"]
    parts += ["peers"] if importlib.util.find_spec("torch") else []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"{p}.json" for p in parts] + ["rest.tar.gz"])
    with tarfile.open(tmp_path / "rest.tar.gz") as rest:
        said = rest.extractfile("./log.txt").read().decode()
        assert "== training: exit status 0" in said and any(name.endswith(".xplane.pb") for name in rest.getnames())
    results = {p: json.loads((tmp_path / f"{p}.json").read_text("utf-8")) for p in parts}
    assert all(result["ok"] for result in results.values())
    assert [r["kind"] for r in results["steps"]["results"]] == list(step_time.DEFAULT)
    assert any("Decoder" in op["scope"] for op in results["profile"]["results"][0]["top_ops"])
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}

    # A part that went wrong is run again, one that succeeded is not.
    results["decode"]["ok"] = False
    (tmp_path / "decode.json").write_text(json.dumps(results["decode"]), "utf-8")
    again = on_gpu(tmp_path)
    assert again.returncode == 0 and again.stdout.count("there already") == len(parts) - 1
    changed = [path.name for path in tmp_path.glob("*.json") if path.stat().st_mtime_ns != before[path.name]]
    assert changed == ["decode.json"] and "decode bfloat16: ok" in again.stdout


def test_on_gpu_script_has_a_second_call(tmp_path):
    done = on_gpu(tmp_path, PARTS="second")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    parts = ["convolutions", "five", "recurrence", "steps_float32", "steps_large", "variants"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"{p}.json" for p in parts] + ["rest.tar.gz"])
    convolutions, five, recurrence, _, large, variants = (json.loads((tmp_path / f"{p}.json").read_text("utf-8")) for p in parts)
    assert [r["batch"] for r in large["results"]][:2] == [8, 16]
    assert {r["captions_per_photo"] for r in five["results"]} == {5} and convolutions["ok"] and recurrence["ok"]
    (plain,), (unrolled,) = (variant["turns"] for variant in variants["results"])
    assert plain["cached"]["loss"] == pytest.approx(unrolled["cached"]["loss"])


def test_on_gpu_script_asks_for_pytorchs_two_best_forms_at_most():
    """Each takes a minute of a card's time; a form without its kind would be tried for every kind that it means something for."""
    script = (REPOSITORY / "benchmarks" / "on_gpu.sh").read_text("utf-8")
    given = re.search(r"^peers=\(.*?\)$", script, re.DOTALL | re.MULTILINE)[0]
    words = subprocess.run(["bash", "-c", f'{given}; printf "%s\\n" "${{peers[@]}}"'], capture_output=True, text=True, check=True).stdout.split()
    asked = peers.parser().parse_args(words)
    tried = {kind: forms.wanted("torch", kind, "gpu", "bfloat16", asked.forms) for kind in asked.kinds}
    assert list(tried) == ["joint", "frozen", "cached", "beam"] and all(1 <= len(of_kind) <= 2 for of_kind in tried.values())


def test_on_gpu_script_goes_on_after_a_failure(tmp_path):
    done = on_gpu(tmp_path, PYTHON="false")
    assert done.returncode == 1 and done.stdout.count("exit status 1") == 5
    assert "failed or out of time: steps decode correctness training profile" in done.stdout


def test_on_gpu_script_takes_the_python_of_the_checkout_or_else_of_the_machine(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(REPOSITORY / "benchmarks/on_gpu.sh", tmp_path / "benchmarks")
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PARTS": "training"}
    environment.pop("PYTHON", None)
    for place in ("bin/python3", ".venv/bin/python"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text(f"#!/bin/sh\necho this is {place}\n")
        (tmp_path / place).chmod(0o755)
        done = subprocess.run(["bash", "benchmarks/on_gpu.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and f"== training\nthis is {place}\n" in done.stdout


def test_on_gpu_script_names_what_no_time_was_left_for(tmp_path):
    done = on_gpu(tmp_path, LIMIT_S="1", PARTS="  training\tprofile\n")
    assert done.returncode == 1 and not list(tmp_path.glob("*.json"))
    assert 'no time was left for these: PARTS="training profile" takes them up' in done.stdout


@pytest.mark.parametrize(("environment", "sentence"), [
    ({"PARTS": "stepz"}, 'PARTS has no "stepz": name some of steps peers'), ({"PARTS": "Second"}, 'PARTS has no "Second"'),
    ({"PARTS": "decode second"}, 'PARTS has no "second"'), ({"PARTS": "decode,steps"}, 'PARTS has no "decode,steps"'),
    ({"LIMIT_S": "abc"}, 'LIMIT_S must be a whole number of seconds above 0, not "abc"'), ({"LIMIT_S": "08"}, "LIMIT_S must be")])
def test_on_gpu_script_refuses_what_it_does_not_know(tmp_path, environment, sentence):
    done = on_gpu(tmp_path / "out", PYTHON="false", **environment)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {sentence}") and done.stderr.count("\n") == 1
    assert not done.stdout and not (tmp_path / "out").exists()


def test_convolutions_are_those_of_the_network(tmp_path, capsys):
    found = convolutions.of_network("inception_v3", 299)
    assert sum(found.values()) == 66  # of 94; siblings of a block are one
    assert 2 * encoders.get("inception_v3").gmacs == pytest.approx(sum(of.gflop * times for of, times in found.items()), rel=0.01)
    lite = convolutions.of_network("efficientnet_lite0", 224)
    assert 2 * encoders.get("efficientnet_lite0").gmacs == pytest.approx(sum(of.gflop * times for of, times in lite.items()), rel=0.01)
    assert any("depthwise" in str(of) for of in lite)

    path = tmp_path / "convolutions.json"
    passes = ["--passes", "forward", "input", "kernel"]
    assert not convolutions.main(["--encoder", "small_cnn", "--size", "32", "--batch", "2", "--turns", "2", *passes, "--json", str(path)])
    results = json.loads(path.read_text("utf-8"))["results"]
    assert {r["pass"] for r in results} == {"forward", "input", "kernel"} and all(len(r["turns_ms"]) == 2 for r in results)
    assert "jaxcap ÷ XLA" in capsys.readouterr().out
    with pytest.raises(UserError, match="no convolution of small_cnn is described so"):
        convolutions.main(["--encoder", "small_cnn", "--only", "99 px"])


def test_convolutions_asks_for_the_pass_that_it_names():
    (of,) = [of for of in convolutions.of_network("small_cnn", 16) if of.kernel[:2] == (3, 3)][:1]
    x, kernel, dy = of.inputs(2)
    for own in (False, True):
        shapes = {what: [y.shape for y in convolutions.in_jax(of, what, 2, 3, jnp.float32, own=own, kernel_dtype=None)()]
                  for what in convolutions.PASSES}
        assert shapes == {"forward": [dy.shape] * 3, "input": [x.shape] * 3, "kernel": [kernel.shape] * 3}


def test_convolutions_compares_with_the_same_one_in_pytorch():
    pytest.importorskip("torch")
    one_sided = convolutions.Convolution(9, 4, (3, 3, 4, 6), 2, ((0, 1), (0, 1)))
    depthwise = convolutions.Convolution(7, 4, (3, 3, 1, 4), 1, ((1, 1), (1, 1)))
    for of in (one_sided, depthwise):
        for what in convolutions.PASSES:
            (ours,) = convolutions.in_jax(of, what, 2, 1, jnp.float32, own=False, kernel_dtype=None)()
            (theirs,) = convolutions.in_torch(of, what, 2, 1, "float32")()
            theirs = theirs.numpy().transpose(2, 3, 1, 0) if what == "kernel" else theirs.numpy().transpose(0, 2, 3, 1)
            if what == "input":  # PyTorch's also has that of the zeros around
                theirs = theirs[:, :of.size, :of.size]
            np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_forms_of_the_recurrence_agree(tmp_path, capsys):
    path = tmp_path / "recurrence.json"
    sizes = ["--batch", "2", "--words", "4", "--units", "8", "--turns", "2", "--calls", "1"]
    peer = ["--peer"] if importlib.util.find_spec("torch") else []
    assert not recurrence.main([*sizes, *peer, "--json", str(path)])
    result = json.loads(path.read_text("utf-8"))
    assert result["ok"] and not result["wrong"] and "÷ loop" in capsys.readouterr().out
    assert [r["form"] for r in result["results"]] == 2 * [*recurrence.FORMS, *(["PyTorch"] if peer else [])]
    assert all(len(r["turns_ms"]) == 2 and r["apart"] < 1e-5 for r in result["results"])


def test_a_form_of_the_recurrence_that_is_wrong_or_fails_is_told(tmp_path, monkeypatch):
    def fails(problems, gradients, dtype, unroll, *, made=recurrence.in_jaxcap):
        if unroll == 4:
            raise NotImplementedError("no such routine")
        call, read = made(problems, gradients, dtype, unroll)
        return (call, read) if unroll else (lambda: [one._replace(hidden_TBD=2 * one.hidden_TBD) for one in call()], read)

    monkeypatch.setattr(recurrence, "in_jaxcap", fails)
    path = tmp_path / "recurrence.json"
    assert recurrence.main(["--batch", "2", "--words", "3", "--units", "4", "--turns", "1", "--calls", "1", "--json", str(path)]) == 1
    result = json.loads(path.read_text("utf-8"))
    assert not result["ok"] and {r["form"] for r in result["results"]} == {"loop"}
    assert [(w["form"], w["why"][:16]) for w in result["wrong"]] == 2 * [("by fours", "no such routine"), ("one piece", "does not compute")]


def test_an_lstm_as_cudnn_has_it_is_the_same():
    of = recurrence.problem(words=5, batch=3, embedding=6, units=4)
    weights = recurrence.packed(of.kernel, of.bias_G, 6)
    parts = rnn.unpack_lstm_weights(weights, 6, 4, 1, False)
    zero = jnp.zeros((1, 3, 4))

    def reference(x_TBE, *parts):
        return rnn.lstm_ref(x_TBE.swapaxes(0, 1), zero, zero, *({0: part} for part in parts), jnp.full(3, 5), 6, 4, 1, 0.0, False)[0]

    call, _ = recurrence.in_jaxcap([of], True, "float32", 1)
    (ours,) = call()
    hidden_BTD, pull = jax.vjp(reference, of.x_TBE, *(part[0] for part in parts))
    d_x_TBE, *rest = pull(jnp.asarray(of.d_hidden_TBD.swapaxes(0, 1)))
    theirs = recurrence.Answer(hidden_BTD.swapaxes(0, 1), d_x_TBE, *recurrence.from_cudnn(*map(np.asarray, rest[:3])))
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs) and recurrence.apart(theirs, ours) < 1e-5


@pytest.mark.parametrize("gradients", [False, True])
def test_cudnns_form_of_the_recurrence_is_read_right(gradients, monkeypatch):
    """With JAX's reference in place of cuDNN, which only a card has."""

    def reference(x_BTE, hidden, cell, weights, lengths, embedding, units, *rest):
        return rnn.lstm_ref(x_BTE, hidden, cell, *rnn.unpack_lstm_weights(weights, embedding, units, 1, False), lengths, embedding, units, *rest)

    monkeypatch.setattr(recurrence.rnn, "lstm", reference)
    of = recurrence.problem(words=5, batch=3, embedding=6, units=4)
    call, read = recurrence.in_cudnn([of, of], gradients)
    (right,) = recurrence.in_jaxcap([of], gradients, "float32", 1)[0]()
    found = list(read(call()))
    assert len(found) == 2 and jax.tree.map(jnp.shape, found[0]) == jax.tree.map(jnp.shape, right)
    assert recurrence.apart(found[1], right) < 1e-5


def test_a_variant_that_fails_does_not_stop_the_others(tmp_path, capsys):
    path = tmp_path / "variants.json"
    assert not variants.main(["--tiny", "--turns", "1", "--repeats", "1", "--only", "fast arithmetic", "--flags=--xla_no_such_flag=1",
                              "--json", str(path)])
    plain, fast, unknown = json.loads(path.read_text("utf-8"))["results"]
    assert plain["turns"][0]["cached"]["ms"]["median"] > 0 and fast["turns"][0]["cached"]["ms"]["median"] > 0
    assert "no_such_flag" in unknown["turns"][0]["error"] and "failed" in capsys.readouterr().out


def test_encode_counts_photos(tmp_path, capsys):
    path = tmp_path / "encode.json"
    assert not encode.main(["--encoders", "small_cnn", "--batch", "4", "--turns", "2", "--json", str(path)])
    (result,) = json.loads(path.read_text())["results"]
    assert len(result["turns_ms"]) == 2 and result["ms"]["jaxcap"] > 0 and result["speed_over_peer"] is None
    said = capsys.readouterr().out
    assert "small_cnn" in said and "jaxcap ÷ PyTorch, photos/s" in said
    with pytest.raises(UserError, match="not small_cnn"):
        encode.main(["--encoders", "small_cnn", "--peer"])


def test_checkpoints_are_timed_and_read_back(tmp_path, capsys):
    path = tmp_path / "checkpoints.json"
    assert not checkpoints.main(["phases.1.optim.name=adam", "--tiny", "--repeats", "2", "--dir", str(tmp_path / "disk"), "--json", str(path)])
    (result,) = json.loads(path.read_text())["results"]
    assert result["encoder"] == "small_cnn" and result["arrays"] > 0 and result["restored_ms"] > 0
    assert len(result["held_ms"]) == 3 and all(0 < held < written for held, written in zip(result["held_ms"], result["written_ms"], strict=True))
    assert not list((tmp_path / "disk").iterdir())
    assert "devices: 8" in (said := capsys.readouterr().out) and "first: waits, ms" in said
