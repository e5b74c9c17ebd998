"""What a run keeps, caches, and how a command ends."""

import errno
import fcntl
import functools
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcap import captioner, checkpoints, config, errors, features, parallel
from jaxcap.data import records, shapes
from jaxcap.step import TrainState


def state(step: int) -> TrainState:
    weights = {"decoder": {"w": jnp.arange(12.0).reshape(3, 4) * step}}
    return TrainState(jnp.int32(step), weights, {"m": jnp.ones(3) * step}, {"momentum": weights}, jax.random.PRNGKey(step))


def position(step: int, phase: int = 0) -> dict:
    return {"step": step, "phase": phase, "phase_step": step, "words": 3}


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("text, words", [
    ("{", "a score file, .* is not valid JSON"),
    ("[" * 200_000, "a score file, .* is not valid JSON"),
    ('{"cider": 3}', "metrics holds cider, not bleu4; set checkpoints.best in the run's config.json"),
    ("{}", "a score file, .*3/metrics/metrics, holds no bleu4 that is a number; delete the checkpoint"),
    ("3", "holds no bleu4 that is a number"),
    ('{"bleu4": null}', "holds no bleu4 that is a number"),
])
def test_a_score_file_that_holds_no_score_is_named(text, words, read_only, tmp_path):
    (tmp_path / "3" / "metrics").mkdir(parents=True)
    (tmp_path / "3" / "metrics" / "metrics").write_text(text)
    with pytest.raises(errors.UserError, match=words):
        checkpoints.Checkpoints(tmp_path, config.Checkpoints(), read_only=read_only).best_step()


def test_a_position_without_its_numbers_is_a_damaged_checkpoint(tmp_path):
    keeper = checkpoints.Checkpoints(tmp_path, config.Checkpoints())
    for step in (1, 2):
        keeper.save(state(step), position(step))
    keeper.wait()
    for text in ("{}", "[]", "3", '{"step": 2, "phase": 0, "phase_step": 2, "words": "three"}'):
        (tmp_path / "2" / "position" / "metadata").write_text(text)
        with pytest.raises(errors.UserError, match="checkpoint .*2 cannot be read .*; delete it to go on from step 1"):
            keeper.position(2)
    assert keeper.position(1) == position(1)


def test_what_devices_hold_alike_is_written_as_it_lies_and_nothing_is_compiled_for_it(tmp_path):
    devices, compiled = parallel.Parallel("shard_map"), []
    alike = devices.replicate(TrainState(jnp.int32(1), {"w": jnp.arange(128.0).reshape(16, 8)}, {"m": jnp.ones(8)}, (), jax.random.PRNGKey(1)))
    keeper = checkpoints.Checkpoints(tmp_path, config.Checkpoints())
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(note := lambda event, *_, **__: compiled.append(event))
    try:
        keeper.save(alike, position(1))
        keeper.wait()
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert len(jax.devices()) == 8 and not any("backend_compile" in event for event in compiled)
    jax.tree.map(np.testing.assert_array_equal, keeper.restore(1, alike), alike)


@pytest.mark.parametrize("text, shown", [("Event loop is closed", False), ("Encountered error while reading array index: (0,)", False), ("x", True)])
def test_of_what_tensorstore_fails_at_only_the_first_error_is_heard(text, shown, monkeypatch):
    heard = []
    monkeypatch.setattr(checkpoints, "_shown", heard.append)
    checkpoints._unraisable(SimpleNamespace(exc_value=Exception(text)))
    assert bool(heard) == shown


def test_the_newest_five_and_the_best_are_kept(tmp_path):
    keeper = checkpoints.Checkpoints(tmp_path / "c", config.Checkpoints(keep=5, best="cider"))
    for step, cider in enumerate([0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6, 0.7], start=1):
        keeper.save(state(step), position(step), {"cider": cider, "bleu4": -cider})
    keeper.save(state(9), position(9, phase=1))  # a run that is stopped does not score
    keeper.wait()
    assert keeper.steps() == [3, 5, 6, 7, 8, 9]
    assert keeper.best_step() == 3
    keeper.close()
    again = checkpoints.Checkpoints(tmp_path / "c", config.Checkpoints(keep=5, best="cider"))
    assert again.best_step() == 3 and again.position(9) == position(9, phase=1)
    jax.tree.map(np.testing.assert_array_equal, again.restore(3, like=state(0)), state(3))


