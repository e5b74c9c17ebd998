"""The benchmarks: that they run at tiny sizes, say what they mean, and notice what is wrong. No speed is asserted."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import correctness, encode, step_time, timing, top_ops, workload
from benchmarks.workload import KINDS
from jaxcap import captioner as captioners
from jaxcap.errors import UserError

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What a tiny `step_time` wrote, on eight devices."""
    path = tmp_path_factory.mktemp("step_time") / "tiny.json"
    status = step_time.main(["--tiny", "--kinds", "cached", "eval", "--peak-tflops", "1", "--json", str(path)])
    assert status == 0 and not path.with_name("tiny.json.partial").exists()
    return path


def test_step_time_writes_every_number(measured):
    result = json.loads(measured.read_text("utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result["ok"] and result["settings"]["tokens"] == 5 and result["machine"]["devices"] == 8
    for r in result["results"]:
        assert len(r["ms"]["repeats"]) >= 5 and r["ms"]["min"] <= r["ms"]["median"] <= r["ms"]["max"]
        assert math.isclose(r["photos_per_s_per_device"], 8 * 1000 / r["ms"]["median"] / 8)
        assert math.isclose(r["share_of_peak"], r["gflop"] / 1000 / (r["ms"]["median"] / 1000))
        numbers = [*r["ms"]["repeats"], *r["loss"], *(r[k] for k in ("gflop", "gb", "program_gib", "compile_s"))]
        assert all(math.isfinite(n) and n > 0 for n in numbers)
    cached, evaluated = result["results"]
    assert (cached["kind"], cached["skips_cnn"], evaluated["kind"], evaluated["skips_cnn"]) == ("cached", True, "eval", False)
    # 0.7 s for 32 photos is 0.175 s for 8; evaluation is no training step and has nothing beside it.
    assert math.isclose(cached["times_faster"]["TensorFlow 2016"], 175 / cached["ms"]["median"])
    assert evaluated["times_faster"] == {}
    assert evaluated["gflop"] > cached["gflop"]  # the one that runs the CNN


def test_compare(measured, tmp_path):
    old = json.loads(measured.read_text("utf-8"))
    new = json.loads(measured.read_text("utf-8"))
    assert "within the spread" in step_time.comparison(old, new)
    for r in old["results"]:
        r["ms"] = {name: value / 1000 for name, value in r["ms"].items() if name in ("median", "min", "max")}
    old["machine"]["device"] = "another card"
    text = step_time.comparison(old, new)
    assert "+99900.0 %" in text and "within" not in text and "device differs: another card" in text
    path = tmp_path / "notes.json"
    path.write_text('{"a": 1}')
    with pytest.raises(UserError, match="was not written by benchmarks.step_time"):
        step_time.main(["--compare", str(path)])
    with pytest.raises(UserError, match="--batch=12 cannot be divided by the 8 devices"):
        step_time.main(["--batch", "12"])


def test_pmap_runs_the_same_step(measured, tmp_path):
    path = tmp_path / "pmap.json"
    assert step_time.main(["--tiny", "--kinds", "cached", "--parallel", "pmap", "--json", str(path)]) == 0
    (ours,), (theirs, _) = (json.loads(p.read_text("utf-8"))["results"] for p in (path, measured))
    assert math.isclose(ours["loss"][0], theirs["loss"][0], rel_tol=1e-5) and ours["gflop"] == theirs["gflop"]


def test_arithmetic_is_counted_in_full():
    """XLA's count, loops included, is the sum of the decoder's matrix products at im2txt's sizes and little else."""
    of = workload.settings()
    captioner = captioners.build(of.config, of.vocabulary)
    key = jax.random.PRNGKey(0)
    decoder = captioner.decoder.init(key, jnp.ones((1, 1, 2048)), jnp.ones((1, 1), jnp.int32))["params"]
    step = workload.Step(KINDS["cached"], of, captioner, {"encoder": {}, "decoder": decoder}, {}, 32, devices=jax.devices()[:1])
    counted = step_time.costs(step.lower(), None, of, 32, train=True)["gflop"]
    B, T, E, D, V, F = 32, 20, 512, 512, 12_000, 2048
    forward = B * T * D * V + B * (T + 1) * E * 4 * D + B * T * D * 4 * D + B * F * E
    backward = 2 * forward - B * F * E  # the frozen features need no gradient
    assert counted == pytest.approx(2 * (forward + backward) / 1e9, rel=0.02)


def test_time_calls_counts_and_warms_up():
    calls = []
    timed = timing.time_calls(lambda: calls.append(1) or jnp.ones(()), repeats=6, calls=4)
    assert len(timed.repeats_ms) == 6 and timed.calls == 4 and len(calls) == 1 + 2 + 6 * 4
    assert timing.Timing((3.0, 1.0, 2.0), 1).ms == 2.0


def test_peaks():
    assert timing.peak("NVIDIA H100 80GB HBM3").gb_per_s == 3350 and timing.peak("NVIDIA H100 PCIe").gb_per_s == 2000
    assert timing.peak("NVIDIA L40S").bfloat16 == 362 and timing.peak("cpu") is None


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
    environment = {**os.environ, "OUT": str(out), "TINY": "1", "XLA_FLAGS": "", **environment}
    return subprocess.run(["bash", "benchmarks/on_gpu.sh"], cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_the_gpu_script_imports_nothing_that_its_machine_lacks():
    """A bare machine with jax, flax, optax, orbax, sacrebleu, tqdm and regex runs it."""
    script = ("import sys\n"
              "for name in ('h5py', 'cramjam', 'safetensors', 'grain', 'array_record', 'tensorflow_datasets', 'simplejpeg', 'cv2',\n"
              "             'PIL', 'tensorboardX', 'pycocoevalcap'):\n"
              "    sys.modules[name] = None\n"
              "import benchmarks.correctness, benchmarks.decode, benchmarks.encode, benchmarks.input, benchmarks.projection\n"
              "import benchmarks.scaling, benchmarks.step_time, benchmarks.training\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_on_gpu_script_runs_every_part_once(tmp_path):
    done = on_gpu(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    parts = ["correctness", "decode", "profile", "steps_bfloat16", "steps_float32", "training"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"{p}.json" for p in parts] + ["log.txt", "trace.tar.gz"])
    results = {p: json.loads((tmp_path / f"{p}.json").read_text("utf-8")) for p in parts}
    assert all(result["ok"] for result in results.values())
    assert [r["kind"] for r in results["steps_float32"]["results"]] == list(KINDS)
    assert any("Decoder" in op["scope"] for op in results["profile"]["results"][0]["top_ops"])
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}

    # A part that went wrong is run again, one that succeeded is not.
    results["decode"]["ok"] = False
    (tmp_path / "decode.json").write_text(json.dumps(results["decode"]), "utf-8")
    again = on_gpu(tmp_path)
    assert again.returncode == 0 and again.stdout.count("there already") == 5
    changed = [path.name for path in tmp_path.glob("*.json") if path.stat().st_mtime_ns != before[path.name]]
    assert changed == ["decode.json"] and "decode float32: ok" in again.stdout


def test_on_gpu_script_goes_on_after_a_failure(tmp_path):
    done = on_gpu(tmp_path, PYTHON="false")
    assert done.returncode == 1 and done.stdout.count("exit status 1") == 6
    assert "failed or out of time: correctness steps_float32 steps_bfloat16 decode training profile" in done.stdout


def test_encode_counts_photos(tmp_path, capsys):
    path = tmp_path / "encode.json"
    assert not encode.main(["--encoders", "small_cnn", "--batch", "4", "--turns", "2", "--json", str(path)])
    (result,) = json.loads(path.read_text())["results"]
    assert len(result["turns_ms"]) == 2 and result["ms"]["jaxcap"] > 0 and result["speed_over_peer"] is None
    assert "small_cnn" in capsys.readouterr().out
    with pytest.raises(UserError, match="not small_cnn"):
        encode.main(["--encoders", "small_cnn", "--peer"])
