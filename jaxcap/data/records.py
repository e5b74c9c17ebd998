"""Prepared data sets: one record a photo, written once by TFDS as ArrayRecord, read at random without TensorFlow.

A data set lies in `<data_dir>/<name>[-label]/<size>/<version>/`: the records that TFDS wrote (any TFDS reads them with
`builder_from_directory`), and beside them one `<split>.index.json` with every image id and caption, so that text is
there at once without touching the photos. A directory is renamed into place when it is whole, or does not exist.
"""

import contextlib
import hashlib
import io
import json
import os
import secrets
import shlex
import shutil
import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python import array_record_module
from tensorflow_datasets.core.writer import ExampleWriter

from jaxcap import config, progress
from jaxcap.data.places import builder_class, cannot_write, data_dir, dataset_name, find, prepared_path, replace
from jaxcap.errors import UserError

_DRAWN = ("shapes",)  # made of code alone, so opening one prepares it
_LABELS = {"flickr8k": ("",), "coco": ("", "im2txt")}  # what `prepare` makes; a folder's label is any
_INDEX = ".index.json"
_OPENING = threading.Lock()
_SHARD_BYTES = 128 << 20  # pixels a file; a writer holds one such file's photos at a time


@dataclass(frozen=True)
class Record:
    """One photo and its captions, as a builder yields it and `CaptionBuilder` writes it."""

    image_id: str
    image_HWC: np.ndarray  # uint8 [size, size, 3]
    captions: Sequence[str]
    extra: Mapping[str, str] = field(default_factory=dict)  # one text for each name in the builder's EXTRA


class CaptionBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Base of all data sets: writes what `contents` yields as ArrayRecord, in that order. Its TFDS config is the size.

    A subclass sets `VERSION` (raise it when records change), `EXTRA` (names of further texts of a record) and
    implements `contents`. TFDS's shard-based builder is used because its generator-based one sorts every split in
    memory or in a second copy on disk, and loses the order.
    """

    VERSION = tfds.core.Version("1.0.0")
    EXTRA: tuple[str, ...] = ()

    def __init__(self, data: config.Data):
        self.name = dataset_name(data)
        self.size = data.size
        self.target = prepared_path(data, self.VERSION)
        self._writing = self.target.with_name(f"incomplete.{secrets.token_hex(4)}_{self.VERSION}")  # TFDS leaves alone what is at `target`
        self.beside: dict[str, str] = {}  # file name → text that `contents` wants to lie beside the records
        self._index: dict[str, dict] = {}
        self._bar: progress.Bar | None = None
        with _quiet():
            super().__init__(data_dir=os.fspath(self._writing),
                             config=tfds.core.BuilderConfig(name=str(data.size), version=str(self.VERSION)))

    @abstractmethod
    def contents(self) -> dict[str, Sequence[Record]]:
        """Split name → its records, each made only when it is asked for. A split without records is left out."""

    def prepare(self, anew: bool = False) -> Path:
        """Writes the data set unless it is there, all of it or nothing, and returns its directory.

        anew: also if it is there; the old one stays until the new one is whole. The caller holds the lock then.

        Raises `UserError` if the directory cannot be written or the disk is full.
        """
        if anew or not self.target.exists():
            try:
                with _quiet():
                    self.download_and_prepare(file_format="array_record", download_dir=self._writing / "unused")  # made come what may
                _to_disk(Path(self.data_dir))
                if anew:
                    replace(self.target, Path(self.data_dir))
                else:
                    os.rename(self.data_dir, self.target)
            except OSError as error:
                if anew or not self.target.exists():  # otherwise another process was faster
                    raise UserError(cannot_write(self.target, error)) from error
            finally:
                shutil.rmtree(self._writing, ignore_errors=True)
        return self.target

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Tensor(shape=(self.size, self.size, 3), dtype=np.uint8, encoding="bytes"),
            "image_id": tfds.features.Text(),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            **{name: tfds.features.Text() for name in self.EXTRA},
        }
        return _LocalInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _shard_iterators_per_split(self, dl_manager):
        per_shard = max(1, _SHARD_BYTES // (self.size * self.size * 3))
        contents = {split: records for split, records in self.contents().items() if len(records)}
        self._bar = progress.bar("writing", sum(map(len, contents.values())))
        shards = {}
        for split, records in contents.items():
            index = {"image_ids": [], "captions": [], "extra": {name: [] for name in self.EXTRA}}
            self._index[split] = index | {"hash": hashlib.blake2b(digest_size=16)}
            shards[split] = [_Shard(self._index[split], records, start, min(start + per_shard, len(records)),
                                    self._bar)
                             for start in range(0, len(records), per_shard)]
        return shards

    def _example_writer(self):
        return _PlainWriter(tfds.core.FileFormat.ARRAY_RECORD)

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        try:
            super()._download_and_prepare(dl_manager, download_config)
        finally:
            if self._bar is not None:
                self._bar.close()
        for split, index in self._index.items():
            index["fingerprint"] = index.pop("hash").hexdigest()
            Path(self.data_dir, split + _INDEX).write_text(json.dumps(index, ensure_ascii=False), "utf-8")
        for name, text in self.beside.items():
            Path(self.data_dir, name).write_text(text, "utf-8", "backslashreplace")  # file names need be no text


def _to_disk(directory: Path) -> None:
    """Waits for the disk, so that a power cut after `directory` is renamed does not leave it with empty files."""
    for path in directory.iterdir():
        with open(path, "rb") as file:
            os.fsync(file)


class _LocalInfo(tfds.core.DatasetInfo):
    """TFDS's, which asks its own storage about a data set that is new here, and leaves an empty directory in /tmp."""

    def initialize_from_bucket(self) -> None:
        pass


class _PlainWriter(ExampleWriter):
    """TFDS's writer without compression, which saves a fifth of the disk for ten times the writing."""

    def write(self, path, examples) -> None:
        with _as_os_error():
            writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
        for _, example in examples:
            with _as_os_error():
                writer.write(example)
        with _as_os_error():
            writer.close()


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """ArrayRecord reports a full disk as a RuntimeError with a long story, of which the first clause matters."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise OSError(str(error).split(";")[0]) from error


@dataclass
class _Shard:
    """The generator of one file, which notes in the split's index what it has written."""

    index: dict
    records: Sequence[Record]
    start: int
    stop: int
    bar: progress.Bar

    def __call__(self) -> Iterator[tuple[int, dict]]:
        for i in range(self.start, self.stop):
            record = self.records[i]
            captions = list(record.captions)
            self.index["image_ids"].append(record.image_id)
            self.index["captions"].append(captions)
            for name, texts in self.index["extra"].items():
                texts.append(record.extra[name])
            self.index["hash"].update(json.dumps([record.image_id, captions, dict(record.extra)]).encode())
            self.index["hash"].update(np.ascontiguousarray(record.image_HWC))
            yield i, {"image": record.image_HWC, "image_id": record.image_id, "captions": captions, **record.extra}
            self.bar.update()


@dataclass(frozen=True)
class Split:
    """A prepared split, or several joined with "+", with random access. A pickled copy opens the files anew."""

    path: Path  # the data set's directory
    name: str  # as in "train+restval"
    image_ids: list[str]
    captions: list[list[str]]  # of each photo, as they were written by people
    extra: dict[str, list[str]]  # further texts of each photo, such as the objects that Shapes drew
    fingerprint: str  # of ids, captions and pixels: equal if and only if the content is

    def __len__(self) -> int:
        return len(self.image_ids)

    def image(self, i: int) -> np.ndarray:
        """Photo `i` as uint8 [H, W, 3]. Raises `UserError` if the file that holds it is damaged."""
        records, photo = self._source
        try:
            return photo.deserialize_example_np(records[int(i)])["image"]
        except (RuntimeError, ValueError) as error:  # ArrayRecord's and TFDS's, about a file that was cut
            raise UserError(_damaged(self.path, error)) from error

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """Photos as uint8 [n, H, W, 3]; `indices` may repeat and come in any order."""
        _, photo = self._source
        image_NHWC = np.empty((len(indices), *photo["image"].shape), np.uint8)
        for image_HWC, i in zip(image_NHWC, indices, strict=True):
            image_HWC[...] = self.image(i)
        return image_NHWC

    @property
    def _source(self) -> tuple[Sequence[bytes], tfds.features.FeaturesDict]:
        """The records, and what reads the photo in one, but not the captions, which takes as long again."""
        if "_opened" not in self.__dict__:
            with _OPENING:  # grain's threads come together
                if "_opened" not in self.__dict__:
                    object.__setattr__(self, "_opened", self._open())
        return self._opened

    def _open(self):
        try:
            source = tfds.builder_from_directory(self.path).as_data_source(self.name)
            return source.data_source, tfds.features.FeaturesDict({"image": source.dataset_info.features["image"]})
        except Exception as error:  # TFDS and protobuf raise many kinds for a description that is damaged or not there
            raise UserError(_damaged(self.path, error)) from error

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_opened"}


