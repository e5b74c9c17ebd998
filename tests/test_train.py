"""Training end to end on a handful of photos: one directory, resumption bit for bit, clear words when something is wrong."""

import contextlib
import errno
import functools
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

import jaxcap
from jaxcap import (caption, captioner, checkpoints, config, errors, evaluate, explain, features, feed, inference, journal, parallel, prepare,
                    runs, session, train, vocab, weights)
from jaxcap import step as steps
from jaxcap.data import records
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
    (root / "tiny.py").write_text(PAGE)
    return root / "prepared"


PAGE = """
from jaxcap.config import *

CONFIG = Config(
    name="tiny", batch_size=8, eval_batch_size=8, log_every=1,
    data=Data(name="folder", label="tiny", size=32, max_words=8),
    vocabulary=Vocabulary(min_count=1),
    encoder=Encoder(name="small_cnn"),
    decoder=Decoder(embedding=16, hidden=16, dropout=0.1),
    phases=(Phase(train="all", steps=12, from_scratch=True, optim=Optim("adam", learning_rate=0.03)),),
    checkpoints=Checkpoints(every_steps=4),
)
"""


def settings(data: Path, *more: str) -> list[str]:
    return [str(data.parent / "tiny.py"), f"data.dir={data}", *more]


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


def test_a_stop_that_falls_on_a_checkpoint_leaves_it_scored(data, finished, tmp_path, monkeypatch):
    directory, original = tmp_path / "a run", parallel.Parallel.pace
    steps, said = itertools.count(1), []

    def stop_in_the_last_step(self, metrics):
        original(self, metrics)
        if next(steps) == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(parallel.Parallel, "pace", stop_in_the_last_step)
        patch.setattr(journal.Journal, "say", lambda self, text: said.append(text))
        assert train.main([*settings(data), "--run-dir", str(directory)]) == 143
    assert said[-1].endswith(f"--resume='{directory}'")  # to be pasted as it is
    assert train.main(["--resume", str(directory)]) == 0
    for name in ("val.json", "val.scores.json"):
        assert (directory / "results" / name).read_bytes() == (finished / "results" / name).read_bytes()
    scored = [[line["step"] for line in journal.read(run) if "bleu4" in line] for run in (directory, finished)]
    assert scored[0] == scored[1]


