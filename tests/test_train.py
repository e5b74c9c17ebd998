"""Training end to end on a handful of photos: one directory, resumption bit for bit, clear words when something is wrong."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcap import caption, checkpoints, config, evaluate, journal, prepare, train
from jaxcap.errors import UserError

ROOT = Path(__file__).parents[1]
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared data set of 40 one-coloured photos in folder/tiny, with splits train and val."""
    root = tmp_path_factory.mktemp("data")
    photos = root / "photos"
    photos.mkdir()
    lines = []
    random = np.random.default_rng(0)
    for i in range(40):
        name, rgb = list(COLOURS.items())[i % 4]
        noise = random.integers(-20, 20, (40, 48, 3))
        Image.fromarray(np.clip(np.array(rgb) + noise, 0, 255).astype(np.uint8)).save(photos / f"{i}.png")
        captions = [f"a {name} wall .", f"the wall is {name} ."]
        lines.append(json.dumps({"image": f"{i}.png", "captions": captions, "split": "val" if i >= 32 else "train"}))
    (root / "captions.jsonl").write_text("\n".join(lines))
    assert not prepare.main(["folder", "--source", str(photos), "--captions", str(root / "captions.jsonl"), "--label", "tiny",
                             "--size", "32", "--data-dir", str(root / "prepared")])
    return root / "prepared"


def settings(data: Path, *more: str) -> list[str]:
    return ["data.name=folder", "data.label=tiny", f"data.dir={data}", "data.size=32", "data.max_words=8", "name=tiny",
            "vocabulary.min_count=1", "batch_size=8", "eval_batch_size=8", "decoder.embedding=16", "decoder.hidden=16",
            "decoder.dropout=0.1", "encoder.name=small_cnn", "phases.0.optim.learning_rate=0.01", "log_every=1",
            "phases.0.optim.schedule=constant", "phases.0.optim.warmup_steps=0",
            "phases.0.epochs=0", "phases.0.steps=12", "checkpoints.every_steps=4", *more]


def losses(directory: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in journal.read(directory) if "loss" in line}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run that was never stopped."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*settings(data), "--run-dir", str(directory)]) == 0
    return directory


def test_a_run_is_one_directory_that_explains_itself(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "vocabulary.tsv", "checkpoints", "metrics.jsonl", "results", "report.html"} <= names
    assert any(name.startswith("events.") for name in names)
    found = losses(finished)
    assert list(found) == list(range(1, 13))
    assert found[12] < found[1]
    scores = [line for line in journal.read(finished) if line.get("split") == "val"]
    assert [line["step"] for line in scores] == [4, 8, 12] and all("bleu4" in line and "cider" in line for line in scores)
    result = json.loads((finished / "results" / "val.json").read_text())
    assert len(result) == 8 and set(result[0]) == {"image_id", "caption"}
    assert json.loads((finished / "results" / "val.scores.json").read_text())["bleu1"] > 0


def test_stop_and_resume_is_bit_for_bit_the_run_that_never_stopped(data, finished, tmp_path, monkeypatch):
    directory = tmp_path / "stopped"
    original = journal.Journal.training

    def stop_at_six(self, step, values, **more):
        original(self, step, values, **more)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(journal.Journal, "training", stop_at_six)
    assert train.main([*settings(data), "--run-dir", str(directory)]) == 143
    monkeypatch.setattr(journal.Journal, "training", original)
    assert max(losses(directory)) in (6, 7, 8)
    assert train.main(["--resume", str(directory)]) == 0
    assert losses(directory) == losses(finished)


def test_resume_under_another_config_is_refused_with_the_differences(data, finished, capsys):
    before = sorted(p.name for p in finished.rglob("*"))
    with pytest.raises(UserError, match="decoder.hidden: 16 → 32.*seed: 0 → 1"):
        train.main([*settings(data, "seed=1", "decoder.hidden=32"), "--run-dir", str(finished)])
    with pytest.raises(UserError, match="seed: 0 → 1"):
        train.main(["--resume", str(finished), "seed=1"])
    assert sorted(p.name for p in finished.rglob("*")) == before


