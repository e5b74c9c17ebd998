"""PyTorch's side."""

import torch

from benchmarks.peers import forms
from benchmarks.peers.peer_side import PeerSide
from benchmarks.peers.torch_captions import Captions
from benchmarks.peers.torch_step import Step
from jaxcap import memory
from jaxcap.errors import UserError


class Side(PeerSide):
    """`PeerSide` with PyTorch."""

    def hello(self) -> dict:
        return {"version": torch.__version__}

    def settings(self, *, platform: str) -> dict:
        """Reads the captioner that jaxcap's side left, and chooses the device: that of jaxcap."""
        if platform not in ("cpu", "gpu"):
            raise UserError(f"jaxcap runs on a {platform} here, PyTorch cannot: compare on a CPU (JAX_PLATFORMS=cpu) or a GPU")
        if platform == "gpu" and not torch.cuda.is_available():
            raise UserError("jaxcap runs on a GPU that this PyTorch cannot use: install it for CUDA, or set JAX_PLATFORMS=cpu")
        self._device = torch.device("cuda" if platform == "gpu" else "cpu")
        if self._device.type == "cpu":
            torch.set_num_threads(memory.cores())
        self._read()
        return {"threads": torch.get_num_threads()}

    def prepare(self, **asked) -> dict:
        answer = super().prepare(**asked)
        step = self._steps[asked["form"]]
        return {**answer, "lstm_dtype": step.lstm_dtype()} if isinstance(step, Step) else answer

    def forget(self) -> dict:
        super().forget()
        torch.compiler.reset()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    def _step(self, kind: str, batch: int, form: str, dtype: str) -> Step | Captions:
        words, described = forms.parse("torch", form), {**self._described, "dtype": dtype}
        if kind == forms.BEAM:
            return Captions(words, described, self._arrays, self._inputs(kind, batch), self._device)
        return Step(kind, words, described, self._arrays, self._inputs(kind, batch), self._device)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _precise(self, precise: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not precise
        torch.backends.cudnn.benchmark = not precise  # what is not timed needs no search for the fastest convolutions
