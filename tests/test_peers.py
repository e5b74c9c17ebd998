"""The comparison with PyTorch and Keras: that all take the same step, that a difference shows, and what is made of the times.

What needs one of them runs where it can be imported or where JAXCAP_TORCH_PYTHON or JAXCAP_KERAS_PYTHON names a Python that has
it. No speed is asserted.
"""

import importlib.util
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

from benchmarks.peers import __main__ as peers
from benchmarks.peers import comparison, forms
from benchmarks.peers.child import Child
from benchmarks.peers.comparison import apart, disagreement, pair_by_pair
from benchmarks.peers.jaxcap_side import Side
from benchmarks.workload import KINDS
from jaxcap.data import augment
from jaxcap.errors import UserError

REPOSITORY = Path(__file__).parents[1]
TRIED = {
    "torch": {"cached": ("eager", "onednn+loop", "sparse+fused"), "eval": ("channels_last+merged+onednn",),
              "frozen": ("eager", "channels_last+unfolded"), "joint": ("eager", "channels_last+merged+sparse+fused"),
              "beam": ("eager", "lists", "onednn")},
    "keras": {"cached": ("eager", "function+unroll+sparse", "xla"), "eval": ("function",), "frozen": ("eager", "function+unfolded"),
              "joint": ("eager", "function+fused_norm+sparse")},
}


# --- without either ----------------------------------------------------------------------------------------------------


def test_ratios_are_taken_pair_by_pair():
    ratio = pair_by_pair([2.0, 4.0, 9.0], [1.0, 4.0, 3.0])
    assert ratio == {"median": 2.0, "min": 1.0, "max": 3.0, "turns": [2.0, 1.0, 3.0]}
    with pytest.raises(ValueError):
        pair_by_pair([1.0], [1.0, 2.0])


def test_disagreement_names_what_is_too_far_apart():
    reference = {"loss": 4.0, "gradient": 2.0, "decoder/lstm_bias": 0.5, "encoder": 1.0}
    assert disagreement(apart(reference, reference), "float32") == ""
    found = {"loss": 4.0 * 1.0002, "gradient": 2.0 * 1.004, "decoder/lstm_bias": 0.5, "encoder": 1.004}
    errors = apart(found, reference)
    assert errors["loss"] == pytest.approx(2e-4, rel=1e-3)
    assert disagreement(errors, "float32") == "loss by 2.0e-04"  # the encoder's gradient may be so far apart
    assert disagreement(errors, "tf32") == ""
    del reference["encoder"]
    assert disagreement(apart(found, reference), "float32").startswith("gradient by 4.0e-03, loss by")
    for broken in ({"loss": math.nan, "gradient": 2.0, "decoder/lstm_bias": 0.5}, {"loss": 4.0, "gradient": 2.0}):
        errors = apart(broken, reference)
        assert math.inf in errors.values() and "by inf" in disagreement(errors, "bfloat16")


def test_forms():
    assert forms.parse("torch", "eager") == frozenset()
    assert forms.parse("torch", "channels_last+fused") == {"channels_last", "fused"}
    for library, wrong in (("torch", "fast"), ("torch", "eager+"), ("torch", "sparse+graph"), ("torch", "channels_last compile"),
                           ("torch", "xla"), ("keras", "compile"), ("keras", "function+xla")):
        with pytest.raises(UserError, match="--forms"):
            forms.parse(library, wrong)
    for library, of in forms.LIBRARIES.items():
        for platform in ("cpu", "gpu"):
            for kind in of.forms[platform]:  # none of the defaults is left out again
                assert forms.wanted(library, kind, platform, "float32") == list(of.forms[platform][kind])
    given = ["eager", "graph", "channels_last", "onednn", "sparse"]
    assert forms.wanted("torch", "cached", "cpu", "float32", given) == ["eager", "onednn", "sparse"]
    assert forms.wanted("torch", "eval", "gpu", "float32", given) == ["eager", "graph", "channels_last"]
    assert forms.wanted("torch", "joint", "cpu", "bfloat16", given) == ["eager", "channels_last", "sparse"]
    assert forms.wanted("torch", "beam", "gpu", "float32", ["fused", "beam:graph", "joint:eager"]) == ["graph"]
    assert not forms.wanted("keras", "beam", "cpu", "float32", ["eager"])
    assert forms.wanted("keras", "frozen", "cpu", "float32", ["fused_norm", "unfolded", "xla"]) == ["unfolded", "xla"]


