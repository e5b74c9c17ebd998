"""Decodes the photos of a data set once, in parallel, onto disk, so that an interrupted `prepare` resumes where it was.

The stage is a directory beside the data set's future place, `<version>.staging/`: the pixels of photo i at offset
i · size² · 3 of `pixels`, and a journal that says which photos are there. A line enters the journal only after its
pixels have reached the disk, so that neither Ctrl-C nor a power cut leaves a line without pixels.
"""

import contextlib
import hashlib
import json
import os
import shutil
import zipfile
import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from jaxcap import config, locks, memory, progress
from jaxcap.data import photos
from jaxcap.data.places import cannot_write, stage_path
from jaxcap.data.records import CaptionBuilder, Record
from jaxcap.errors import UserError

_JOURNAL_EVERY = 256  # photos between two lines of the journal: what a power cut loses at most


class Source(Protocol):
    """Where the bytes of a photo are; `str` of it names the place for people. version: what differs when the bytes do, None
    where they are not there."""

    def read(self) -> bytes: ...

    def version(self) -> list[int] | None: ...


@dataclass(frozen=True)
class File:
    """A photo in a file of its own."""

    path: Path

    def read(self) -> bytes:
        return self.path.read_bytes()

    def version(self) -> list[int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return [found.st_size, found.st_mtime_ns]

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class ZipMember:
    """A photo inside a zip archive, which is read without unpacking it."""

    archive: Path
    member: str

    def read(self) -> bytes:
        return _zip(self.archive).read(self.member)

    def version(self) -> list[int] | None:
        try:
            return [_zip(self.archive).getinfo(self.member).CRC]
        except (OSError, zipfile.BadZipFile, KeyError):
            return None

    def __str__(self) -> str:
        return f"{self.archive}!{self.member}"


@dataclass(frozen=True)
class Photo:
    """A photo to prepare, and what people wrote about it."""

    image_id: str
    captions: tuple[str, ...]
    source: Source


@dataclass(frozen=True)
class Plan:
    """What a data set's source holds, before any photo is opened."""

    splits: dict[str, list[Photo]]
    problems: tuple[str, ...] = ()  # "name: reason" of what is left out, one a line


def require_directory(source: Path) -> None:
    """Raises `UserError` unless `source` is a directory that can be listed."""
    if not source.is_dir():
        what = "is not a directory" if source.exists() else "does not exist"
        raise UserError(f"--source {source} {what}")
    if not os.access(source, os.R_OK | os.X_OK):
        raise UserError(f"--source {source} may not be read")


class PhotoBuilder(CaptionBuilder, skip_registration=True):
    """A data set made of photo files: stages every photo of a plan, skips the damaged ones by name, writes the rest.

    Args: data: names the data set and its size. plan: its photos. workers: decoding threads.
    After `prepare`, `skipped` has one "name: reason" for everything left out; it also lies beside the records.
    """

    def __init__(self, data: config.Data, plan: Plan, workers: int = 0):
        super().__init__(data)
        self.plan = plan
        self.workers = workers or memory.cores()
        self.skipped: list[str] = []
        self._directory = stage_path(self.target)

    def prepare(self, anew: bool = False) -> Path:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(cannot_write(self._directory, error)) from error
        with open(self._directory / "lock", "w") as lock:
            locks.hold(lock, f"another process is preparing this data set in {self._directory}; wait for it")
            for abandoned in self.target.parent.glob("incomplete.*_" + self.target.name):  # from a killed run
                shutil.rmtree(abandoned, ignore_errors=True)
            try:
                path = super().prepare(anew)
            except UserError:
                if not _read_journal(self._directory / "journal", sum(map(len, self.plan.splits.values()))):
                    self._clear()  # there is nothing to go on from
                raise
            shutil.rmtree(self._directory, ignore_errors=True)
        return path

    def _clear(self) -> None:
        """Removes the stage, and the directories around it of this data set where nothing else is in them."""
        shutil.rmtree(self._directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            for around in self.target.parents[:2]:
                around.rmdir()

    def contents(self) -> dict[str, Sequence[Record]]:
        everything = [photo for items in self.plan.splits.values() for photo in items]
        staged = stage(everything, self.size, self._directory, self.workers)
        self.skipped = [*self.plan.problems, *staged.damaged.values()]
        self.beside["skipped.txt"] = "".join(line + "\n" for line in self.skipped)
        contents, start = {}, 0
        for split, items in self.plan.splits.items():
            good = [i for i in range(start, start + len(items)) if i not in staged.damaged]
            contents[split] = _StagedRecords(items, staged.pixels_NHWC, good, start)
            start += len(items)
        return contents



@dataclass(frozen=True)
class _StagedRecords(Sequence):
    items: list[Photo]
    pixels_NHWC: np.ndarray
    good: list[int]  # of the stage
    start: int  # of the split in the stage

    def __len__(self) -> int:
        return len(self.good)

    def __getitem__(self, i: int) -> Record:
        item = self.items[self.good[i] - self.start]
        return Record(item.image_id, self.pixels_NHWC[self.good[i]], item.captions)


@dataclass(frozen=True)
class Staged:
    """Photos on disk at their final size."""

    pixels_NHWC: np.ndarray  # uint8, mapped from the file; zeros where damaged
    damaged: dict[int, str]  # photo → "name: reason"


def stage(items: Sequence[Photo], size: int, directory: Path, workers: int) -> Staged:
    """Decodes and resizes `items` to `size` into `directory`, except those that an earlier, interrupted call has done.

    Raises `UserError` if no photo at all can be read, or the disk is full: what is done then stays.
    """
    try:
        _restart_if_other(items, size, directory)
        done = _read_journal(directory / "journal", len(items))
        _check_space(directory, (len(items) - len(done)) * size * size * 3 + len(items) * size * size * 3)
        damaged = _decode(items, size, directory, done, workers)
    except OSError as error:
        raise UserError(cannot_write(directory, error)) from error
    if len(damaged) == len(items):
        raise UserError(f"none of the {len(items)} photos can be read; the first is {next(iter(damaged.values()))}")
    pixels_NHWC = np.memmap(directory / "pixels", np.uint8, "r", shape=(len(items), size, size, 3))
    return Staged(pixels_NHWC, damaged)


def _decode(items: Sequence[Photo], size: int, directory: Path, done: set[int], workers: int) -> dict[int, str]:
    """Stages all that is not `done`; returns what is damaged."""
    pixels = os.open(directory / "pixels", os.O_RDWR | os.O_CREAT, 0o666)
    todo = [i for i in range(len(items)) if i not in done]
    damaged: dict[int, str] = {}
    finished: deque[int] = deque()  # in the file, not yet in the journal

    def work(i: int) -> tuple[int, str]:
        try:
            image_HWC = photos.load(items[i].source.read(), size)
        except photos.DamagedPhoto as error:
            return i, str(error)
        except FileNotFoundError:
            return i, "there is no such file"
        except (OSError, zipfile.BadZipFile, zlib.error, KeyError) as error:
            return i, f"it cannot be read ({error})"
        _write(pixels, image_HWC.tobytes(), i * size * size * 3)  # here, so that no result waits in memory
        finished.append(i)
        return i, ""

    def note() -> None:
        batch = [finished.popleft() for _ in range(len(finished))]
        os.fdatasync(pixels)
        with open(directory / "journal", "a") as journal:
            journal.write("".join(f"{i}\n" for i in batch))

    bar = progress.bar("decoding", len(items), initial=len(done))
    pool = ThreadPoolExecutor(workers)
    cv2_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # the photos are the parallel part
    try:
        os.ftruncate(pixels, len(items) * size * size * 3)
        for i, reason in pool.map(work, todo):
            bar.update()
            if reason:
                damaged[i] = f"{items[i].image_id}: {reason}"
            if len(finished) >= _JOURNAL_EVERY:
                note()
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
        cv2.setNumThreads(cv2_threads)
        try:
            note()
        finally:
            os.close(pixels)
    return damaged


def _write(file: int, data: bytes, offset: int) -> None:
    """All of `data` at `offset`: the system may write less at a time, last of all before the disk is full."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _read_journal(path: Path, count: int) -> set[int]:
    if not path.exists():
        return set()
    lines = path.read_text().split("\n")[:-1]  # a last line without its end was cut off
    return {int(line) for line in lines if line.isdigit() and int(line) < count}


def _restart_if_other(items: Sequence[Photo], size: int, directory: Path) -> None:
    """Empties the stage if it was made for other photos or another size, or photos have changed since."""
    photos = [[item.image_id, str(item.source), item.source.version()] for item in items]
    plan = hashlib.blake2b(json.dumps([size, photos]).encode())
    note = directory / "plan"
    if not note.exists() or note.read_text() != plan.hexdigest():
        for name in ("plan", "journal", "pixels"):
            (directory / name).unlink(missing_ok=True)
        note.write_text(plan.hexdigest())


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(f"preparing in {directory.parent} needs {needed / 1e6:,.0f} MB while it runs, and "
                        f"{free / 1e6:,.0f} MB are free; name another directory with --data-dir")


@cache
def _zip(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)
