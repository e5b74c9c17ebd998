"""COCO as TFDS's own `coco_captions` builder has written it: read where a person has it already, in ArrayRecord."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import tensorflow_datasets as tfds

from jaxcap import progress
from jaxcap.data.staging import Photo, Plan
from jaxcap.errors import UserError

_WHERE = "coco_captions/2014/*/dataset_info.json"  # below a TFDS data directory


@dataclass(frozen=True)
class TfdsPhoto:
    """A JPEG in a record of a TFDS data set."""

    directory: Path
    split: str
    index: int

    def read(self) -> bytes:
        return _records(self.directory, self.split)[self.index]["image"]

    def version(self) -> list[int]:
        return []  # TFDS writes a data set once

    def __str__(self) -> str:
        return f"{self.directory}:{self.split}[{self.index}]"


def find(source: Path) -> Path | None:
    """The directory of a prepared `coco_captions` if `source` is it or contains it, as ~/tensorflow_datasets does."""
    if (source / "dataset_info.json").exists():
        return source
    return max((info.parent for info in source.glob(_WHERE)), default=None)


def plan(directory: Path) -> Plan:
    """The photos and captions of `coco_captions` in `directory`, with its splits, which are Karpathy's.

    Raises `UserError` if it was written in a format that only TensorFlow reads, or is another data set.
    """
    builder = tfds.builder_from_directory(directory)
    file_format = builder.info.file_format
    if file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{directory} is written as {file_format.value}, which needs TensorFlow to be read; convert it where "
            "TensorFlow is installed (python -m tensorflow_datasets.scripts.convert_format --dataset_dir=… --out_dir=… "
            "--out_file_format=array_record), or use COCO's own archives")
    if not {"image", "image/id", "captions"} <= set(builder.info.features or ()):
        raise UserError(f"{directory} holds the TFDS data set {builder.info.name}, not coco_captions")
    splits = {}
    for split in builder.info.splits:
        records = _records(directory, split)
        photos = []
        with progress.bar(f"reading captions of {split}", len(records)) as bar:
            for index in range(len(records)):
                record = records[index]
                captions = tuple(" ".join(text.decode().split()) for text in record["captions"]["text"])
                photos.append(Photo(str(int(record["image/id"])), captions, TfdsPhoto(directory, split, index)))
                bar.update()
        splits[split] = photos
    return Plan(splits)


@cache
def _records(directory: Path, split: str):
    """Records with the photo left as JPEG."""
    builder = tfds.builder_from_directory(directory)
    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