def test_wrong_arguments_are_refused(tmp_path):
    for arguments, message in ((["--forms", "fast"], "no 'fast'"),
                               (["--tiny", "--peer-python", str(tmp_path / "none")], "cannot be run: No such file"),
                               (["--tiny", "--peer-python", "/bin/cat"], "no Python that can run this repository")):
        with pytest.raises(UserError, match=message):
            peers.main(arguments)


@pytest.mark.parametrize(("library", "module", "package"), [("torch", "torch", "torch"), ("keras", "keras", "tensorflow")])
def test_a_python_without_the_library_is_told_what_to_install(tmp_path, monkeypatch, library, module, package):
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{module}'\", name='{module}')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=f"has no {module}: pip install {package} there, or name .* with --peer-python"):
        peers.main(["--tiny", "--peer", library])


class Scripted:
    """A child that answers without any library; `asked` is what both were asked, in order."""

    asked: list[tuple[str, str, str]] = []
    found = {"eager": 4.0, "fused": 4.0, "channels_last": 4.1}
    more: dict[str, str] = {}

    def __init__(self, side, python, directory, environment=None):
        self.side, self.directory = side, directory

    def ask(self, do, **arguments):
        self.asked.append((self.side, do, arguments.get("form", "")))
        if do == "hello":
            return {"version": "1.0", "platform": "cpu"}
        if do == "settings":
            sizes = {"encoder": "tiny", "size": 31, "batch": 8, "hidden": 24, "vocabulary": 60, "tokens": 5}
            return sizes if self.side == "jaxcap" else {"threads": 2}
        if do == "agree":
            (self.directory / f"{arguments['kind']}-{arguments['batch']}.npz").touch()
            return {"loss": 4.0, "gradient": 1.0}
        if do == "prepare":
            if arguments.get("form") == "sparse":
                raise RuntimeError("TimeoutError: not ready within 300 s")
            return {"ready_s": 1.0, "together": 1, "loss": 4.0, "found": {"loss": self.found.get(arguments.get("form")), "gradient": 1.0},
                    **self.more}
        ms = 20.0 if self.side == "jaxcap" else {"eager": 10.0, "fused": 40.0}[arguments["form"]] if do == "time" else 0.0
        return {"ms": ms, "cpu_ms": 2 * ms}

    def close(self):
        self.asked.append((self.side, "close", ""))


def test_the_comparison_goes_turn_by_turn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "Child", Scripted)
    monkeypatch.setattr(Scripted, "asked", [])
    path = tmp_path / "peers.json"
    assert peers.main(["--kinds", "frozen", "--forms", "eager", "fused", "sparse", "--turns", "3", "--json", str(path)]) == 0
    timed = [form or side for side, do, form in Scripted.asked if do == "time"]
    for form, asked in (("eager", timed[:10]), ("fused", timed[10:])):
        assert asked[:4] == ["jaxcap"] * 2 + [form] * 2  # warm-up
        assert asked[4:] == ["jaxcap", form, form, "jaxcap", "jaxcap", form]
    assert [do for _, do, _ in Scripted.asked[-2:]] == ["close", "close"]
    eager, fused, sparse = json.loads(path.read_text("utf-8"))["results"]
    assert eager["ms"]["ratio"]["turns"] == [2.0] * 3 and fused["ms"]["ratio"]["median"] == 0.5 and "ms" not in sparse
    assert eager["steps_per_turn"] == {"jaxcap": 25, "peer": 50} and eager["loss_apart"] == eager["gradient_apart"] == 0.0
    output = capsys.readouterr().out
    assert "eager (best)" in output and "frozen, batch 8, sparse: TimeoutError: not ready within 300 s" in output
    ran = "jaxcap takes 2.00 times as long as PyTorch's best form of those that ran, eager (sparse failed: TimeoutError: not ready within"
    assert ran in output and ran in json.loads(path.read_text("utf-8"))["verdicts"][0]
    assert peers.main(["--kinds", "frozen", "--forms", "eager", "fused"]) == 0
    assert "jaxcap takes 2.00 times as long as PyTorch's best form, eager; ready" in capsys.readouterr().out