def test_a_run_knows_its_places_from_any_directory(data, finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.chdir(data.parent)
    start = os.path.relpath(finished)
    begin = [str(data.parent / "tiny.py"), f"data.dir={data.name}", f"start={start}", "phases.0.from_scratch=false", "phases.0.steps=2", "eval_during=false"]
    assert train.main([*begin, "--run-dir", str(run)]) == 0
    written = json.loads((run / "config.json").read_text())
    assert (written["data"]["dir"], written["start"]) == (str(data), str(finished))
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(run / "checkpoints")
    assert train.main(["--resume", str(run)]) == 0
    (tmp_path / "moved").symlink_to(data)  # the same data elsewhere are no other config
    assert train.main(["--resume", str(run), "data.dir=moved"]) == 0


def test_a_state_packed_as_nvidia_cards_have_it_trains_saves_resumes_and_draws(data, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(captioner, "build", functools.partial(captioner.build, platform="gpu"))
    packed = tmp_path / "packed"
    assert train.main([*settings(data), "--run-dir", str(packed)]) == 0
    whole = losses(packed)
    assert list(whole.values()) == pytest.approx(list(losses(finished).values()), rel=0.05)
    shutil.rmtree(packed / "checkpoints" / "12")
    assert train.main(["--resume", str(packed)]) == 0
    assert losses(packed) == whole
    rewarded = [f"start={packed}", "phases.0.objective=reward", "phases.0.steps=2", "phases.0.from_scratch=false"]
    assert train.main([*settings(data, *rewarded), "--run-dir", str(tmp_path / "rewarded")]) == 0
    assert len(losses(tmp_path / "rewarded")) == 2


def test_several_steps_a_dispatch_stop_and_resume_alike(data, tmp_path, monkeypatch):
    several = settings(data, "steps_per_dispatch=3", "phases.0.steps=19", "eval_during=false")
    assert train.main([*several, "--run-dir", str(tmp_path / "whole")]) == 0
    whole = losses(tmp_path / "whole")
    assert max(whole) == 19 and len(whole) == 8  # an epoch of 8 batches is 3, 3 and 2; the third ends at its third
    assert (tmp_path / "whole" / "checkpoints" / "19").exists()
    save = train.save

    def stop_after_the_first(session, *rest, **more):
        save(session, *rest, **more)
        session.stop.number = signal.SIGTERM

    monkeypatch.setattr(train, "save", stop_after_the_first)
    assert train.main([*several, "--run-dir", str(tmp_path / "stopped")]) == 143
    monkeypatch.setattr(train, "save", save)
    assert 0 < max(losses(tmp_path / "stopped")) < 19
    monkeypatch.setattr(feed, "steps_per_dispatch", None)  # a run keeps what it began with, whatever the device
    assert train.main(["--resume", str(tmp_path / "stopped")]) == 0
    assert losses(tmp_path / "stopped") == whole


def test_threads_that_open_a_split_together_open_it_once_and_silence_nobody(data, monkeypatch):
    split = records.open_split(config.Data("folder", str(data), "tiny", 32), "train")
    stdout, opened, opening = sys.stdout, [], records.tfds.builder_from_directory

    def slowly(path):
        opened.append(sys.stdout)
        time.sleep(0.1)
        return opening(path)

    monkeypatch.setattr(records.tfds, "builder_from_directory", slowly)
    with ThreadPoolExecutor(8) as pool:
        assert len({image.tobytes() for image in pool.map(split.image, range(16))}) == 16
    assert opened == [stdout] and sys.stdout is stdout


def test_captions_of_a_photo_learn_from_one_look(data, tmp_path, capsys):
    assert train.main([*settings(data), "data.captions_per_photo=2", "phases.0.steps=8", "eval_during=false",
                       "--run-dir", str(tmp_path / "run")]) == 0
    assert "batch 8 photos × 2 captions" in capsys.readouterr().err
    lines = [line for line in journal.read(tmp_path / "run") if "loss" in line]
    assert lines[3]["epoch"] == 1  # 32 photos in four steps
    assert lines[-1]["loss"] < lines[0]["loss"]


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
    ("data.captions_per_photo=0", "data.captions_per_photo must be at least 1"),
    ("name=../elsewhere", "must not hold a /"),
    ("name=b\udcffd", "name b'b.xffd' is not UTF-8"),
])
def test_bad_input_leaves_nothing_behind(data, tmp_path, change, words):
    with pytest.raises(UserError, match=words) as error:
        train.main([*settings(data), change, "--run-dir", str(tmp_path / "run")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_encoder_that_is_not_there_is_said_before_data_are_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "open_split", lambda *a: pytest.fail("a split was opened"))
    with pytest.raises(UserError, match="did you mean 'small_cnn'"):
        train.main(["encoder.name=smal_cnn", "batch_size=16", "--run-dir", str(tmp_path / "run")])


def test_a_run_directory_that_cannot_be_written(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train.main([*settings(data), "--run-dir", str(tmp_path / "file" / "run")])


def test_a_loss_that_is_not_a_number_stops_and_says_where(data, tmp_path):
    with pytest.raises(UserError, match=r"at step \d+ the loss is .* is not finite; the last good checkpoint is") as error:
        train.main([*settings(data, "phases.0.optim.learning_rate=1e38", "phases.0.optim.warmup_steps=0",
                              "phases.0.optim.clip_norm=0", "phases.0.optim.name=sgd", "checkpoints.every_steps=1",
                              "eval_during=false"), "--run-dir", str(tmp_path / "run")])
    step = int(str(error.value).split("at step ")[1].split()[0])
    kept = checkpoints.Checkpoints(tmp_path / "run" / "checkpoints", config.Checkpoints()).steps()
    assert kept and max(kept) < step


def test_a_phase_inside_its_warm_up_is_said_before_it_trains(data, tmp_path, monkeypatch):
    said = []

    def enough(*_):
        raise UserError("enough")

    monkeypatch.setattr(journal.Journal, "say", lambda self, text: said.append(text))
    monkeypatch.setattr(train, "run_phase", enough)
    with pytest.raises(UserError, match="enough"):
        train.main([*settings(data), "phases.0.optim.warmup_steps=12", "--run-dir", str(tmp_path / "run")])
    assert said[1:] == ["beware: phase decoder ends with step 12 of warmup_steps=12: its learning rate never reaches 0.03; "
                        "set phases.0.optim.warmup_steps lower or phases.0.steps higher"]
    longer = [f"phases.0.{key}" for key in ("steps=0", "epochs=3", "optim.warmup_steps=12")]
    assert train.warm_throughout(config.load(settings(data)[0], longer), [13]) == []
    assert "or phases.0.epochs higher" in train.warm_throughout(config.load(settings(data)[0], longer), [3])[0]


def test_a_gradient_that_is_not_a_number_is_named(finished):
    keeper = types.SimpleNamespace(steps=lambda: [])
    norms = {"encoder": 1.0, "decoder/lstm_kernel": float("nan"), "decoder/lstm_bias": float("inf")}
    good = steps.Metrics(1.0, 0.0, 1.0, dict.fromkeys(norms, 1.0), 5.0)
    with pytest.raises(UserError, match="at step 8 the loss is 2 and the gradient of decoder/lstm_kernel, decoder/lstm_bias is "
                                        "not finite; no checkpoint was written before"):
        train.check_finite([good, good._replace(loss=2.0, norms=norms), good], 9, types.SimpleNamespace(keeper=keeper))


def test_evaluate_scores_the_best_checkpoint_again(finished, capsys):
    before = json.loads((finished / "results" / "val.scores.json").read_text())
    assert not evaluate.main([str(finished), "--split", "val"])
    after = json.loads((finished / "results" / "val.scores.json").read_text())
    assert after["bleu4"] == pytest.approx(before["bleu4"], abs=1e-6)
    assert "BLEU-4" in capsys.readouterr().out
    assert len(after["photos"]) == 8
    with pytest.raises(UserError, match="no split 'test'"):
        evaluate.main([str(finished), "--split", "test"])


def test_results_of_other_settings_leave_the_runs_own_alone(finished, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    before = [(run / "results" / name).read_bytes() for name in ("val.json", "val.scores.json")]
    monkeypatch.setattr(evaluate.Evaluator, "captions", lambda self, *_: {i: inference.Caption("a wall", 0.0) for i in self.split.image_ids})
    for flags in (["--beam", "10", "--consensus"], ["--step", "4"], ["--average", "2", "--length-normalization", "0.7"],
                  ["--forbid", "red"], ["--forbid", "blue"], ["--forbid", "red"]):
        assert not evaluate.main([str(run), *flags])
    assert f"captions and scores: {run / 'results' / 'val.beam10-consensus.json'} and .scores.json" in capsys.readouterr().out
    assert [(run / "results" / name).read_bytes() for name in ("val.json", "val.scores.json")] == before
    assert {path.name for path in (run / "results").glob("*.scores.json")} == {f"{name}.scores.json" for name in (
        "val", "val.beam10-consensus", "val.step4", "val.average2-length_normalization0.7", "val.forbidden", "val.forbidden-2")}
    assert json.loads((run / "results" / "val.forbidden-2.scores.json").read_text())["search"]["forbidden"] == ["blue"]
    assert not evaluate.main([str(run), "--beam", "3"])  # the run's own
    assert (run / "results" / "val.json").read_bytes() != before[0]


def test_a_place_for_results_that_cannot_be_written_is_said_before_anything_is_captioned(finished, tmp_path, monkeypatch):
    run = copied(finished, tmp_path)
    shutil.rmtree(run / "results")
    (run / "results").write_text("a file in the way")
    monkeypatch.setattr(evaluate.Evaluator, "captions", lambda *a: pytest.fail("photos were captioned"))
    with pytest.raises(UserError, match="results cannot be written to .*copy/results: Not a directory; copy the run to where they can"):
        evaluate.main([str(run)])


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


def test_a_run_is_called_with_photos(finished, tmp_path, capsys):
    for name, color in (("a.png", (220, 40, 40)), ("b.png", (40, 220, 40))):
        Image.new("RGB", (30, 20), color).save(tmp_path / name)
    assert caption.main([str(finished), str(tmp_path), "--beam", "2", "--must-contain", "a", "--json"]) == 0
    expected = [json.loads(line)["captions"][0] for line in capsys.readouterr().out.splitlines()]
    write = jaxcap.load(str(finished), beam=2, must_contain=["a"])
    found = write(str(tmp_path / "a.png"), tmp_path / "b.png")
    assert [one.text for one in found] == [one["text"] for one in expected]
    np.testing.assert_allclose([one.log_prob for one in found], [one["log_prob"] for one in expected], rtol=1e-5)
    (tmp_path / "b.png").write_text("not a photo")
    with pytest.raises(UserError, match="b.png cannot be read: "):
        write(tmp_path / "a.png", tmp_path / "b.png")
    assert write() == []
    with pytest.raises(UserError, match="beem"):
        jaxcap.load(finished, beem=2)


def test_calls_with_other_numbers_of_photos_share_a_compiled_program(finished, tmp_path, monkeypatch):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    write, sizes = jaxcap.load(finished, beam=1), []
    decode = write._decode

    def noted(params, look, seen, first):
        sizes.append(len(jax.tree.leaves(seen)[0]))
        return decode(params, look, seen, first)

    monkeypatch.setattr(write, "_decode", noted)
    for photos in (17, 25, 32):  # which fill 24, 32 and 32 places on 8 devices
        assert len(write(*[tmp_path / "a.png"] * photos)) == photos
    assert sizes == [32] * 3
    assert len(write(*[tmp_path / "a.png"] * 40)) == 40
    assert sizes[3:] == [32] * 2


def test_a_called_run_keeps_compiled_programs_as_commands_do(finished, tmp_path, monkeypatch):
    kept = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        jaxcap.load(finished)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache" / "jaxcap" / "compiled")
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)


def copied(finished, tmp_path):
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
    with pytest.raises(UserError, match="checkpoint .*12.* cannot be read.*delete it to go on from step 8"):
        caption.main([str(run), str(tmp_path / "a.png"), "--step", "12"])


@pytest.mark.parametrize("command, key, value, words", [
    (caption, "decoder", {"hidden": 20}, r"decoder/logits_kernel is \(16, \d+\) there and \(20, \d+\) by config.json"),
    (caption, "decoder", {"layers": 2}, r"decoder/lstm1_bias is absent there and .* by config.json"),
    (train, "phases", [{"steps": 14, "optim": {"name": "sgd"}}], r"opt_state/1/count is \(\) there and absent by config.json")])
def test_a_config_that_does_not_describe_the_checkpoint_is_blamed_and_not_the_checkpoint(command, key, value, words, finished, tmp_path):
    run = copied(finished, tmp_path)
    description = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**description, key: {**description[key], **value} if isinstance(value, dict) else value}))
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    arguments = ["--resume", str(run)] if command is train else [str(run), str(tmp_path / "a.png"), "--step", "12"]
    with pytest.raises(UserError, match=f"copy/config.json does not describe the checkpoint .*/12: {words}; put back the config.json"):
        command.main(arguments)


