"""Where prepared data sets lie: `<data_dir>/<name>[-label]/<size>/<version>/`."""

import contextlib
import importlib
import os
import shutil
from pathlib import Path

from jaxcap import config, locks
from jaxcap.errors import UserError, free_or

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


def stage_path(path: Path) -> Path:
    """Where photos for the data set at `path` are decoded; whoever prepares it holds the file `lock` there."""
    return path.with_name(path.name + ".staging")


def find(data: config.Data) -> Path:
    """`prepared_path`, where a data set whose replacement was cut short between two renames is put back first."""
    path = prepared_path(data)
    aside, stage = _aside(path), stage_path(path)
    if aside.exists() and not path.exists():
        with contextlib.suppress(OSError, UserError), contextlib.ExitStack() as stack:  # refused: the new one is about to come
            if stage.exists():
                locks.hold(stack.enter_context(open(stage / "lock", "w")), "the data set is being replaced")
            aside.rename(path)
    return path


def replace(path: Path, new: Path) -> None:
    """Renames the whole data set `new` to `path`; one that is there goes only then, and comes back if that fails.

    For who holds the lock. Raises `OSError` if the place may not be changed.
    """
    aside = _aside(path)
    try:
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        new.rename(path)
    except BaseException:
        if not path.exists() and aside.exists():
            aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".replaced")


def cannot_write(path: Path, error: Exception) -> str:
    """The sentence for a data set that could not be written to `path`."""
    reason = getattr(error, "strerror", None) or error
    return f"cannot write to {path}: {reason}; {free_or('name another directory with --data-dir, or data.dir in training', error)}"
