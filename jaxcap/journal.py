"""What a person sees of a run while it goes on, and what stays of it: bar, metrics.jsonl, TensorBoard events."""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

from jaxcap import parallel, progress
from jaxcap.errors import UserError, free_or
from jaxcap.events import EventFile

SMOOTHING = 0.98  # of the shown loss, per step: a batch's own loss is too noisy to see learning in it
FLUSH_S = 120  # between the times that events are forced to disk, for which steps wait


class Journal:
    """The journal of a run of `total` optimizer steps that begins at `step`.

    The first process of several writes and speaks, the others only keep count. On a resumed run the lines of steps that will be trained again are dropped first.
    """

    def __init__(self, directory: Path, *, total: int, step: int = 0, smoothed: float | None = None):
        self.path = directory / "metrics.jsonl"
        self.smoothed = smoothed
        self._last = time.perf_counter()
        self._flushed = -math.inf
        self._file = self._events = None
        if parallel.first():
            self._open(directory, step)
        self._bar = progress.bar("training", total, " steps", step)  # last: nothing but steps is to be said beside it

    def _open(self, directory: Path, step: int) -> None:
        kept = [line for line in read(directory) if line["step"] <= step]
        rewritten = self.path.with_name(self.path.name + ".tmp")
        try:
            rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(rewritten, self.path)
            self._events = EventFile(directory)
            self._file = self.path.open("a", encoding="utf-8")
            if step:
                self._events.restart(step + 1)
        except OSError as error:
            with contextlib.suppress(OSError):
                rewritten.unlink(missing_ok=True)
            raise self._unwritable(error) from error

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._file:
            self._bar.write(text, file=sys.stderr)

    def phase(self, name: str, *, new: bool) -> None:
        """Names what is going on; a `new` phase's loss is smoothed from its own beginning."""
        self._bar.set_description(name)
        if new:
            self.smoothed = None

    def pause(self) -> None:
        """Forgets the time since the last line: it went into something other than steps."""
        self._last = time.perf_counter()
        self._bar.unpause()

    def training(self, step: int, losses: list[float], **values: float | str) -> None:
        """Records the steps up to `step`, whose losses are given, oldest first; `values` go into the line as they are."""
        for loss in losses:
            self.smoothed = loss if self.smoothed is None else SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
        now = time.perf_counter()
        step_ms, self._last = 1000 * (now - self._last) / len(losses), now
        self._write({"step": step, **values, "loss": sum(losses) / len(losses), "loss_smooth": self.smoothed,
                     "step_ms": round(step_ms, 3)}, "train")
        self._bar.set_postfix_str(f"loss {self.smoothed:.3f}", refresh=False)
        self._bar.update(step - self._bar.n)

    def scores(self, step: int, epoch: float, split: str, scores: dict[str, float]) -> None:
        """Records scores of a split."""
        self._write({"step": step, "epoch": epoch, "split": split, **scores}, split)
        self.pause()

    def close(self) -> None:
        self._bar.close()
        for file in (self._file, self._events) if self._file else ():
            with contextlib.suppress(OSError):  # what could not be written has been said
                file.close()

    def _write(self, line: dict, group: str) -> None:
        if not self._file:
            return
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._events.scalars(line["step"], {f"{group}/{name}": value for name, value in line.items()
                                                if isinstance(value, float) and math.isfinite(value)})
            if time.monotonic() > self._flushed + FLUSH_S:
                self._events.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.path} cannot be written: {error.strerror or error}; "
                         f"{free_or('move the run to where it can be written', error)} and resume")


def read(directory: Path) -> list[dict]:
    """The lines of metrics.jsonl; one that is no JSON object with a step, such as a last one that a crash cut short, is left out."""
    path = directory / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text.decode("utf-8"))
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines
