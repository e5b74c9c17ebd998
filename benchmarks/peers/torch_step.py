"""The training step of `benchmarks.step_time` in PyTorch: everything from rows of a resident table to updated parameters."""

import contextlib
import itertools

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import torch_distort, torch_graph
from benchmarks.peers.torch_decoder import Decoder, dropout
from benchmarks.peers.torch_encoder import Encoder


class Step:
    """One kind of step in one form, ready to be called again and again.

    kind: of `benchmarks.workload.KINDS`. form: words of `forms.WORDS`. described, arrays, inputs: what jaxcap's side left.
    """

    def __init__(self, kind: str, form: frozenset[str], described: dict, arrays: dict[str, np.ndarray],
                 inputs: dict[str, np.ndarray], device: torch.device):
        self._kind, self._form, self._described, self._device = kind, form, described, device
        self._optim = described["optim"][kind]
        decoder = Decoder(arrays, dropout=described["dropout"], forget_bias=described["forget_bias"], loop="loop" in form,
                          sparse="sparse" in form, onednn="onednn" in form)
        self._decoder = decoder.to(device).train(kind != "eval").requires_grad_(kind != "eval")
        decoder.lstm.bias_hh_l0.requires_grad_(False)
        self._bfloat16 = described["dtype"] == "bfloat16"
        if self._bfloat16 and kind == "eval":
            decoder.bfloat16()  # once: autocast would round in every step what does not learn
        self._encoder, self._filters = None, []
        if kind != "cached":
            self._encoder = Encoder(described["network"], arrays, merged="merged" in form).to(device)
            self._encoder.train(kind == "joint").requires_grad_(kind == "joint")
            if kind != "joint" and "unfolded" not in form:
                self._encoder.fold("onednn" in form)
            if self._bfloat16 and kind != "joint":
                self._encoder.round()
            if "channels_last" in form:
                self._encoder.to(memory_format=torch.channels_last)
        self._parts = {f"decoder/{name}": params for name, params in decoder.parts().items()} if kind != "eval" else {}
        if kind == "joint":
            self._parts["encoder"] = list(self._encoder.parameters())
            self._filters = [param for param in self._encoder.parameters() if param.ndim > 1]
        self._params = [param for params in self._parts.values() for param in params]
        self._table = torch.from_numpy(inputs["table"]).to(device)
        if kind != "cached":
            self._room = self._table.shape[1] - described["size"]
            self._neutral_81 = torch_distort.neutral(self._room).to(device)
        else:
            self._table = self._table[:, 0]  # one position
        batches = [(torch.from_numpy(tokens).long(), torch.from_numpy(index).long())
                   for tokens, index in zip(inputs["tokens_NBT1"], inputs["index_NB"])]
        if device.type == "cuda":
            batches = [(tokens.pin_memory(), index.pin_memory()) for tokens, index in batches]
        self._batches = itertools.cycle(batches)
        self._static = [x.to(device) for x in batches[0]]
        # A number on the device, so that the same compiled step is checked without chance and timed with it. In eager mode a
        # number of Python's is faster.
        self._chance = torch.zeros((), device=device) if form & {"compile", "overhead", "graph"} else 0.0
        self._loss = self._eager_loss
        if form & {"compile", "overhead"}:
            self._loss = torch.compile(self._eager_loss, dynamic=False, mode="reduce-overhead" if "overhead" in form else None)
        if "fused" in form and self._params:
            self._rate = torch.tensor(0.0, device=device)
            dense = [param for param in self._params if not ("sparse" in form and param is decoder.word_embedding)]
            self._sgd = torch.optim.SGD(dense, lr=self._rate, fused=True)
        self._graph = None

    def agree(self) -> dict[str, float]:
        """Loss and gradient norms of the first batch with nothing random; nothing is updated."""
        with torch.inference_mode() if self._kind == "eval" else contextlib.nullcontext():
            loss = self._loss(*self._static, self._chance)
        if self._kind == "eval":
            return {"loss": float(loss)}
        grads = self._gradients(loss)
        norms = {id(param): float(norm) for param, norm in zip(self._params, self._norms(grads)[0])}
        parts = {name: sum(norms[id(param)] ** 2 for param in params) ** 0.5 for name, params in self._parts.items()}
        return {"loss": float(loss.detach()), "gradient": sum(norm ** 2 for norm in parts.values()) ** 0.5, **parts}

    @torch.no_grad()
    def lstm_dtype(self) -> str:
        """What the LSTM computes in: cuDNN's in float16 under any autocast."""
        with self._autocast():
            image_BE = self._decoder.linear(torch.zeros_like(self._decoder.image_embedding[:1]), self._decoder.image_embedding, None)
            return str(self._decoder.recur(image_BE[None]).dtype).removeprefix("torch.")

    def start(self) -> None:
        """From here on with chance: dropout and distortions, as in training."""
        if isinstance(self._chance, float):
            self._chance = 1.0
        else:
            self._chance.fill_(1.0)
        if "graph" in self._form:
            self._graph, self._graph_loss = torch_graph.capture(self._whole, *self._static, warm_up=3)

    def __call__(self) -> Tensor:
        """Takes one step and returns the loss, on the device."""
        batch = next(self._batches)
        if self._graph is not None:
            for static, x in zip(self._static, batch):
                static.copy_(x, non_blocking=True)
            self._graph.replay()
            return self._graph_loss
        return self._whole(*(x.to(self._device, non_blocking=True) for x in batch))

    def _whole(self, tokens_BT1: Tensor, index_B: Tensor) -> Tensor:
        if "overhead" in self._form:
            torch.compiler.cudagraph_mark_step_begin()
        if self._kind == "eval":
            with torch.inference_mode():
                return self._loss(tokens_BT1, index_B, self._chance)
        loss = self._loss(tokens_BT1, index_B, self._chance)
        self._update(self._gradients(loss))
        return loss.detach()

    def _eager_loss(self, tokens_BT1: Tensor, index_B: Tensor, chance: Tensor | float) -> Tensor:
        with self._autocast():
            with torch.no_grad() if self._kind != "joint" else contextlib.nullcontext():
                features_BF = self._features(index_B, chance)
            if self._kind == "joint":
                features_BF = dropout(features_BF, self._described["feature_dropout"], chance)
            return self._decoder(features_BF, tokens_BT1, None if self._kind == "eval" else chance)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16)

    def _features(self, index_B: Tensor, chance: Tensor | float) -> Tensor:
        if self._kind == "cached":
            return self._table[index_B]
        size = self._described["size"]
        if self._kind == "eval":
            corner = self._room // 2
            image_BHWC = self._table[:, corner:corner + size, corner:corner + size][index_B]
            image_BCHW = image_BHWC.permute(0, 3, 1, 2).float() / 255
        else:
            draws = torch_distort.draw(len(index_B), self._room, self._neutral_81, chance)
            image_BCHW = torch_distort.distort_colour(torch_distort.crop(self._table, index_B, draws, size), draws)
        layout = torch.channels_last if "channels_last" in self._form else torch.contiguous_format
        return self._encoder(image_BCHW.contiguous(memory_format=layout))

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        grads = list(torch.autograd.grad(loss, self._params))
        if self._filters and self._optim["encoder_l2"]:
            penalized = {id(param) for param in self._filters}
            torch._foreach_add_([grad for param, grad in zip(self._params, grads) if id(param) in penalized],
                                [param.detach() for param in self._filters], alpha=self._optim["encoder_l2"])
        return [grad.coalesce() if grad.is_sparse else grad for grad in grads]

    def _norms(self, grads: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The norm of every gradient, and of all of them."""
        grads = [grad.values() if grad.is_sparse else grad for grad in grads]
        if self._device.type == "cpu":  # row by row: over millions of numbers at once it comes out up to 0.3 % too small there
            grads = [torch.linalg.vector_norm(grad, dim=tuple(range(1, grad.ndim))) if grad.ndim > 1 else grad for grad in grads]
        norms = torch._foreach_norm(grads)
        return norms, torch.linalg.vector_norm(torch.stack(norms))

    @torch.no_grad()
    def _update(self, grads: list[Tensor]) -> None:
        """Clips the global norm and takes a step of plain SGD."""
        _, norm = self._norms(grads)
        rate = self._optim["learning_rate"] * (self._optim["clip_norm"] / norm).clamp(max=1)
        dense = [(param, grad) for param, grad in zip(self._params, grads) if not grad.is_sparse]
        if "fused" in self._form:
            self._rate.copy_(rate)
            for param, grad in dense:
                param.grad = grad
            self._sgd.step()
        elif self._device.type == "cpu":
            torch._foreach_add_([param for param, _ in dense], [grad for _, grad in dense], alpha=-float(rate))
        else:  # the rate stays on the device
            torch._foreach_mul_([grad for _, grad in dense], -rate)
            torch._foreach_add_([param for param, _ in dense], [grad for _, grad in dense])
        for param, grad in zip(self._params, grads):
            if grad.is_sparse:
                param.add_(grad * -rate)