@pytest.mark.parametrize("last", [("torch", "prepare", "fused"), ("torch", "time", "fused")])
def test_a_run_that_is_ended_leaves_every_turn(tmp_path, monkeypatch, last):
    ask, fused = Scripted.ask, []

    def ended(child, do, **arguments):
        if (child.side, do, arguments.get("form", "")) == last:
            fused.append(do)
            if do == "prepare" or len(fused) == 5:  # two of those were warm-up
                raise SystemExit(143)
        return ask(child, do, **arguments)

    monkeypatch.setattr(Scripted, "ask", ended)
    monkeypatch.setattr(comparison, "Child", Scripted)
    path = tmp_path / "peers.json"
    with pytest.raises(SystemExit):
        peers.main(["--kinds", "frozen", "--forms", "eager", "fused", "channels_last", "--turns", "5", "--json", str(path)])
    partial = json.loads((tmp_path / "peers.json.partial").read_text("utf-8"))
    assert [r["form"] for r in partial["results"]] == ["eager", "fused", "channels_last"]
    assert [len(r["ms"]["ratio"]["turns"]) if "ms" in r else 0 for r in partial["results"]] == [5, 2 if "time" in last else 0, 0]
    assert "channels_last was not timed" in partial["verdicts"][0]
    assert ("fused was not timed" in partial["verdicts"][0]) == ("prepare" in last)
    assert [row[4] for row in partial["table"][1:]] == ["10.0", "40.0" if "time" in last else "–", "–"]


def test_after_a_form_that_failed_the_next_one_has_a_new_process(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "Child", Scripted)
    monkeypatch.setattr(Scripted, "asked", [])
    assert peers.main(["--kinds", "joint", "cached", "--forms", "sparse", "eager"]) == 0
    asked = [do for side, do, form in Scripted.asked if side == "torch"]
    once = ["prepare", "close", "hello", "settings", "prepare"]
    assert [do for do in asked if do != "time"] == ["hello", "settings", *once, "forget", *once, "forget", "close"]


def test_kinds_are_compared_in_the_order_given(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "Child", Scripted)
    path = tmp_path / "peers.json"
    assert peers.main(["--kinds", "joint", "cached", "frozen", "--forms", "eager", "--json", str(path)]) == 0
    assert [r["kind"] for r in json.loads(path.read_text("utf-8"))["results"]] == ["joint", "cached", "frozen"]


