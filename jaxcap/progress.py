"""The progress of commands on stderr, with a rate and an ETA: bars on a terminal, lines in a file or a pipe."""

import sys
import time
import weakref
from typing import IO, ClassVar, Self

from tqdm import tqdm

PAUSE_S = 10.0  # between two lines

silent = False  # in all processes of a run but the first


class Lines:
    """What a file or a pipe has in place of a bar: whole lines, one every `PAUSE_S` at most and one at the end.

    Inside another one there is none at the end unless there was one before: what is soon over is not spoken of.
    """

    _open: ClassVar[weakref.WeakSet["Lines"]] = weakref.WeakSet()

    def __init__(self, what: str, total: int | None, unit: str, initial: int):
        self.n, self.total, self._what, self._unit, self._note = initial, total, what, unit, ""
        self._ends = not Lines._open
        self._said = initial  # what `n` was in the last line
        self._spoke = time.monotonic()
        self.refresh()
        Lines._open.add(self)

    def update(self, n: int = 1) -> None:
        self.n += n
        self._updated = time.monotonic()
        if self._updated - self._spoke >= PAUSE_S:
            self._say()
            self._ends = True

    def refresh(self) -> None:
        """After `n` was set: what is there already is no speed."""
        self._first, self._begun = self.n, time.monotonic()
        self._updated = self._begun

    def unpause(self) -> None:
        """The time since the last update went into something else and counts for no speed."""
        self.aside(time.monotonic() - self._updated)

    def aside(self, seconds: float) -> None:
        """So much of the time since the last update went into something else: it counts for no speed and no pause."""
        self._begun, self._updated, self._spoke = self._begun + seconds, self._updated + seconds, self._spoke + seconds

    def reset(self) -> None:
        self.n = 0
        self.refresh()

    def set_description(self, what: str) -> None:
        self._what = what

    def set_postfix_str(self, note: str, refresh: bool = True) -> None:
        self._note = note

    def write(self, text: str, file: IO | None = None) -> None:
        print(text, file=file, flush=True)

    def close(self) -> None:
        if self in Lines._open:
            Lines._open.remove(self)
            if self._ends and self.n != self._said:
                self._say(last=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _say(self, last: bool = False) -> None:
        self._said, self._spoke = self.n, time.monotonic()
        speed = (self.n - self._first) / max(self._spoke - self._begun, 1e-9)
        unit = "" if self._unit == "B" else self._unit
        parts = [self._count(self.n) + (f" of {self._count(self.total)}" if self.total else "") + unit, f"{self._count(speed)}{unit}/s"]
        if self.total and speed and not last:
            parts.append(f"{_duration((self.total - self.n) / speed)} left")
        print(f"{self._what}: {', '.join(filter(None, [*parts, self._note]))}", file=sys.stderr, flush=True)

    def _count(self, number: float) -> str:
        if self._unit == "B":
            return tqdm.format_sizeof(number, "B")
        return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.2g}"


Bar = tqdm | Lines


def aside(seconds: float) -> None:
    """Keeps the last `seconds` out of the speed that open lines tell; a bar's is that of its last updates."""
    for lines in Lines._open:
        lines.aside(seconds)


def bar(what: str, total: int | None, unit: str = " photos", initial: int = 0) -> Bar:
    """A bar, or lines where stderr is no terminal (without a total: a counter); unit "B" is written with k, M, G."""
    if not (silent or sys.stderr.isatty()):
        return Lines(what, total, unit, initial)
    return tqdm(desc=what, total=total, unit=unit, unit_scale=unit == "B", initial=initial, mininterval=0.2, disable=silent,
                dynamic_ncols=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
