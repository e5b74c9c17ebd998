"""PyTorch's side: forms of the step, made ready, checked and timed when `__main__` asks."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers import forms
from benchmarks.peers.torch_step import Step
from jaxcap import memory
from jaxcap.errors import UserError


class Side:
    """Answers to what `__main__` asks, each a JSON object."""

    def __init__(self, directory: Path):
        self._directory, self._steps = directory, {}
        memory.keep()

    def hello(self) -> dict:
        return {"version": torch.__version__, "cuda": torch.cuda.is_available()}

    def settings(self, *, platform: str) -> dict:
        """Reads the captioner that jaxcap's side left, and chooses the device: that of jaxcap."""
        if platform not in ("cpu", "gpu"):
            raise UserError(f"jaxcap runs on a {platform} here, PyTorch cannot: compare on a CPU (JAX_PLATFORMS=cpu) or a GPU")
        if platform == "gpu" and not torch.cuda.is_available():
            raise UserError("jaxcap runs on a GPU that this PyTorch cannot use: install it for CUDA, or set JAX_PLATFORMS=cpu")
        self._device = torch.device("cuda" if platform == "gpu" else "cpu")
        if self._device.type == "cpu":
            torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        torch.backends.cudnn.benchmark = True
        self._described = json.loads((self._directory / "model.json").read_text("utf-8"))
        with np.load(self._directory / "model.npz") as file:
            self._arrays = dict(file)
        return {"threads": torch.get_num_threads()}

    def agree(self, *, kind: str, batch: int) -> dict:
        """Loss and gradient norms of the plain form in full float32, whatever is timed later."""
        self._precise(True)
        return Step(kind, frozenset(), {**self._described, "dtype": "float32"}, self._arrays, self._inputs(kind, batch),
                    self._device).agree()

    def prepare(self, *, kind: str, batch: int, form: str, limit_s: int) -> dict:
        """Gets a form ready to be timed, and says what it computes with nothing random.

        loss: of its first step as it is timed, with chance. ready_s: compilation and first runs.
        """

        def late(number, frame):
            raise TimeoutError(f"not ready within {limit_s} s")

        self._precise(False)
        previous = signal.signal(signal.SIGALRM, late)
        signal.alarm(limit_s)
        start = time.perf_counter()
        try:
            step = Step(kind, forms.parse(form), self._described, self._arrays, self._inputs(kind, batch), self._device)
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
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {float(loss)}: its time means nothing")
        return found

    def forget(self) -> dict:
        """Drops all forms and their memory."""
        self._steps = {}
        torch.compiler.reset()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    def _inputs(self, kind: str, batch: int) -> dict[str, np.ndarray]:
        with np.load(self._directory / f"{kind}-{batch}.npz") as file:
            return dict(file)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    @staticmethod
    def _precise(precise: bool) -> None:
        """Full float32, or TF32 as XLA multiplies where nothing else is asked for."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not precise