def test_without_scores_the_newest_is_the_best(tmp_path):
    keeper = checkpoints.Checkpoints(tmp_path / "c", config.Checkpoints())
    assert keeper.best_step() is None and keeper.steps() == []
    for step in (1, 2):
        keeper.save(state(step), position(step))
    keeper.wait()
    assert keeper.best_step() == 2
    keeper.close()
    unfinished = tmp_path / "c" / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    reader = checkpoints.Checkpoints(tmp_path / "c", config.Checkpoints(), read_only=True)  # while a run is trained
    assert reader.steps() == [1, 2] and reader.best_step() == 2 and unfinished.is_dir()
    reader.close()
    assert unfinished.is_dir()


@pytest.fixture
def split(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", {"train": 40})
    return records.open_split(config.Data(name="shapes", size=32, dir=str(tmp_path)), "train")


def no_room(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_features_go_on_where_they_were_interrupted(split, monkeypatch):
    configuration = config.load(None, ["data.size=32", f"data.dir={split.path.parents[2]}"])
    model = captioner.build(configuration, 10)
    params, batch_stats = jax.jit(model.init, static_argnums=1)(jax.random.PRNGKey(0), 32)
    devices = parallel.Parallel()
    take = lambda: features.cached(split, configuration, model, params, batch_stats, devices, batch_size=16)
    original, seen = features.photo_batches, []

    def until_the_second(split, batch_size, start=0):
        for i, batch in enumerate(original(split, batch_size, start)):
            seen.append(start + i * batch_size)
            if len(seen) == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(features, "photo_batches", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        take()
    assert features.find(split, configuration, params, batch_stats) is None
    (partial,) = (split.path / "features").glob("*.partial")
    assert partial.stat().st_blocks * 512 >= partial.stat().st_size  # none is to be looked for on a full disk
    found = np.array(take())
    assert seen == [0, 16, 16, 32]
    photos = jnp.asarray(split.images(range(40))) / 255
    expected, _ = model.encode(params, batch_stats, photos)
    np.testing.assert_allclose(found, expected.mean(axis=1, keepdims=True), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(take(), found)
    assert len(seen) == 4 and sorted(p.suffix for p in (split.path / "features").iterdir()) == [".npy"]
    other = jax.tree.map(lambda x: x + 1, params)
    usage = shutil.disk_usage(split.path)._replace(free=1000)
    with monkeypatch.context() as full, pytest.raises(errors.UserError, match="features of 40 photos need .* MiB are free"):
        full.setattr(features.shutil, "disk_usage", lambda path: usage)
        features.cached(split, configuration, model, other, batch_stats, devices, batch_size=16)
    with monkeypatch.context() as full, pytest.raises(errors.UserError, match="cannot be cached .*: No space left on device; free the disk or prepare"):
        full.setattr(features.os, "posix_fallocate", no_room)
        features.cached(split, configuration, model, other, batch_stats, devices, batch_size=16)
    assert features.find(split, configuration, other, batch_stats) is None

    (path,) = (split.path / "features").iterdir()
    path.write_bytes(path.read_bytes()[:200])
    for read in (take, lambda: features.find(split, configuration, params, batch_stats)):
        with pytest.raises(errors.UserError, match="cached features .*npy cannot be read .*; delete the file"):
            read()
    for other in (found[:20], found[..., :16], found[:, 0], found.repeat(2, axis=1), found.astype(np.float16)):
        np.save(path, other)
        for read in (take, lambda: features.find(split, configuration, params, batch_stats)):
            with pytest.raises(errors.UserError, match=r"npy cannot be read \(float.* instead of float32 \(40, 1, .*; delete the file"):
                read()


def test_features_are_computed_anew_where_what_was_left_of_them_does_not_fit(split, monkeypatch):
    configuration = config.load(None, ["data.size=32", f"data.dir={split.path.parents[2]}"])
    model = captioner.build(configuration, 10)
    params, batch_stats = jax.jit(model.init, static_argnums=1)(jax.random.PRNGKey(0), 32)
    central, traced = features.augmentation(config.Augment(), 32), []
    monkeypatch.setattr(features, "augmentation", lambda *_: lambda *seen: traced.append(seen) or central(*seen))
    take = functools.partial(features.cached, split, configuration, model, params, batch_stats, parallel.Parallel(), batch_size=16)
    expected = np.array(take())
    (path,) = (split.path / "features").iterdir()
    whole, empty = path.read_bytes(), np.zeros_like(expected)
    partial, count = path.with_suffix(".partial"), path.with_suffix(".count")
    for left, words in [(whole, "x4"), (whole, ""), (whole, "41"), (whole, "-1"), (whole[:9], "16"), (whole[:-9], "40"),
                        (whole[:20] + b"((" + whole[22:], "16"), (empty[:20], "16"), (empty[..., :16], "16"), (empty.astype(np.float16), "16")]:
        path.unlink()
        with partial.open("wb") as file:
            file.write(left) if isinstance(left, bytes) else np.save(file, left)
        count.write_text(words)
        np.testing.assert_array_equal(take(), expected)
        assert list(path.parent.iterdir()) == [path]

    path.unlink()
    count.write_text("32")  # of a partial that somebody deleted
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(features, "photo_batches", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        take()
    np.testing.assert_array_equal(take(), expected)
    assert len(traced) == 1  # a network takes seconds: once for its shapes, its batches and all splits


def test_features_of_data_that_may_only_be_read_are_cached_for_oneself(split, tmp_path, monkeypatch):
    configuration = config.load(None, ["data.size=32", f"data.dir={split.path.parents[2]}"])
    model = captioner.build(configuration, 10)
    params, batch_stats = jax.jit(model.init, static_argnums=1)(jax.random.PRNGKey(0), 32)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(features, "_compute", lambda path, *_: np.save(path, np.zeros((40, 1, 320), np.float32)))
    take = functools.partial(features.cached, split, configuration, model, params, batch_stats, parallel.Parallel(), batch_size=16)
    with monkeypatch.context() as patch:  # as for anyone but root
        patch.setattr(features.os, "access", lambda path, mode: not mode & os.W_OK)
        assert len(take()) == len(features.find(split, configuration, params, batch_stats)) == 40
    (path,) = (tmp_path / ".cache" / "jaxcap" / "features").joinpath(*split.path.parts[-3:]).iterdir()
    assert not (split.path / "features").exists() and path == features.cache_path(split, configuration, params, batch_stats)
    path.unlink()
    beside = features.cache_path(split, configuration, params, batch_stats)
    assert len(take()) == 40 and beside == split.path / "features" / path.name
    monkeypatch.setattr(features.os, "access", lambda path, mode: not mode & os.W_OK)
    assert features.cache_path(split, configuration, params, batch_stats) == beside  # what is there is read


def test_features_that_another_process_computes_are_waited_for(split, capsys):
    configuration = config.load(None, ["data.size=32", f"data.dir={split.path.parents[2]}"])
    model = captioner.build(configuration, 10)
    params, batch_stats = jax.jit(model.init, static_argnums=1)(jax.random.PRNGKey(0), 32)
    path = features.cache_path(split, configuration, params, batch_stats)
    path.parent.mkdir()
    with ThreadPoolExecutor() as pool:
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waiting = pool.submit(features.cached, split, configuration, model, params, batch_stats, parallel.Parallel(), batch_size=16)

            def hear():
                said = ""
                while "waiting for another process" not in said and not waiting.done():
                    said += capsys.readouterr().err
                    time.sleep(0.01)

            hear()
            path.with_suffix(".lock").unlink()  # the other one was stopped, and a third comes before this one
            with path.with_suffix(".lock").open("w") as newer:
                fcntl.flock(newer, fcntl.LOCK_EX)
                lock.close()
                hear()
                assert not waiting.done() and not path.exists()
                np.save(path, np.full((40, 1, model.spec.features), 7, np.float32))  # the third is done
        assert (waiting.result() == 7).all()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_features_of_several_views_are_those_of_the_photo_and_its_distortions(split):
    settings = ["data.size=32", f"data.dir={split.path.parents[2]}", "augment.flip=true", "augment.views=4"]
    configuration = config.load(None, settings)
    model = captioner.build(configuration, 10)
    params, batch_stats = jax.jit(model.init, static_argnums=1)(jax.random.PRNGKey(0), 32)
    take = functools.partial(features.cached, split, configuration, model, params, batch_stats, parallel.Parallel(), batch_size=16)
    found, plain = np.array(take(views=4)).reshape(40, 4, -1), np.array(take()).reshape(40, -1)
    mirrored, _ = model.encode(params, batch_stats, jnp.asarray(split.images(range(40)))[:, :, ::-1] / 255)
    np.testing.assert_array_equal(found[:, 0], plain)
    either = np.stack([plain, mirrored.mean(axis=1)])
    distance = np.abs(found[:, 1:] - either[:, :, None]).max(axis=-1)
    assert distance.min(axis=0).max() < 1e-4 < distance.max(axis=0).min()
    turned = distance.argmin(axis=0)
    assert 0.3 < turned.mean() < 0.7 and any(len(set(photo)) > 1 for photo in turned)
    np.testing.assert_array_equal(np.array(take(views=4)).reshape(40, 4, -1), found)


@pytest.mark.parametrize("outcome, status, words", [
    (None, 0, ""), (3, 3, ""), (errors.UserError("photos/ is not there; name another"), 2, "error: photos/ is not there"),
    (KeyboardInterrupt(), 130, "interrupted"), (OSError(36, "File name too long", "xxx"), 2, "error: xxx: File name too long")])
def test_a_command_ends_with_a_status_and_a_sentence(outcome, status, words, capsys):
    def main():
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as ended:
        errors.run_command(main)
    assert ended.value.code == status
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err and len(err.splitlines()) == bool(words)


@pytest.mark.parametrize("ask, words", [
    (lambda: jnp.zeros(1 << 45), "error: there is not enough memory: 131,072.0 GiB were asked for at once; lower the batch (batch_size"),
    (lambda: np.ones(1 << 45), "error: there is not enough memory: 256 TiB were asked for at once; lower the batch (batch_size"),
    (lambda: b"." * (1 << 60), "error: there is not enough memory; lower the batch (batch_size")])
def test_a_command_for_which_memory_is_not_enough_says_so(ask, words, capsys):
    with pytest.raises(SystemExit) as ended:
        errors.run_command(ask)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith(words) and len(err.splitlines()) == 1


def test_other_errors_of_a_command_keep_their_traceback():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        errors.run_command(lambda: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: a mistake in the program")))


def test_a_command_that_is_terminated_leaves_nothing_behind(tmp_path):
    code = ("import tempfile, time\nfrom jaxcap.errors import run_command\ndef main():\n"
            "    with tempfile.TemporaryDirectory(dir='.') as directory:\n        print(directory, flush=True)\n        time.sleep(60)\n"
            "run_command(main)")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(errors.__file__))}
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    assert (tmp_path / child.stdout.readline().strip()).is_dir()
    child.terminate()
    assert not child.communicate(timeout=30)[1] and child.returncode == 143 and not list(tmp_path.iterdir())


def test_an_interrupt_while_garbage_is_collected_is_not_lost():
    code = ("import os, signal, time\nfrom jaxcap import errors\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # as in a shell's foreground
            "class Garbage:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGINT)\n"
            "def main():\n    Garbage()\n    time.sleep(20)\n    print('went on')\nerrors.run_command(main)")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(errors.__file__))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True)
    assert done.returncode == 130 and "went on" not in done.stdout and done.stderr == "interrupted\n"


def in_foreground(module: str, directory: Path) -> subprocess.CompletedProcess:
    """A module run as in a shell's foreground, where Ctrl-C is not ignored; it finds packages in `directory` first."""
    code = ("import os, signal, sys\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\n"
            f"os.execv(sys.executable, [sys.executable, '-m', '{module}'])")
    path = os.pathsep.join((str(directory), os.path.dirname(os.path.dirname(errors.__file__))))
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, cwd=directory, text=True, capture_output=True)


@pytest.mark.parametrize("command", ["jaxcap.train", "jaxcap.weights", "benchmarks.step_time"])
def test_an_interrupt_ends_a_command_that_is_still_being_imported(command, tmp_path):
    (tmp_path / "jax.py").write_text("import os, signal\nclass Garbage:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGINT)\n"
                                     "Garbage()\nraise SystemExit('went on')")
    done = in_foreground(command, tmp_path)
    assert done.returncode == 130 and done.stderr == "interrupted\n"


def test_a_program_that_imports_the_package_keeps_its_own_interrupts(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("import jaxcap")
    (tmp_path / "theirs" / "program.py").write_text("import signal\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)")
    assert in_foreground("theirs.program", tmp_path).stdout == "True\n"


def test_who_has_read_enough_of_the_output_and_names_that_are_no_text_cause_no_traceback():
    code = "from jaxcap.errors import run_command\nrun_command(lambda: [print('caf\\udce9', i, flush=True) for i in range(100_000)] and 0)"
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "{code}" | head -1; echo ${{PIPESTATUS[0]}}'], text=True, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.stdout.split("\n")[:2] == ["caf\\udce9 0", "141"] and not done.stderr
