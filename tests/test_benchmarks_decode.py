"""The timing of captioning: that percentiles and scaling down mean what they say, and a tiny run. No speed is asserted."""

import json

import jax
import pytest

from benchmarks import decode, timing
from jaxcap.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_percentiles_are_values_that_occurred():
    hundred = list(range(100, 0, -1))
    assert [decode.percentile(hundred, p) for p in (1, 50, 99, 100)] == [1, 50, 99, 100]
    assert decode.percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert decode.percentile(range(99), 99) == 98  # of fewer than 100 the largest
    assert decode.percentile([7.0], 50) == 7.0


def test_latency_counts_calls(monkeypatch):
    calls = []
    assert len(decode.latencies(lambda: calls.append(1))) == 100 and len(calls) == 101  # the first warms up
    monkeypatch.setattr(decode, "LATENCY_S", 1e-9)
    assert len(decode.latencies(lambda: calls.append(1))) == timing.FEWEST and len(calls) == 102 + timing.FEWEST


def test_expected_seconds_grow_with_the_batch():
    results = [{"source": "photos", "beam": 3, "batch": batch, "ms": {"median": ms}} for batch, ms in ((1, 100), (32, 1000))]
    results.append({"source": "photos", "beam": 3, "batch": 64, "left_out": 99.0})
    assert decode.expected_s(results, "photos", 3, 256) == pytest.approx(8.0)
    assert decode.expected_s(results, "photos", 1, 256) == decode.expected_s(results, "photos", 3, 1) == 0
    assert decode.default_batches(1, tiny=False) == [1, 32, 256]
    assert decode.default_batches(8, tiny=False) == [32, 256] and decode.default_batches(5, tiny=False) == [5]


def test_a_tiny_run_leaves_out_what_would_take_long(tmp_path, monkeypatch, capsys):
    path = tmp_path / "decode.json"
    monkeypatch.setattr(decode, "TINY_BATCHES", (8, 16))
    monkeypatch.setattr(decode, "LONGEST_CALL_S", 0.0)
    monkeypatch.setattr(decode, "LATENCY_S", 0.0)
    assert decode.main(["--tiny", "--sources", "features", "--beam", "2", "--json", str(path)]) == 0
    measured, left_out = json.loads(path.read_text("utf-8"))["results"]
    waits = measured["latency_ms"]
    assert len(waits["calls"]) == 5 and waits["p99"] == max(waits["calls"]) and waits["p50"] == sorted(waits["calls"])[2]
    assert measured["words"] == 20 and measured["captions_per_s"] == pytest.approx(8000 / measured["ms"]["median"])
    assert left_out["batch"] == 16 and left_out["left_out"] == pytest.approx(2 * measured["ms"]["median"] / 1000)
    output = capsys.readouterr()
    assert "(largest of 5)" in output.out and "left out" in output.out and "--batch 16 times it all the same" in output.err


def test_wrong_options_are_refused():
    with pytest.raises(UserError, match="--beam 60 is more than the vocabulary of 60 words"):
        decode.main(["--tiny", "--beam", "60"])
    with pytest.raises(UserError, match="--batch=12 cannot be divided by the 8 devices"):
        decode.main(["--tiny", "--batch", "12"])