@pytest.mark.parametrize("change, words", [
    ("batch_size=12", "batch_size=12 .* 8 devices"),
    ("phases.0.optim.learning_rat=1", "did you mean 'phases.0.optim.learning_rate'"),
    ("data.train=training", "no split 'training'.*train, val"),
    ("data.label=other", "not prepared.*jaxcap.prepare"),
    ("encoder.weights=/nowhere/weights.h5", "/nowhere/weights.h5"),
    ("encoder.name=smal_cnn", "small_cnn"),
    ("vocabulary.min_count=1000", "min_count"),
])
def test_bad_input_leaves_nothing_behind(data, tmp_path, change, words):
    with pytest.raises(UserError, match=words) as error:
        train.main([*settings(data), change, "--run-dir", str(tmp_path / "run")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_cannot_be_written(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train.main([*settings(data), "--run-dir", str(tmp_path / "file" / "run")])


def test_a_loss_that_is_not_a_number_stops_and_says_where(data, tmp_path):
    with pytest.raises(UserError, match=r"at step \d+ the loss is .*decoder/.*last good checkpoint is step 4") as error:
        train.main([*settings(data, "phases.0.optim.learning_rate=1e38", "phases.0.optim.warmup_steps=0",
                              "phases.0.optim.clip_norm=0", "phases.0.optim.name=sgd", "checkpoints.every_steps=1",
                              "eval_during=false"), "--run-dir", str(tmp_path / "run")])
    step = int(str(error.value).split("at step ")[1].split()[0])
    kept = checkpoints.Checkpoints(tmp_path / "run" / "checkpoints", config.Checkpoints()).steps()
    assert kept and max(kept) < step


def test_evaluate_scores_the_best_checkpoint_again(finished, capsys):
    before = json.loads((finished / "results" / "val.scores.json").read_text())
    assert not evaluate.main([str(finished), "--split", "val"])
    after = json.loads((finished / "results" / "val.scores.json").read_text())
    assert after["bleu4"] == pytest.approx(before["bleu4"], abs=1e-6)
    assert "BLEU-4" in capsys.readouterr().out
    assert len(after["photos"]) == 8
    with pytest.raises(UserError, match="no split 'test'"):
        evaluate.main([str(finished), "--split", "test"])


def test_caption_takes_photos_of_any_kind_and_skips_damaged_ones(finished, tmp_path, capsys):
    Image.new("RGB", (300, 200), (220, 40, 40)).save(tmp_path / "a.jpg")
    Image.new("L", (1, 1), 200).save(tmp_path / "b.png")
    Image.new("RGBA", (64, 90), (40, 60, 220, 128)).save(tmp_path / "c.webp")
    (tmp_path / "d.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:300])
    (tmp_path / "e.jpg").write_text("not a photo")
    (tmp_path / "f.jpg").touch()
    assert caption.main([str(finished), str(tmp_path), "--json", "--top", "2", "--beam", "3"]) == 1
    output = capsys.readouterr()
    lines = [json.loads(line) for line in output.out.splitlines()]
    assert [Path(line["photo"]).name for line in lines] == ["a.jpg", "b.png", "c.webp"]
    for line in lines:
        first, second = line["captions"]
        assert first["text"] and 0 > first["log_prob"] >= second["log_prob"]
    for name in "def":
        assert f"{name}.jpg" in output.err
    assert "3 of 6" in output.err
    assert caption.main([str(finished), str(tmp_path / "a.jpg")]) == 0
    assert "(p = " in capsys.readouterr().out
    with pytest.raises(UserError, match="no photo or folder"):
        caption.main([str(finished), str(tmp_path / "nothing.jpg")])
    with pytest.raises(UserError, match="not a run directory"):
        caption.main([str(tmp_path), str(tmp_path / "a.jpg")])


def copied(finished, tmp_path):
    import shutil
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_a_half_written_checkpoint_is_passed_over_or_named(finished, tmp_path):
    run = copied(finished, tmp_path)
    newest = run / "checkpoints" / "12"
    half = run / "checkpoints" / "16.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "junk").write_text("x")
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    assert caption.main([str(run), str(tmp_path / "a.png")]) == 0
    for file in (newest / "model").rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="checkpoint .*12.* cannot be read"):
        caption.main([str(run), str(tmp_path / "a.png"), "--step", "12"])


def test_a_vocabulary_larger_than_the_model_is_refused(finished, tmp_path):
    run = copied(finished, tmp_path)
    path = run / "vocabulary.tsv"
    count = len(path.read_text().splitlines()) - 1
    path.write_text(path.read_text() + f"{count}\t1\tzebra\n")
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="vocabulary"):
        caption.main([str(run), str(tmp_path / "a.png")])


def test_two_phases_with_a_frozen_one_on_cached_features(data, tmp_path):
    page = tmp_path / "two.py"
    page.write_text("import dataclasses\nfrom jaxcap.config import *\n"
                    "CONFIG = dataclasses.replace(SHAPES, name='two', phases=("
                    "Phase('decoder', 'decoder', steps=6, optim=Optim('adam', learning_rate=0.01)),"
                    "Phase('everything', 'all', steps=4, batch_norm='sync', optim=Optim('adam', learning_rate=0.001))))\n")
    own = [s for s in settings(data) if not s.startswith("phases")]
    assert train.main([str(page), *own, "--run-dir", str(tmp_path / "run")]) == 0
    lines = [line for line in journal.read(tmp_path / "run") if "loss" in line]
    assert [line["phase"] for line in lines] == ["decoder"] * 6 + ["everything"] * 4
    assert lines[6]["loss"] < lines[0]["loss"]
    cached = list(data.rglob("features/*.npy"))
    assert sorted(path.name.split("-")[0] for path in cached) == ["train", "val"]
    modified = [path.stat().st_mtime_ns for path in cached]
    assert train.main([str(page), *own, "--run-dir", str(tmp_path / "again"), "phases.1.steps=1"]) == 0
    assert [path.stat().st_mtime_ns for path in cached] == modified  # read, not computed again


def test_disk_full_while_saving_keeps_the_last_good_checkpoint(data, tmp_path):
    """A subprocess whose files may not grow past a limit that only a large model's checkpoint reaches."""
    directory = tmp_path / "run"
    assert train.main([*settings(data, "phases.0.steps=4", "decoder.hidden=64"), "--run-dir", str(directory)]) == 0
    code = ("import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "from jaxcap import train, errors, checkpoints;"
            "original = checkpoints.Checkpoints.save\n"
            "def save(self, *a, **k):\n"
            "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); return original(self, *a, **k)\n"
            "checkpoints.Checkpoints.save = save\n"
            "errors.run_command(lambda: train.main(sys.argv[1:]))")
    longer = settings(data, "phases.0.steps=4", "decoder.hidden=64", "eval_during=false")
    (directory / "config.json").unlink()  # as if the run had been longer from the beginning
    (directory / "config.json").write_text(json.dumps(config.to_dict(
        config.load(None, [*longer, "phases.0.steps=8"]))))
    done = subprocess.run([sys.executable, "-c", code, "--resume", str(directory)], capture_output=True, text=True,
                          cwd=ROOT, timeout=300)
    assert done.returncode == 2, done.stderr[-2000:]
    message = done.stderr.strip().splitlines()[-1]
    assert "checkpoint could not be written" in message and "last good one is step 4" in message
    assert "Traceback" not in done.stderr
    assert checkpoints.Checkpoints(directory / "checkpoints", config.Checkpoints()).steps() == [4]