def test_a_vocabulary_larger_than_the_model_is_refused(finished, tmp_path):
    run = copied(finished, tmp_path)
    path = run / "vocabulary.tsv"
    count = len(path.read_text().splitlines()) - 1
    path.write_text(path.read_text() + f"{count}\t1\tzebra\n")
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="vocabulary"):
        caption.main([str(run), str(tmp_path / "a.png")])


@pytest.mark.parametrize("lines", [5, -1])
def test_resume_with_another_vocabulary_blames_the_vocabulary_not_the_checkpoint(lines, finished, tmp_path):
    run = copied(finished, tmp_path)
    path = run / "vocabulary.tsv"
    path.write_text("".join(path.read_text().splitlines(True)[:lines]))
    with pytest.raises(UserError, match="vocabulary.tsv has .* words, but the model of step 12 was trained with .*; put back"):
        train.main(["--resume", str(run)])


def test_resume_elsewhere_is_refused_and_a_bad_key_of_a_run_is_said_with_its_file(finished, tmp_path):
    run = copied(finished, tmp_path)
    with pytest.raises(UserError, match="--resume goes on in .*leave one of them out"):
        train.main(["--resume", str(run), "--run-dir", str(tmp_path / "elsewhere")])
    path = run / "config.json"
    path.write_text(path.read_text().replace('"hidden"', '"hiddn"'))
    with pytest.raises(UserError, match="config.json: there is no setting 'decoder.hiddn'"):
        train.main(["--resume", str(run)])
    path.write_text("[" * 200_000)
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        train.main(["--resume", str(run)])


def test_a_line_of_the_journal_that_cannot_be_read_costs_no_other(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{garbage\n{"step": "x"}\n{"step": null}\n{"step": 2, "\xff": 0}\n{"step": 2}\n[3]\n'
                                             + b"[" * 200_000 + b'\n{"step": 9}\n{"step"')
    log = journal.Journal(tmp_path, total=10, step=2)
    log.close()
    assert journal.read(tmp_path) == [{"step": 1}, {"step": 2}]
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl.tmp").mkdir()
    capsys.readouterr()
    with pytest.raises(UserError, match="metrics.jsonl cannot be written: Is a directory; move the run to where it can be written and resume"):
        journal.Journal(tmp_path, total=10)
    assert not capsys.readouterr().err  # no bar before the error


def events(directory: Path) -> list[Event]:
    """TensorBoard's: a file of records, each a length, its checksum, so many bytes and theirs."""
    (path,) = directory.glob("events.out.tfevents.*")
    data, found = path.read_bytes(), []
    while data:
        length, head = struct.unpack("<QI", data[:12])
        content, (tail,), data = data[12:12 + length], struct.unpack("<I", data[12 + length:16 + length]), data[16 + length:]
        assert head == masked_crc32c(struct.pack("<Q", length)) and tail == masked_crc32c(content)
        found.append(Event.FromString(content))
    return found


def test_the_journal_is_written_for_tensorboard_too(tmp_path):
    log = journal.Journal(tmp_path, total=10, step=2)
    log.training(3, [1.0, 3.0], phase="all", reward=float("nan"))
    assert [event.step for event in events(tmp_path)] == [0, 3, 3]  # the first values are to be seen at once
    log.scores(4, 0.5, "val", {"bleu4": 25.0})
    log.close()
    version, start, training, scores = events(tmp_path)
    assert version.file_version == "brain.Event:2" and start.session_log.status == SessionLog.START
    assert [(event.step, {value.tag: value.simple_value for value in event.summary.value}) for event in (training, scores)] == [
        (3, {"train/loss": 2.0, "train/loss_smooth": np.float32(1.04), "train/step_ms": np.float32(journal.read(tmp_path)[0]["step_ms"])}),
        (4, {"val/epoch": 0.5, "val/bleu4": 25.0})]
    assert abs(time.time() - scores.wall_time) < 60


def test_training_loads_no_pytorch_and_takes_none_away(tmp_path):
    (tmp_path / "torch.py").write_text("print('loaded')")
    code = ("import pathlib, sys; from jaxcap import caption, journal, train\n"
            "journal.Journal(pathlib.Path(sys.argv[1]), total=1).close()\n"
            "assert list(pathlib.Path(sys.argv[1]).glob('events.out.tfevents.*')) and 'torch' not in sys.modules\n"
            "import torch")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stdout) == (0, "loaded\n"), done.stderr[-2000:]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
@pytest.mark.parametrize("full", [("events",), ("events", "metrics")])
def test_a_disk_that_fills_up_ends_the_journal_with_a_sentence(full, tmp_path):
    code = ("import builtins, pathlib, sys; from jaxcap import errors, journal; original = builtins.open\n"
            "builtins.open = lambda path, *a: original('/dev/full' if 'events.out' in str(path) else path, *a)\n"
            "def main():\n"
            "    log = journal.Journal(pathlib.Path(sys.argv[1]), total=50)\n"
            "    if 'metrics' in sys.argv: log._file = original('/dev/full', 'a')\n"
            "    try:\n"
            "        for step in range(1, 51): log.training(step, [1.0])\n"
            "    finally:\n"
            "        log.close()\n"
            "errors.run_command(main)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), *full], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert re.fullmatch("error: .*metrics.jsonl cannot be written: No space left on device; free the disk.*", done.stderr.splitlines()[-1])


def test_json_is_json_in_any_locale(data, finished, tmp_path, monkeypatch):
    photo, out = tmp_path / "café.png", io.TextIOWrapper(io.BytesIO(), "ascii", "backslashreplace")
    shutil.copy(data.parent / "photos" / "39.png", photo)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert caption.main([str(finished), str(photo), "--json"]) == 0
    assert json.loads(out.buffer.getvalue())["photo"] == str(photo)


def test_pictures_of_photos_with_one_name_have_names_of_their_own():
    paths = [Path(name) for name in ("a/1.jpg", "b/1.jpg", "b/1.png", "1-2.jpg", "c/2.jpg")]
    assert caption.explained_names(paths) == [f"{name}.explained.png" for name in ("1", "1-2", "1-3", "1-2-2", "2")]


def test_letters_that_the_font_of_a_picture_lacks_are_named_once(data, finished, tmp_path, monkeypatch, capsys):
    photos = [str(data.parent / "photos" / f"{i}.png") for i in (38, 39)]
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    words = run / "vocabulary.tsv"
    words.write_text(re.sub(r"\t(?!<)\w+$", "\\g<0>ж", words.read_text("utf-8"), flags=re.M), encoding="utf-8")
    original, files = explain.word_font, []
    monkeypatch.setattr(explain, "word_font", lambda file=None: files.append(file) or original())
    assert caption.main([str(run), *photos, "--explain", "--out", str(tmp_path), "--font", "some.ttf"]) == 0
    assert files == ["some.ttf"] and capsys.readouterr().err == "the font lacks ж; name another with --font\n"
    monkeypatch.undo()
    with pytest.raises(UserError, match="font .*none.ttf cannot be read"):
        caption.main(["no run", photos[0], "--explain", "--font", str(tmp_path / "none.ttf")])
    for option in ("--font", "--out"):
        with pytest.raises(UserError, match=f"{option} does nothing without --explain"):
            caption.main(["no run", photos[0], option, "some"])


def test_two_phases_with_a_frozen_one_on_cached_features(data, tmp_path):
    page = tmp_path / "two.py"
    page.write_text("import dataclasses\nfrom jaxcap.config import *\n"
                    f"CONFIG = dataclasses.replace(load({settings(data)[0]!r}), name='two', phases=("
                    "Phase('decoder', 'decoder', steps=6, optim=Optim('adam', learning_rate=0.01)),"
                    "Phase('everything', 'all', steps=4, batch_norm='sync', optim=Optim('adam', learning_rate=0.001))))\n")
    own = [str(page), *settings(data)[1:]]
    assert train.main([*own, "--run-dir", str(tmp_path / "run")]) == 0
    lines = [line for line in journal.read(tmp_path / "run") if "loss" in line]
    assert [line["phase"] for line in lines] == ["decoder"] * 6 + ["everything"] * 4
    assert lines[6]["loss"] < lines[0]["loss"]
    cached = list(data.rglob("features/*.npy"))
    assert sorted(path.name.split("-")[0] for path in cached) == ["train", "val"]
    modified = [path.stat().st_mtime_ns for path in cached]
    assert train.main([*own, "--run-dir", str(tmp_path / "again"), "phases.1.steps=1"]) == 0
    assert [path.stat().st_mtime_ns for path in cached] == modified  # read, not computed again


def test_a_run_from_nothing_compiles_a_step_a_phase_and_reads_its_photos_once(data, tmp_path, monkeypatch):
    compiled, read = [], []
    wrap, images = parallel.Parallel.wrap, records.Split.images

    def note_steps(devices, function, **options):
        wrapped = wrap(devices, function, **options)
        if options.get("donate"):
            compiled.append(wrapped)
        return wrapped

    def note_reading(split, indices):
        read.append((split.name, len(indices)))
        return images(split, indices)

    monkeypatch.setattr(parallel.Parallel, "wrap", note_steps)
    monkeypatch.setattr(records.Split, "images", note_reading)
    page = tmp_path / "two.py"
    phase = "Phase(train='all', steps=2, from_scratch=True, optim=Optim('adam'), objective={!r})"
    page.write_text("import dataclasses\nfrom jaxcap.config import *\n"
                    f"CONFIG = dataclasses.replace(load({settings(data)[0]!r}), phases=({phase.format('words')}, {phase.format('captions')}))\n")
    assert train.main([str(page), *settings(data)[1:], "eval_during=false", "--run-dir", str(tmp_path / "run")]) == 0
    assert [step._cache_size() for step in compiled] == [1, 1]
    assert [(name, photos) for name, photos in read if name == "train"] == [("train", 32)]


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
        config.load(longer[0], [*longer[1:], "phases.0.steps=8"]))))
    done = subprocess.run([sys.executable, "-c", code, "--resume", str(directory)], capture_output=True, text=True,
                          cwd=ROOT, timeout=300)
    assert done.returncode == 2, done.stderr[-2000:]
    (message,) = [line for line in done.stderr.splitlines() if "checkpoint could not be written" in line]
    assert "last good one is step 4" in message and "Traceback" not in done.stderr
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["4"]
    assert checkpoints.Checkpoints(directory / "checkpoints", config.Checkpoints()).steps() == [4]