def test_what_does_not_agree_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "Child", Scripted)
    monkeypatch.setattr(Scripted, "asked", [])
    assert peers.main(["--kinds", "frozen", "--forms", "channels_last", "eager"]) == 1
    assert ("torch", "time", "channels_last") not in Scripted.asked and ("torch", "time", "eager") in Scripted.asked
    assert "channels_last: does not agree with jaxcap: loss by 2.5e-02" in capsys.readouterr().out


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_ends_one_form_alone(tmp_path, monkeypatch, number):
    monkeypatch.setattr(comparison, "Child", Scripted)
    monkeypatch.setattr(Scripted, "found", {**Scripted.found, "fused": number})
    path = tmp_path / "peers.json"
    assert peers.main(["--kinds", "frozen", "cached", "--forms", "fused", "eager", "--json", str(path)]) == 1
    results = json.loads(path.read_text("utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["results"]
    assert [(r["kind"], r["form"], "ms" in r) for r in results] == [
        (kind, form, form == "eager") for kind in ("frozen", "cached") for form in ("fused", "eager")]
    assert results[0]["found"] == {"loss": str(number), "gradient": 1.0} and "loss by inf" in results[0]["error"]


def test_an_lstm_in_another_dtype_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "Child", Scripted)
    path = tmp_path / "peers.json"
    for dtype, form in (("float32", "eager (best)"), ("float16", "eager, LSTM in float16 (best)")):
        monkeypatch.setattr(Scripted, "more", {"lstm_dtype": dtype})
        assert peers.main(["--kinds", "frozen", "--forms", "eager", "--json", str(path)]) == 0
        result = json.loads(path.read_text("utf-8"))
        assert form == result["table"][1][1] and form in capsys.readouterr().out
        assert result["results"][0]["peer_lstm_dtype"] == dtype


# --- with PyTorch or Keras ----------------------------------------------------------------------------------------------


def python_with(library: str) -> str:
    """The Python that has the library; skips where there is none."""
    variable, of = f"JAXCAP_{library.upper()}_PYTHON", forms.LIBRARIES[library]
    named = os.environ.get(variable)
    if not named and importlib.util.find_spec(of.package) is None:
        pytest.skip(f"{of.name} is not here; {variable} may name a Python that has it")
    return named or sys.executable


def run_there(python: str, script: str, directory: Path) -> None:
    """Runs a script in the Python that has a peer's library, with the directory as its argument; fails where it does."""
    subprocess.run([python, "-c", script, str(directory)], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                   check=True)


@pytest.fixture(scope="module", params=list(forms.LIBRARIES))
def peer(request):
    """(library, Python that has it)."""
    return request.param, python_with(request.param)


@pytest.fixture(scope="module")
def jaxcap(tmp_path_factory):
    """The folder that jaxcap's side filled at a tiny size, and what it computes, by kind of step."""
    directory = tmp_path_factory.mktemp("peers")
    side = Side(directory)
    side.settings(tiny=True, dtype="float32")
    return directory, {kind: side.agree(kind=kind, batch=4) for kind in (*KINDS, forms.BEAM)}


def test_jaxcap_is_timed_as_it_trains(tmp_path, monkeypatch):
    side = Side(tmp_path)
    side.settings(tiny=True, dtype="float32")
    assert side.prepare(kind="cached", batch=4)["together"] == 1 and side.time(calls=2)["ms"] > 0
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert side.prepare(kind="cached", batch=4)["together"] == 8
    calls = []
    monkeypatch.setattr(type(side._step), "__call__", lambda step: calls.append(step.together))
    assert side.time(calls=20)["ms"] > 0 and calls == [8, 8, 8]


@pytest.fixture
def compare(peer, jaxcap):
    """`compare(kind, form)`: in what a form disagrees with jaxcap, and the peer's answer. It reads the folder anew every time."""
    directory, reference = jaxcap
    child = Child(*peer, directory, {"OMP_WAIT_POLICY": "passive"})

    def run(kind: str, form: str) -> tuple[str, dict]:
        child.ask("settings", platform="cpu")
        answer = child.ask("prepare", kind=kind, batch=4, form=form, limit_s=60)
        return disagreement(apart(answer["found"], reference[kind]), "float32"), answer

    yield run
    child.close()


def test_both_take_the_same_step(compare, peer, jaxcap):
    for kind, tried in TRIED[peer[0]].items():
        for form in tried:
            wrong, answer = compare(kind, form)
            assert not wrong, (kind, form)
            assert answer["found"].keys() == jaxcap[1][kind].keys()
            # As it is timed, training has dropout, and the loss is another one.
            assert (abs(answer["loss"] / answer["found"]["loss"] - 1) > 1e-5) == (kind not in ("eval", "beam")), (kind, form)


def test_pytorch_searches_for_fast_convolutions_only_where_it_is_timed(jaxcap):
    run_there(python_with("torch"), """
import sys
from pathlib import Path
import torch
from benchmarks.peers.torch_side import Side

class Step:
    def agree(self):
        return {"searched": torch.backends.cudnn.benchmark}
    def start(self):
        pass
    def __call__(self):
        return 0.0

side = Side(Path(sys.argv[1]))
side.settings(platform="cpu")
side._step = lambda *asked: Step()
for _ in range(2):
    assert side.agree(kind="frozen", batch=4) == {"searched": False}
    assert side.prepare(kind="frozen", batch=4, form="eager", limit_s=60)["found"] == {"searched": True}
""", jaxcap[0])


def test_pytorch_rounds_once_what_does_not_learn(jaxcap):
    """Under bfloat16 only parameters that learn stay in float32, and the results are those of rounding all of them in every step."""
    run_there(python_with("torch"), """
import sys
from pathlib import Path
import torch
from benchmarks.peers import torch_decoder, torch_encoder, torch_side
side, rounding = torch_side.Side(Path(sys.argv[1])), torch_encoder.Encoder.round
side.settings(platform="cpu")
for kind, form in (("frozen", "eager"), ("frozen", "channels_last+unfolded"), ("eval", "eager"), ("eval", "loop"), ("joint", "eager"),
                   ("beam", "eager"), ("beam", "lists")):
    step = side._step(kind, 4, form, "bfloat16")
    assert kind == "beam" or step.lstm_dtype() == "bfloat16"
    for part in ("decoder", "encoder")[:1 if kind == "beam" else 2]:
        for name, tensor in getattr(step, "_" + part).named_parameters():
            learns = kind == "joint" or (kind, part) == ("frozen", "decoder")
            norm = (part, "unfolded" in form, tensor.ndim) == ("encoder", True, 1)
            assert tensor.dtype == (torch.float32 if learns or norm else torch.bfloat16), (kind, form, part, name)
    torch_encoder.Encoder.round = torch_decoder.Decoder.bfloat16 = lambda module: None
    loss = side._step(kind, 4, form, "bfloat16").agree()["loss"]
    torch_encoder.Encoder.round = rounding
    del torch_decoder.Decoder.bfloat16
    assert abs(step.agree()["loss"] / loss - 1) < 1e-3, (kind, form)
""", jaxcap[0])


def test_a_difference_is_noticed(compare, peer, jaxcap):
    directory, _ = jaxcap
    model, described = (directory / "model.npz").read_bytes(), (directory / "model.json").read_text("utf-8")
    arrays, random = dict(np.load(directory / "model.npz")), np.random.default_rng(0)
    try:
        without_bias = {**json.loads(described), "forget_bias": 0.0}
        (directory / "model.json").write_text(json.dumps(without_bias), "utf-8")
        assert "decoder/lstm_kernel" in compare("cached", "eager")[0]
        assert "decoder/lstm_bias" in compare("cached", TRIED[peer[0]]["cached"][1])[0]
        if peer[0] == "torch":
            shorter = {**json.loads(described), "search": {**json.loads(described)["search"], "max_words": 4}}
            (directory / "model.json").write_text(json.dumps(shorter), "utf-8")
            assert all("loss" in compare("beam", form)[0] for form in ("eager", "lists"))
        (directory / "model.json").write_text(described, "utf-8")
        for name, array in arrays.items():
            if "kernel" not in name and "stem1" not in name and "/decoder/" not in name:
                continue  # time
            np.savez(directory / "model.npz", **{**arrays, name: array + 0.3 * random.random(array.shape, np.float32)})
            kind = "cached" if "/decoder/" in name else "frozen"
            assert compare(kind, "eager")[0], name
        wrong, _ = compare("joint", "eager")  # what was changed last is of no account to it: statistics are the batch's
        assert not wrong and name.startswith("batch_stats")
    finally:
        (directory / "model.npz").write_bytes(model)
        (directory / "model.json").write_text(described, "utf-8")


DISTORT = {"torch": """
import torch
from benchmarks.peers import torch_distort as distort
given = {name: torch.from_numpy(array) for name, array in given.items()}
index, many = torch.tensor([2, 0, 1]), distort.draw(500, 3, distort.neutral(3), 1.0)
exchanged = (0, 2, 3, 1)
""", "keras": """
import tensorflow
from benchmarks.peers import keras_distort as distort
given = {name: tensorflow.constant(array, tensorflow.int32 if array.dtype == "int64" else None) for name, array in given.items()}
index, many = tensorflow.constant([2, 0, 1]), distort.draw(500, 3, tensorflow.constant(1.0))
exchanged = (0, 1, 2, 3)
"""}


def test_distortions_are_jaxcaps(peer, tmp_path):
    """Colour, for the same draws, to rounding; crop and flip, exactly."""
    random = np.random.default_rng(0)
    image_BHWC = random.integers(0, 256, (3, 9, 9, 3), np.uint8)
    image_BHWC[0, 0, :2] = ((0, 0, 0), (90, 90, 90))  # no colour
    draws = {"top_B": np.array([0, 3, 1]), "left_B": np.array([2, 0, 3]), "flip_B": np.array([True, False, True]),
             "brightness_B": np.float32([0.1, -0.1, 0.0]), "saturation_B": np.float32([1.4, 0.6, 1.0]),
             "hue_B": np.float32([0.03, -0.03, 0.01]), "contrast_B": np.float32([0.5, 1.5, 1.2]),
             "contrast_last_B": np.array([True, False, True])}
    np.savez(tmp_path / "in.npz", image=image_BHWC, **draws)
    script = ("import sys, numpy as np\n"
              "given = dict(np.load(sys.argv[1] + '/in.npz'))\n" + DISTORT[peer[0]] +
              "image = given.pop('image')\n"
              "draws = distort.Draws(**given)\n"
              "cropped = distort.crop(image, index, draws, 6)\n"
              "coloured = distort.distort_colour(cropped, draws)\n"
              "np.savez(sys.argv[1] + '/out.npz', cropped=np.transpose(cropped, exchanged),\n"
              "         coloured=np.transpose(coloured, exchanged), **{name: getattr(many, name) for name in many._fields})\n")
    run_there(peer[1], script, tmp_path)
    out = np.load(tmp_path / "out.npz")
    for n, row in enumerate((2, 0, 1)):
        top, left = draws["top_B"][n], draws["left_B"][n]
        expected_HWC = image_BHWC[row, top:top + 6, left:left + 6] / np.float32(255)
        expected_HWC = expected_HWC[:, ::-1] if draws["flip_B"][n] else expected_HWC
        np.testing.assert_array_equal(out["cropped"][n], expected_HWC)
        bright_CHW, factor = jnp.moveaxis(expected_HWC, -1, 0) + draws["brightness_B"][n], draws["contrast_B"][n]
        if not draws["contrast_last_B"][n]:
            bright_CHW = augment.adjust_contrast(bright_CHW, factor)
        expected_CHW = augment.adjust_saturation_hue(bright_CHW, draws["saturation_B"][n], draws["hue_B"][n])
        if draws["contrast_last_B"][n]:
            expected_CHW = augment.adjust_contrast(expected_CHW, factor)
        np.testing.assert_allclose(out["coloured"][n], np.moveaxis(jnp.clip(expected_CHW, 0, 1), 0, -1), atol=3e-6)
    assert set(out["top_B"]) == set(out["left_B"]) == {0, 1, 2, 3} and 0.4 < out["flip_B"].mean() < 0.6
    for name, (low, high) in {"brightness_B": (-augment.BRIGHTNESS, augment.BRIGHTNESS), "saturation_B": augment.SATURATION,
                              "hue_B": (-augment.HUE, augment.HUE), "contrast_B": augment.CONTRAST}.items():
        drawn = out[name]
        assert low <= drawn.min() < low + 0.05 * (high - low) and high - 0.05 * (high - low) < drawn.max() <= high, name


def test_a_tiny_run(peer, tmp_path, capsys):
    path, (library, python) = tmp_path / "peers.json", peer
    status = peers.main(["--tiny", "--peer", library, "--kinds", "eval", "--forms", "eager", TRIED[library]["eval"][0], "--turns",
                         "2", "--turn-s", "0.01", "--peer-python", python, "--json", str(path)])
    result = json.loads(path.read_text("utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert status == 0 and result["ok"] and result["settings"]["jax"] == jax.__version__
    for r in result["results"]:
        assert r["loss_apart"] < comparison.LIMITS["float32"][0] and len(r["ms"]["ratio"]["turns"]) == 2
        assert all(ms > 0 for side in ("jaxcap", "peer") for ms in r["ms"][side] + r["cpu_ms"][side])
    assert f"{forms.LIBRARIES[library].name}'s form" in result["table"][0] and "(best)" in capsys.readouterr().out
