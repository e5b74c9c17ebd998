"""Large files over HTTP: resumed where they were cut, checked, and in place only when they are whole."""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from jaxcap import locks, progress
from jaxcap.errors import UserError, free_or

_CHUNK = 1 << 20
_TIMEOUT_S = 30.0  # without a byte
_ATTEMPTS = 5  # in a row that bring nothing
_PAUSE_S = 1.0  # after the first failure; doubled after each further one


@dataclass(frozen=True)
class Remote:
    """A published file: where it is and how to know that it is the right one. One checksum at least is given."""

    url: str
    size: int = 0  # bytes; 0 is not known, and the server's word is taken
    sha256: str = ""  # or as much of its beginning as is published
    md5: str = ""  # where no SHA-256 is published

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


class _Cut(Exception):
    """A transfer that ended early; the message says how."""


class _GivenUp(Exception):
    """A server that does not answer, or refuses; the message ends where what else to do follows."""


def fetch(remote: Remote, directory: Path, otherwise: str = "") -> Path:
    """`directory/name` of a remote file, downloaded unless it is there.

    What has arrived of an interrupted download lies in `name.part` and is completed by the next call. Raises
    `UserError` if the server cannot be reached or refuses (it then says what to do `otherwise`), the checksum is wrong
    (the part is deleted then), or the disk is full.
    """
    target = directory / remote.name
    if target.exists():
        return target
    part = directory / (remote.name + ".part")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file:
            locks.hold(file, f"another process is downloading {part.stem}; wait for it")
            try:
                if remote.size or not _is(remote, part):
                    with progress.bar(remote.name, remote.size or None, "B") as bar:
                        _complete(remote, file, bar)
            except BaseException:
                if not part.stat().st_size:
                    part.unlink()
                raise
        if not _is(remote, part):
            part.unlink()
            kind, published = ("SHA-256", remote.sha256) if remote.sha256 else ("MD5", remote.md5)
            raise UserError(f"what {remote.url} sent is not the published file (its {kind} is not {published[:16]}…); "
                            "it was deleted, run the same command to download it again")
        os.replace(part, target)
    except _GivenUp as problem:
        raise UserError(f"{problem} {otherwise or f'put the file into {directory} yourself'}") from problem
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}; what has arrived is kept, "
                        f"{free_or('choose a directory that can be written', error)} and run the same command again") from error
    return target


def _complete(remote: Remote, file, bar: progress.Bar) -> None:
    """Appends to `file` until it has the whole of it."""
    failures = 0
    while (before := file.seek(0, os.SEEK_END)) < remote.size or not remote.size:
        bar.n = before
        bar.refresh()
        try:
            _transfer(remote, file, before, bar)
            return
        except _Cut as cut:
            arrived = file.seek(0, os.SEEK_END)
            failures = 1 if arrived > before else failures + 1
            if failures == _ATTEMPTS:
                host = urllib.parse.urlsplit(remote.url).hostname
                here = f"{arrived / remote.size:.0%}" if remote.size else f"{arrived / 1e6:,.1f} MB"
                again = f"{here} of it is here: run the same command again to go on" if arrived else "run the same command again"
                raise _GivenUp(f"cannot download {remote.name} from {host} ({cut}); {again}, or") from cut
            time.sleep(_PAUSE_S * 2 ** (failures - 1))


def _transfer(remote: Remote, file, offset: int, bar: progress.Bar) -> None:
    """One request for the bytes from `offset` on.

    Raises `_Cut` if they do not all come, `_GivenUp` on a refusal, `UserError` if they are not the published ones.
    """
    with _request(remote, offset) as response:
        if response.status == 416:  # there are none: what is here is the whole, or the checksum will tell that it is not
            return
        start = _start(response)
        length = response.headers.get("Content-Length")
        size = remote.size or start + int(length or 0)
        total = start + int(length or size - start)
        if total != size or start not in (0, offset):
            raise UserError(f"{remote.url} is {total:,} bytes long, not the published {size:,}; the file has "
                            "changed, or something between answers in its place")
        bar.total = size or None
        if start != offset:  # the server does not resume
            file.truncate(0)
            bar.reset()
        while chunk := _read(response):
            file.write(chunk)
            bar.update(len(chunk))
        file.flush()
    arrived = file.seek(0, os.SEEK_END)
    if arrived < size:
        raise _Cut("the connection was cut")


def _request(remote: Remote, offset: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": "jaxcap", "Range": f"bytes={offset}-"} if offset else {"User-Agent": "jaxcap"}
    try:
        return urllib.request.urlopen(urllib.request.Request(remote.url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and offset:
            return error  # which is a response, too
        if error.code < 500:
            raise _GivenUp(f"{remote.url} answers {error.code} {error.reason};") from error
        raise _Cut(f"{error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # URLError wraps what went wrong
        raise _Cut(getattr(reason, "strerror", None) or str(reason)) from error


def _start(response) -> int:
    """The position of a response's first byte."""
    if response.status != 206:
        return 0
    unit_range = response.headers.get("Content-Range", "")  # bytes 100-199/200
    return int(unit_range.removeprefix("bytes ").partition("-")[0])


def _read(response) -> bytes:
    """The next chunk; network trouble becomes `_Cut`, so that what is left of OSError is the disk's."""
    try:
        return response.read(_CHUNK)
    except http.client.IncompleteRead as error:
        if not error.partial:
            raise _Cut("the connection was cut") from error
        return error.partial
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(str(error) or type(error).__name__) from error


def _is(remote: Remote, path: Path) -> bool:
    """Whether a file has the published checksum."""
    kind, published = ("sha256", remote.sha256) if remote.sha256 else ("md5", remote.md5)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest().startswith(published)
