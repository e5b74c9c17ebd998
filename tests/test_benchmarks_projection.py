"""The projection of a schedule: every number of it computed by hand."""

import dataclasses
import json

import pytest

from benchmarks import projection, workload
from benchmarks.projection import Link, Ring, Schedule, duration, on_one, simulate, step_ms
from jaxcap import config as configs
from jaxcap.errors import UserError

RING = Ring(inside=Link(100, 10), between=Link(50, 20), together=8)
PLAN = Schedule(steps={"frozen": 10, "joint": 20}, batch=32, exchanged=lambda kind, batch: ({"frozen": 10**9, "joint": 2 * 10**9}[kind], 0))
MEASURED = {"frozen": {32: 100.0, 64: 150.0}, "joint": {32: 200.0, 64: 500.0}}


def test_ring():
    # 2 · 7/8 · 1 GB at 100 GB/s, and 14 hops of 10 µs.
    assert RING.all_reduce_s(10**9, 8) == pytest.approx(17.5e-3 + 140e-6)
    # Two machines: the slower link sets the pace of 2 · 15/16 GB; of 30 hops two are between machines.
    assert RING.all_reduce_s(10**9, 16) == pytest.approx(37.5e-3 + 280e-6 + 40e-6)
    assert RING.all_reduce_s(10**9, 1) == 0
    # Gathering is half of that, 7/8 of the bytes in 7 hops, and takes no time where there is nothing to gather.
    assert RING.exchange_s(10**9, 10**8, 8) == pytest.approx(17.5e-3 + 140e-6 + 0.875e-3 + 70e-6)
    assert RING.exchange_s(10**9, 0, 8) == RING.all_reduce_s(10**9, 8)
    # A link between machines that is the faster one does not help.
    assert Ring(Link(50, 0), Link(100, 0)).all_reduce_s(10**9, 16) == pytest.approx(37.5e-3)


def test_step_times_between_measured_batches():
    assert step_ms(MEASURED["frozen"], 48) == (125.0, False) and step_ms(MEASURED["frozen"], 40) == (112.5, False)
    assert step_ms(MEASURED["frozen"], 32) == (100.0, False) and step_ms(MEASURED["frozen"], 64) == (150.0, False)
    assert step_ms({8: 1.0, 32: 100.0, 64: 150.0}, 64) == (150.0, False)
    assert step_ms(MEASURED["frozen"], 4) == (100.0, True)  # not less than what was measured
    with pytest.raises(UserError, match="no step of 65 photos was measured, the largest has 64"):
        step_ms(MEASURED["frozen"], 65)


def test_on_one_device_and_in_2016():
    measured, tensorflow, distbelief = on_one(MEASURED, PLAN)
    assert measured["phase_s"] == {"frozen": 1.0, "joint": 4.0} and measured["total_s"] == 5.0
    assert tensorflow["total_s"] == pytest.approx(21) and distbelief["total_s"] == pytest.approx(90)
    assert measured["published_is"] is None and "times the steps" in tensorflow["published_is"]
    whole = dataclasses.replace(PLAN, steps={"frozen": 1_000_000, "joint": 2_000_000})
    assert [duration(r["total_s"]) for r in on_one(MEASURED, whole)] == ["5.79 days", "24.3 days", "104 days"]


def test_duration():
    assert [duration(s) for s in (5, 119, 180, 7200, 86_400, 172_800)] == \
        ["5.00 s", "119 s", "3.00 minutes", "2.00 hours", "24.0 hours", "2.00 days"]


def test_the_same_training_on_more_devices():
    found = simulate(MEASURED | {"frozen": {2: 30.0, 32: 100.0}}, PLAN, 16, RING, None)
    assert found["same_training"] and found["batch"] == 32 and found["per_device"] == 2 and found["simulated"]
    frozen, joint = found["phases"]["frozen"], found["phases"]["joint"]
    assert (frozen["compute_ms"], frozen["upper_bound"], joint["compute_ms"], joint["upper_bound"]) == (30.0, False, 200.0, True)
    assert frozen["exchange_ms"] == pytest.approx(37.82) and joint["exchange_ms"] == pytest.approx(75.32)
    assert found["total_s"] == pytest.approx((10 * 67.82 + 20 * 275.32) / 1000)
    for devices in (64, 12):
        assert f"32 photos cannot be cut over {devices} devices" in simulate(MEASURED, PLAN, devices, RING, None)["impossible"]


def test_a_larger_batch_is_another_training():
    found = simulate(MEASURED, PLAN, 8, RING, 32)
    assert not found["same_training"] and found["batch"] == 256 and not found["phases"]["joint"]["upper_bound"]
    assert [phase["steps"] for phase in found["phases"].values()] == [2, 3]  # of 10 and 20, an eighth, rounded up
    assert found["total_s"] == pytest.approx((2 * (100 + 17.64) + 3 * (200 + 35.14)) / 1000)


# What im2txt's phase 1 sums: its decoder, of 2048 features, 12,000 words, embedding and LSTM of 512; and two scalars.
SUMMED = 4 * (2048 * 512 + 12_000 * 512 + 1024 * 4 * 512 + 4 * 512 + 512 * 12_000 + 12_000) + 8


