"""Where prepared data sets lie: `<data_dir>/<name>[-label]/<size>/<version>/`."""

import contextlib
import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxcap import config
from jaxcap.errors import UserError

_BUILDERS = {  # data.name → where its CaptionBuilder is
    "shapes": "jaxcap.data.shapes:Shapes",
    "flickr8k": "jaxcap.data.flickr8k:Flickr8k",
    "coco": "jaxcap.data.coco:Coco",
    "folder": "jaxcap.data.folder:Folder",
}


def data_dir(data: config.Data) -> Path:
    """Where prepared data sets are kept: `data.dir`, or $JAXCAP_DATA, or ~/.cache/jaxcap/data."""
    return Path(data.dir or os.environ.get("JAXCAP_DATA") or "~/.cache/jaxcap/data").expanduser().absolute()


def dataset_name(data: config.Data) -> str:
    """The directory name of a data set: its name, and its label if it has one."""
    return f"{data.name}-{data.label}" if data.label else data.name


def builder_class(name: str) -> type:
    """The `records.CaptionBuilder` of the data set `name` (one of `config.Data.name`'s)."""
    module, attribute = _BUILDERS[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def prepared_path(data: config.Data, version=None) -> Path:
    """The directory of the prepared data set (default: in its builder's version), whether or not it exists."""
    version = version or builder_class(data.name).VERSION
    return data_dir(data) / dataset_name(data) / str(data.size) / str(version)


@contextlib.contextmanager
def set_aside(data: config.Data) -> Iterator[None]:
    """Clears the place of a prepared data set for a new one; if that is not made, the old one comes back.

    Raises `UserError` if the place may not be changed.
    """
    path = prepared_path(data)
    aside = path.with_name(path.name + ".replaced")
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        try:
            path.rename(aside)
        except OSError as error:
            raise UserError(cannot_write(path, error)) from error
    try:
        yield
    finally:
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
        elif aside.exists():
            aside.rename(path)


def cannot_write(path: Path, error: Exception) -> str:
    """The sentence for a data set that could not be written to `path`."""
    reason = getattr(error, "strerror", None) or error
    return f"cannot write to {path}: {reason}; free the disk or name another directory with --data-dir (data.dir)"
