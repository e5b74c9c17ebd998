"""What the other side does, whichever its library: a form of the step is made ready, checked and timed when `__main__` asks."""

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxcap import memory


class PeerSide:
    """Answers to what `__main__` asks, each a JSON object. A library adds `hello`, `settings` and what begins with an underscore."""

    def __init__(self, directory: Path):
        self._directory, self._steps = directory, {}
        memory.keep()

    def agree(self, *, kind: str, batch: int) -> dict:
        """Loss and gradient norms of the plain form in full float32, whatever is timed later."""
        self._precise(True)
        return self._step(kind, batch, "eager", "float32").agree()

    def prepare(self, *, kind: str, batch: int, form: str, limit_s: int) -> dict:
        """Gets a form ready to be timed, and says what it computes with nothing random.

        loss: of its first step as it is timed, with chance. ready_s: compilation and first runs, that of the check included.
        """

        def late(number, frame):
            raise TimeoutError(f"not ready within {limit_s} s")

        self._precise(False)
        previous = signal.signal(signal.SIGALRM, late)
        signal.alarm(limit_s)
        start = time.perf_counter()
        try:
            step = self._step(kind, batch, form, self._described["dtype"])
            found = step.agree()
            step.start()
            loss = float(step())
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
        self._steps[form] = step
        return {"found": found, "loss": loss, "ready_s": time.perf_counter() - start}

    def time(self, *, form: str, calls: int) -> dict:
        """Milliseconds a step, of `calls` that are dispatched without waiting in between, and of all cores' work in them."""
        step = self._steps[form]
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            loss = step()
        self._wait()
        found = {"ms": 1000 * (time.perf_counter() - start) / calls, "cpu_ms": 1000 * (time.process_time() - cpu) / calls}
        if not math.isfinite(float(loss)):
            raise RuntimeError(f"the loss is {float(loss)}: its time means nothing")
        return found

    def forget(self) -> dict:
        """Drops all forms and their memory."""
        self._steps = {}
        return {}

    def _read(self) -> None:
        """Reads the captioner that jaxcap's side left."""
        self._described = json.loads((self._directory / "model.json").read_text("utf-8"))
        with np.load(self._directory / "model.npz") as file:
            self._arrays = dict(file)

    def _inputs(self, kind: str, batch: int) -> dict[str, np.ndarray]:
        with np.load(self._directory / f"{kind}-{batch}.npz") as file:
            return dict(file)

    def _step(self, kind: str, batch: int, form: str, dtype: str) -> Any:
        """A step that has `agree()`, `start()` and can be called, which gives the loss."""
        raise NotImplementedError

    def _wait(self) -> None:
        """Returns when the device has done all it was given."""
        raise NotImplementedError

    def _precise(self, precise: bool) -> None:
        """For one run of no matter in full float32; or for timing, with TF32 as XLA multiplies where nothing else is asked for."""
        raise NotImplementedError