def open_split(data: config.Data, split: str) -> Split:
    """The prepared split `split` of `data`; "a+b" joins splits in that order. Shapes is drawn first if need be.

    Raises `UserError` if the data set is not prepared (with the command that does it), is damaged, or lacks the split.
    """
    path = _prepared(data)
    offered = _offered(path)
    names = split.split("+")
    if missing := [name for name in names if name not in offered]:
        raise UserError(f"data set {dataset_name(data)} has no split {missing[0]!r}; it offers {', '.join(offered)}: "
                        f"{_instead(data, split, missing[0], offered)}")
    if len(set(names)) < len(names):
        raise UserError(f"split {split!r} names the same split twice")
    parts = [_read_index(path, name) for name in names]
    fingerprints = [part["fingerprint"] for part in parts]
    joined = hashlib.blake2b("+".join(fingerprints).encode(), digest_size=16).hexdigest()
    return Split(
        path=path,
        name=split,
        image_ids=[image_id for part in parts for image_id in part["image_ids"]],
        captions=[captions for part in parts for captions in part["captions"]],
        extra={key: [text for part in parts for text in part["extra"][key]] for key in parts[0]["extra"]},
        fingerprint=fingerprints[0] if len(parts) == 1 else joined,
    )


def splits(data: config.Data) -> list[str]:
    """Names of the splits that the prepared data set offers. Raises `UserError` if it is not prepared."""
    return _offered(_prepared(data))


def _prepared(data: config.Data) -> Path:
    path = find(data)
    if path.exists():
        return path
    if data.name in _DRAWN:
        return builder_class(data.name)(data).prepare()
    where = f" --data-dir {shlex.quote(data.dir)}" if data.dir else ""
    raise UserError(f"data set {dataset_name(data)} is not prepared at size {data.size} in {data_dir(data)}; run: "
                    f"python -m jaxcap.prepare {data.name} --source DIR{_label_option(data)} --size {data.size}{where}")


def _label_option(data: config.Data) -> str:
    """The options of `prepare` that make the data set of this label. Raises `UserError` if there are none."""
    if data.name == "folder":
        if not data.label:
            raise UserError("data.name=folder needs data.label=NAME, the --label that python -m jaxcap.prepare folder was given")
        return f" --captions FILE --label {data.label}"
    if data.label not in _LABELS[data.name]:
        offered = " or ".join(repr(label) for label in _LABELS[data.name])
        raise UserError(f"no command prepares a data set {dataset_name(data)}: with data.name={data.name}, data.label must be {offered}, "
                        f"not {data.label!r}")
    return f" --splits {data.label}" if data.label else ""


def _offered(path: Path) -> list[str]:
    """The splits in `path`, the usual ones first. Raises `UserError` if there are none."""
    order = {"train": 0, "restval": 1, "val": 2, "test": 3}
    names = [file.name.removesuffix(_INDEX) for file in path.glob("*" + _INDEX)]
    if not names:
        raise UserError(_damaged(path, f"it has no *{_INDEX}"))
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))


def _instead(data: config.Data, split: str, missing: str, offered: Sequence[str]) -> str:
    """What to do where a split is not there."""
    ways = {data.val: f"set data.val={offered[0]} (evaluate: --split {offered[0]})", data.train: f"set data.train={offered[0]}"}
    way = ways.get(split, f"name one of these (evaluate: --split {offered[0]})")
    if data.name == "folder" and missing in ("val", "test"):
        way += (f", or prepare it again with --force, from a caption file that puts photos into {missing}, or one without splits and "
                f"a --{missing}-share above 0")
    return way


def _read_index(path: Path, split: str) -> dict:
    try:
        index = json.loads((path / (split + _INDEX)).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(_damaged(path, error)) from error
    kinds = {"image_ids": list, "captions": list, "extra": dict, "fingerprint": str}
    if not (isinstance(index, dict) and all(isinstance(index.get(key), kind) for key, kind in kinds.items())
            and len(index["image_ids"]) == len(index["captions"])):
        raise UserError(_damaged(path, f"{split + _INDEX} is no index of photos and captions"))
    return index


def _damaged(path: Path, error: object) -> str:
    reason = str(error).strip().split("\n")[0].split(";")[0]  # the first clause of what may be a long story
    return f"the prepared data set in {path} is damaged ({reason}); run its prepare command again with --force"


@contextlib.contextmanager
def _quiet():
    """Silences TFDS, which announces downloads that do not happen; our own progress bars are on stderr.

    For one thread at a time: whoever leaves last restores what it found.
    """
    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