def test_a_disk_without_room_is_said_before_anything_is_written(data, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="could not be written .*MiB are needed and 0 MiB are free.*none was written before"):
        train.main([*settings(data), "--run-dir", str(tmp_path / "run")])
    assert not any((tmp_path / "run" / "checkpoints").iterdir())
    monkeypatch.undo()  # a run without a checkpoint may begin anew with what was wrong put right
    assert train.main([*settings(data), "seed=5", "--run-dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 5


@pytest.mark.parametrize(("name", "changes"), [
    ("attention, frozen", ["encoder.name=efficientnet_lite0", "decoder.image=attention", "decoder.attention.size=8", "decoder.attention.doubly_stochastic=1.0",
                           "decoder.standardize=true", "augment.flip=true", "augment.views=2", "phases.0.train=decoder", "phases.0.from_scratch=false"]),
    ("photo with every word, frozen", ["encoder.name=efficientnet_lite0", "decoder.image=every", "decoder.deep_output=true", "decoder.standardize=true",
                                       "decoder.deviations=12", "phases.0.train=decoder", "phases.0.from_scratch=false"]),
    ("gru, joint, own words", ["decoder.name=gru", "decoder.layers=2", "phases.0.sampling=linear", "phases.0.sampling_share=0.5"]),
    ("attention, joint, own words", ["decoder.image=attention", "decoder.attention.gate=true", "decoder.deep_output=true",
                                     "decoder.tied=true", "phases.0.sampling=inverse_sigmoid", "encoder.dropout=0.2",
                                     "phases.0.batch_norm=batch"]),
])
def test_every_kind_of_decoder_trains_resumes_and_writes(name, changes, data, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = settings(data, "phases.0.steps=8", "eval_during=false", *changes)
    assert train.main([*arguments, "phases.0.optim.learning_rate=0.01", "--run-dir", str(run)]) == 0
    found = losses(run)
    assert len(found) == 8 and np.isfinite(list(found.values())).all()
    assert np.mean([found[step] for step in (5, 6, 7, 8)]) < np.mean([found[step] for step in (1, 2, 3, 4)])
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "8")
    assert train.main(["--resume", str(tmp_path / "again")]) == 0
    assert losses(tmp_path / "again")[8] == found[8]  # to the last bit
    photo = data.parent / "photos" / "39.png"
    capsys.readouterr()
    assert caption.main([str(run), str(photo), "--explain", "--out", str(tmp_path / "maps")]) == 0
    assert "39.explained.png" in capsys.readouterr().out and Image.open(tmp_path / "maps" / "39.explained.png").width > 224


def test_a_stop_while_features_are_computed_keeps_them(data, tmp_path, monkeypatch, capsys):
    original, asked = features.photo_batches, []

    def stopping(split, batch_size, start=0):
        for i, batch in enumerate(original(split, batch_size, start)):
            asked.append(start + i * batch_size)
            if len(asked) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(features, "photo_batches", stopping)
    run = tmp_path / "run"
    arguments = settings(data, "phases.0.steps=4", "eval_during=false", "eval_batch_size=8", "phases.0.train=decoder", "decoder.init_scale=0.07")
    assert train.main([*arguments, "seed=77", "--run-dir", str(run)]) == 128 + signal.SIGTERM
    assert asked == [0, 8] and "stopped at step 0; continue with: python -m jaxcap.train --resume" in capsys.readouterr().err
    assert train.main(["--resume", str(run)]) == 0
    assert asked == [0, 8, 16, 24, 0] and sorted(losses(run)) == [1, 2, 3, 4]


def test_a_run_that_goes_on_from_another_does_so_too_when_resumed_before_its_first_checkpoint(data, finished, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    begun = settings(data, f"start={finished}", "phases.0.from_scratch=false", "phases.0.steps=2", "eval_during=false")
    assert train.main([*begun, "--run-dir", str(whole)]) == 0
    again.mkdir()
    for name in ("config.json", "vocabulary.tsv"):  # all that there is before the first checkpoint
        shutil.copy(whole / name, again)
    assert train.main(["--resume", str(again)]) == 0
    assert losses(again) == losses(whole) and losses(whole)[1] < losses(finished)[1]


def test_a_run_with_published_weights_begins_with_those_and_the_usual_decoder(data, monkeypatch):
    configuration = config.load(*settings(data)[:1], [*settings(data)[1:], "encoder.weights=published.h5"])
    model, devices = captioner.build(configuration, 10), parallel.Parallel()
    monkeypatch.setattr(weights, "load", lambda path, spec, like: jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), like))
    state = session.initial_state(configuration, model, devices)
    usual, statistics = jax.jit(model.init, static_argnums=1)(jax.random.PRNGKey(configuration.seed), 32)
    jax.tree.map(np.testing.assert_array_equal, state.params["decoder"], usual["decoder"])
    assert all((leaf == 0.5).all() for leaf in jax.tree.leaves((state.params["encoder"], state.batch_stats)))
    described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert described((state.params, state.batch_stats)) == described((usual, statistics)) == described(model.shapes(32))


def test_a_run_resumes_without_the_published_weights_that_it_began_with(finished, tmp_path):
    run = copied(finished, tmp_path)
    page = json.loads((run / "config.json").read_text())
    page["encoder"]["weights"] = str(tmp_path / "gone.h5")
    (run / "config.json").write_text(json.dumps(page))
    assert train.main(["--resume", str(run)]) == 0
    assert (run / "results" / "val.json").read_bytes() == (finished / "results" / "val.json").read_bytes()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="there is no weights file .*gone.h5"):
        train.main(["--resume", str(run)])


