"""One description of a run: strict about keys, types and combinations."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxcap import config
from jaxcap.config import Config, Optim, Phase
from jaxcap.errors import UserError


def test_override_reaches_nested_settings_and_keeps_types():
    changed = config.override(Config(), ["phases.0.optim.learning_rate=1", "data.length_buckets=8,30",
                                         "augment.flip=true", "encoder.name=inception_v3"])
    assert changed.phases[0].optim.learning_rate == 1.0 and isinstance(changed.phases[0].optim.learning_rate, float)
    assert changed.data.length_buckets == (8, 30)
    assert changed.augment.flip is True
    assert changed.encoder.name == "inception_v3"


@pytest.mark.parametrize("assignment, words", [
    ("phases.0.optim.learning_rat=1", ["phases.0.optim.learning_rat", "phases.0.optim.learning_rate"]),
    ("learning_rate=1", ["learning_rate", "phases.0.optim.learning_rate"]),
    ("batch_size=many", ["batch_size", "whole number", "many"]),
    ("batch_size=1.5", ["batch_size", "whole number"]),
    ("augment.flip=1", ["augment.flip", "true or false"]),
    ("phases.0.optim.name=adma", ["phases.0.optim.name", "adam"]),
    ("phases.3.steps=1", ["index below 1"]),
    ("data=3", ["group of settings"]),
    ("phases.0=3", ["group of settings"]),
    ("batch_size", ["neither a config file nor key=value"]),
])
def test_a_bad_override_is_one_clear_sentence(assignment, words):
    with pytest.raises(UserError) as error:
        config.override(Config(), [assignment])
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes, word", [
    (["batch_size=0"], "batch_size"),
    (["encoder.size=299"], "larger than data.size"),
    (["decoder.dropout=1.0"], "decoder.dropout"),
    (["phases.0.steps=0"], "either epochs or steps"),
    (["phases.0.epochs=3"], "either epochs or steps"),
    (["phases.0.from_scratch=false"], "untrained decoder"),
    (["phases.1.from_scratch=false"], "untrained decoder"),  # words alone do not train the decoder
    (["data.length_buckets=8,4"], "length_buckets"),
    (["augment.views=4"], "would be the photo alone"),
    (["augment.flip=true", "augment.views=1"], "would be the photo alone"),
    (["steps_per_dispatch=-1"], "steps_per_dispatch must be a finite number that is not negative, not -1"),
    (["phases.0.optim.clip_norm=-1"], "clip_norm must be a finite .*, not -1"),  # it would turn the gradient round
    (["phases.0.optim.learning_rate=nan"], "learning_rate must be a finite"),
    (["checkpoints.every_epochs=inf"], "every_epochs must be a finite"),
    (["eval_photos=-1"], "eval_photos must be a finite"),
    (["encoder.size=-1"], "encoder.size must be a finite"),
    (["data.workers=-3"], "data.workers must be a finite"),
    (["seed=-1"], "seed must be a finite"),
    (["seed=99999999999999999999"], "seed must be below"),
    *[([f"{key}={10**23}"], f"{key} must be at most") for key in (
        "batch_size", "eval_batch_size", "data.max_words", "decoder.hidden", "decoder.layers", "search.max_words")],
    (["phases.0.steps=1000000000000"], "phases.0 has more epochs or steps than 2,147,483,647"),
    (["phases.0.steps=0", "phases.0.epochs=1e300"], "phases.0 has more epochs or steps than 2,147,483,647"),
    (["search.sample=true", "search.seed=99999999999999999999"], "search.seed must be at least 0 and below"),
    (["search.sample=true", "search.temperature=1e-40"], "search.temperature must be at least 0.000001"),
    (["decoder.deviations=0"], "decoder.deviations must be above 0"),
    (["search.beam=100000000"], "search.beam must be at most 1,000"),
    (["search.length_normalization=inf"], "search.length_normalization must be a finite number"),
    (["search.must_contain=dog", "search.forbidden=DOG"], "'dog' stands both in"),
    (["decoder.image=every", "decoder.attention.gate=true"], "decoder.image=every attends to nothing"),
    (["decoder.unroll=-1"], "decoder.unroll must be a finite number that is not negative, not -1"),
    (["decoder.image=first", "decoder.deep_output=true"], "with 'first' words see no photo"),
    (["steps_per_dispatch=2", "phases.0.objective=reward"], "steps_per_dispatch must be 0 or 1"),
    (["start=runs/one", "phases.0.objective=reward", "phases.0.reward.samples=100000"], "phases.0.reward.samples must be at most 1,000, not 100000"),
])
def test_impossible_combinations_are_refused(changes, word):
    with pytest.raises(UserError, match=word):
        config.load(None, changes)


def test_a_frozen_encoder_keeps_its_statistics():
    with pytest.raises(UserError, match="batch_norm"):
        config.check(Config(phases=(Phase(epochs=1, batch_norm="batch"),)))


def test_dict_round_trip_and_differences():
    one = config.load(None, ["seed=3"])
    assert config.from_dict(config.to_dict(one)) == one
    other = config.override(one, ["phases.0.optim.learning_rate=0.5", "name=x"])
    lines = config.differences(one, other)
    assert [line.split(":")[0] for line in lines] == ["name", "phases.0.optim.learning_rate"]
    values = config.to_dict(one) | {"sead": 1}
    with pytest.raises(UserError, match="'sead'; did you mean 'seed'"):
        config.from_dict(values)


def test_where_the_pages_are_that_ship(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(UserError, match="there is no config file 'configs/x.py'; configs/ holds the ones that ship"):
        config.load("configs/x.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        config.load("configs/x.py")
    assert Path(str(error.value).split("; ")[1].split(" holds ")[0], "im2txt.py").exists()
    monkeypatch.setattr(config, "__file__", str(tmp_path / "site-packages" / "jaxcap" / "config.py"))  # as pip installs it
    with pytest.raises(UserError, match="'configs/x.py'; the ones that ship are in configs/ of a clone of the repository"):
        config.load("configs/x.py")


def test_load_runs_a_page(tmp_path):
    page = tmp_path / "page.py"
    page.write_text("from jaxcap.config import *\nCONFIG = Config(name='mine', phases=(Phase(steps=2),))\n")
    assert config.load(str(page), ["seed=7"]) == Config(name="mine", seed=7, phases=(Phase(steps=2),))
    with pytest.raises(UserError, match="no config file"):
        config.load(str(tmp_path / "absent.py"))
    page.write_text("CONFIG = 3\n")
    with pytest.raises(UserError, match="must set CONFIG"):
        config.load(str(page))
    page.write_text("1 / 0\n")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        config.load(str(page))


@pytest.mark.parametrize("text, words", [
    ("Config(phases=(Phase(steps=3)))", r"phases must be a list, not Phase\(.*; a tuple of one needs a comma"),
    ("Config(phases=(3,))", "phases.0 must be a group of settings, not 3"),
    ("Config(batch_size='32')", "batch_size must be a whole number, not '32'"),
    ("Config(data=3)", "data must be a group of settings, not 3"),
    ("Config(encoder=Encoder(name=None))", "encoder.name must be text, not None"),
    ("Config(encoder=Phase())", "encoder must be a group of settings, not Phase"),
    ("Config(seed=True)", "seed must be a whole number, not True"),
    ("Config(name=3)", "name must be text, not 3"),
    ("exit(3)", "does not run: SystemExit: 3"),
])
def test_a_mistake_in_a_page_is_said_with_its_name(text, words, tmp_path):
    page = tmp_path / "page.py"
    page.write_text(f"from jaxcap.config import *\nCONFIG = {text}\n")
    with pytest.raises(UserError, match=f"config file '{page}'.* {words}"):
        config.load(str(page))


def test_every_shipped_page_loads():
    pages = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
    assert pages
    begun = {"flickr8k_finetune": ["start=runs/attention"]}  # goes on from a run
    for page in pages:
        loaded = config.load(str(page), begun.get(page.stem, ()))
        assert loaded.name == page.stem
        assert config.from_dict(config.to_dict(loaded)) == loaded
    with pytest.raises(UserError, match="go on from a run .*start=RUN"):
        config.load(str(pages[0].with_name("flickr8k_finetune.py")))


def test_defaults_are_im2txts():
    assert Optim().learning_rate == 2.0 and Optim().clip_norm == 5.0
    assert Config().decoder.hidden == Config().decoder.embedding == 512


def test_the_package_names_its_commands_and_imports_none():
    program = "import runpy, sys\nfor name in ('jax', 'numpy'):\n    sys.modules[name] = None\nrunpy.run_module('jaxcap', run_name='__main__', alter_sys=True)"
    for arguments in ([], ["--help"]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("  python -m ")] == [
            f"jaxcap.{name}" for name in ("prepare", "train", "evaluate", "caption", "weights")]
    assert "  python -m jaxcap.caption   Writes captions for photos\n" in done.stdout and "`" not in done.stdout
    done = subprocess.run([sys.executable, "-c", program, "train"], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: python -m jaxcap takes no arguments, not 'train'; the commands are python -m jaxcap.prepare, ")