def settings_of(*overrides, tiny=False):
    of = workload.settings(tiny=tiny, dtype="bfloat16", overrides=overrides)
    return {"config": configs.to_dict(of.config), "vocabulary": of.vocabulary, "tokens": of.tokens, "tiny": tiny}


def record(path, **changes):
    """A file as `benchmarks.step_time` writes it."""
    result = {"title": "step_time float32",
              "machine": {"device": "a card", "devices": 1, "platform": "gpu", "cores": 4, "load": 0.1, "jax": "0",
                          "date": "2026-01-01", "commit": None},
              "settings": settings_of(),
              "ok": True, "table": [["step"]],
              "results": [{"kind": kind, "batch": 32, "ms": {"median": ms}} for kind, ms in (("frozen", 36.0), ("joint", 72.0))]}
    path.write_text(json.dumps(result | changes), "utf-8")
    return path


def test_command(tmp_path, capsys):
    path, out = record(tmp_path / "steps.json"), tmp_path / "out.json"
    assert projection.main([str(path), "--devices", "8", "--gb-per-s", "1", "--hop-us", "0", "--json", str(out)]) == 0
    result = json.loads(out.read_text("utf-8"))
    one, _, _, same, more = result["results"]
    assert one["phase_s"] == {"frozen": 36_000.0, "joint": 144_000.0} and result["machine"]["device"] == "a card"
    # Of 32 photos the words' rows are gathered, with their numbers; of 256 the whole table is summed.
    frozen, size = same["phases"]["frozen"], SUMMED - 4 * 12_000 * 512
    assert (frozen["summed_bytes"], frozen["gathered_bytes"]) == (size, gathered := 32 * 20 * 4 * 513)
    assert frozen["exchange_ms"] == pytest.approx(7 / 8 * (2 * size + gathered) / 1e6)
    assert more["batch"] == 256 and more["phases"]["frozen"]["exchange_ms"] == pytest.approx(2 * 7 / 8 * SUMMED / 1e6)
    assert same["phases"]["frozen"]["upper_bound"] and same["same_training"] and not more["same_training"]
    said = capsys.readouterr().out
    for words in ("10.0 hours", "40.0 hours", "2.08 days", "24.3 days", "104 days", "SIMULATED, not measured", "CHANGED",
                  "nobody published the totals", "1 GB/s and 0 µs a hop", "whose time is taken, an upper bound"):
        assert words in said


def test_the_newest_record_is_the_default(tmp_path, monkeypatch, capsys):
    machine = json.loads(record(tmp_path / "a.json").read_text("utf-8"))["machine"]
    record(tmp_path / "z.json", machine=machine | {"date": "2025-12-31", "device": "an older card"})
    record(tmp_path / "y.json", machine=machine | {"date": "2027-01-01"}, results=[])  # newer, of other steps
    record(tmp_path / "w.json", machine=machine | {"date": "2027-01-01"}, settings=settings_of("decoder.hidden=64"))
    (tmp_path / "x.json").write_text('{"title": "decode float32"}', "utf-8")
    assert projection.newest(tmp_path) == tmp_path / "a.json"
    monkeypatch.setattr(projection, "RECORDS", tmp_path / "none")
    with pytest.raises(UserError, match="has no result of benchmarks.step_time"):
        projection.main([])


def test_the_records_that_ship_can_be_projected(capsys):
    assert projection.main(["--devices", "8"]) == 0
    assert f"{(SUMMED - 4 * 12_000 * 512) / 1e6:.1f} or {SUMMED / 1e6:.1f} MB frozen, 124.4 or 149.0 MB joint" in capsys.readouterr().out


def test_what_cannot_be_projected(tmp_path, capsys):
    with pytest.raises(UserError, match="has no joint step of 32 photos; measure it with"):
        projection.main([str(record(tmp_path / "a.json", results=[{"kind": "frozen", "batch": 32, "ms": {"median": 1.0}}]))])
    with pytest.raises(UserError, match="was not written by benchmarks.step_time"):
        projection.main([str(record(tmp_path / "b.json", settings={}))])
    for settings, sentence in ((settings_of("decoder.hidden=64"), r"not im2txt's, whose schedule is projected \(decoder.hidden: 512 → 64\): measure"),
                               (settings_of(tiny=True), "encoder.name: .* tokens: 20 → 5")):
        with pytest.raises(UserError, match=sentence):
            projection.main([str(record(tmp_path / "d.json", settings=settings))])
    with pytest.raises(UserError, match="cannot be read"):
        projection.main([str(tmp_path / "nothing.json")])
    with pytest.raises(UserError, match="--hop-us must be a finite number"):
        projection.main(["--hop-us", "-1"])
    several = json.loads(record(tmp_path / "c.json").read_text("utf-8"))["machine"] | {"devices": 8}
    assert projection.main([str(record(tmp_path / "c.json", machine=several))]) == 0
    assert "nothing is simulated" in capsys.readouterr().out