def test_one_process_trains_in_a_directory_and_names_of_one_second_differ(data, finished, tmp_path, monkeypatch):
    before = (finished / "metrics.jsonl").read_text()
    with runs.alone(finished), pytest.raises(UserError, match="another process is training in .*whole; wait for it, or name another"):
        train.main(["--resume", str(finished)])
    assert (finished / "metrics.jsonl").read_text() == before
    monkeypatch.chdir(tmp_path)
    assert [str(runs.new_directory("tiny-1")) for _ in range(3)] == ["runs/tiny-1", "runs/tiny-1-2", "runs/tiny-1-3"]
    with pytest.raises(UserError, match="is not a run directory"):  # said before any data is opened or drawn
        train.main(["start=nowhere", "phases.0.from_scratch=true", "data.dir=drawn", "--run-dir", "again"])
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_epochs_that_are_too_many_steps_are_refused_and_leave_no_directory(data, tmp_path):
    with pytest.raises(UserError, match="2e.09 epochs of these data are 16,000,000,000 steps; at most"):
        train.main([*settings(data, "phases.0.steps=0", "phases.0.epochs=2e9"), "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_what_makes_a_directory_a_run_is_written_last(data, tmp_path, monkeypatch):
    def full(self, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched, pytest.raises(UserError, match="run directory .* cannot be written: No space left"):
        patched.setattr(vocab.Vocab, "save", full)
        train.main([*settings(data), "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "config.json").exists()


@contextlib.contextmanager
def processes(*arguments: str) -> Iterator[list[subprocess.Popen]]:
    """Two processes with four devices each that train as one; none is left behind."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu",
                   "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "TF_CPP_MIN_LOG_LEVEL": "3"}
    started = [subprocess.Popen([sys.executable, "-m", "jaxcap.train", *arguments], cwd=ROOT, text=True, env={**environment, "JAX_PROCESS_ID": str(i)},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(2)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()


def without_gloo(output):
    """What is left of a process's output without Gloo's words, whose threads write over each other in the middle of a line."""
    return re.sub(r"\[Gloo\] Rank|is connected to|Expected number of connected|peer ranks|is :|[\d.\s]", "", output)


def test_two_processes_train_stop_and_resume_as_one(data, tmp_path):
    frozen = settings(data, "phases.0.train=decoder", "phases.0.steps=300", "phases.0.from_scratch=false", "log_every=2", "checkpoints.every_steps=50",
                      "seed=21", "phases.0.optim.learning_rate=0.01")  # at 0.03 Adam makes much of what rounding differs by
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main([*frozen, "--run-dir", str(one)]) == 0
    for path in (data / "folder").rglob("*small_cnn*.npy"):
        path.unlink()  # features are computed once more, by one of the two
    with processes(*frozen, "--run-dir", str(two)) as running:
        last = time.monotonic() + 240
        while not (two / "checkpoints" / "50").exists() and all(process.poll() is None for process in running) and time.monotonic() < last:
            time.sleep(0.05)
        running[1].send_signal(signal.SIGTERM)  # the other one hears of it
        said = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [143, 143], said
    assert "stopped at step" in said[0][1] and not without_gloo(said[1][0]) and "training" not in said[1][1]
    assert not list((data / "folder").rglob("*.lock"))

    with processes("--resume", str(two)) as running:
        said = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert "report:" in said[0][0] and not without_gloo(said[1][0])
    expected, found = losses(one), losses(two)
    assert list(found) == list(range(2, 302, 2))
    np.testing.assert_allclose(list(found.values())[:32], list(expected.values())[:32], rtol=1e-4)
    np.testing.assert_allclose(found[300], expected[300], rtol=0.05)
    assert {path.name for path in two.iterdir() if not path.name.startswith("events")} == {
        path.name for path in one.iterdir() if not path.name.startswith("events")}
    assert len(json.loads((two / "results" / "val.json").read_text())) == 8


@pytest.mark.parametrize(("own", "other", "says"), [(False, False, None), (True, False, "no data"), (True, True, "no data"),
                                                    (False, True, "another process of this run cannot begin; its own message")])
def test_all_processes_begin_or_none(own, other, says, monkeypatch):
    monkeypatch.setattr(parallel, "largest", lambda number: max(number, int(other)))

    def begin():
        with parallel.all_or_none():
            if own:
                raise UserError("no data")

    if says is None:
        begin()
    else:
        with pytest.raises(UserError, match=says):
            begin()


def test_a_process_that_cannot_begin_takes_the_others_along(data, tmp_path, monkeypatch):
    """What this process finds is right, but another one said that it did not find its data."""
    told = iter([0, 0, 1])  # all have looked at the directory; it is this run's alone; the data
    monkeypatch.setattr(parallel, "largest", lambda number: next(told))
    with pytest.raises(UserError, match="another process of this run cannot begin"):
        train.main([*settings(data), "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_from_another_with_rewards(data, tmp_path, capsys):
    first = tmp_path / "first"
    assert train.main([*settings(data, "phases.0.steps=80", "checkpoints.every_steps=80"), "--run-dir", str(first)]) == 0
    rewarded = ["name=rewarded", f"start={first}", "phases.0.objective=reward", "phases.0.reward.samples=3", "phases.0.steps=8",
                "phases.0.from_scratch=false", "phases.0.optim.learning_rate=0.01"]
    run = tmp_path / "run"
    assert train.main([*settings(data, *rewarded), "--run-dir", str(run)]) == 0
    lines = [line for line in journal.read(run) if "reward" in line]
    assert len(lines) == 8 and lines[0]["reward"] > 0.5  # the captions of a decoder that has learned already
    assert (run / "vocabulary.tsv").read_bytes() == (first / "vocabulary.tsv").read_bytes()
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "8")
    assert train.main(["--resume", str(tmp_path / "again")]) == 0
    assert [line for line in journal.read(tmp_path / "again") if "reward" in line][-1]["reward"] == lines[-1]["reward"]
    with pytest.raises(UserError, match=r"does not fit this config: .*logits_kernel is \(16, 13\) there and \(20, 13\) here"):
        train.main([*settings(data, *rewarded, "decoder.hidden=20"), "--run-dir", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
