"""im2txt's decoder in PyTorch: image embedding, LSTM with the photo as step zero, logits, cross-entropy."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD = 0


class Decoder(nn.Module):
    """features [B, F], tokens [B, T + 1] → mean cross-entropy in nats a token.

    loop: the LSTM step by step with its gradient written out, in place of PyTorch's own. sparse: the gradient of the word
    embedding holds the rows that were read and no others. onednn: matrix products by oneDNN.
    """

    def __init__(self, arrays: dict[str, np.ndarray], *, dropout: float, forget_bias: float, loop: bool, sparse: bool,
                 onednn: bool):
        super().__init__()
        params = {name.removeprefix("params/decoder/"): torch.from_numpy(array) for name, array in arrays.items()
                  if name.startswith("params/decoder/")}
        self.dropout, self.loop, self.sparse = dropout, loop, sparse
        self.linear = OneDNN.apply if onednn else F.linear
        self.image_embedding = nn.Parameter(params["image_embedding"].T.contiguous())
        self.word_embedding = nn.Parameter(params["word_embedding"].clone())
        embedding, hidden = params["word_embedding"].shape[1], len(params["lstm_bias"]) // 4
        # im2txt's gates i, j, f, o in PyTorch's order i, f, j, o. The second bias is a constant, the forget bias.
        self.lstm = nn.LSTM(embedding, hidden)
        with torch.no_grad():
            kernel_GE = _reordered(params["lstm_kernel"].T)
            self.lstm.weight_ih_l0.copy_(kernel_GE[:, :embedding])
            self.lstm.weight_hh_l0.copy_(kernel_GE[:, embedding:])
            self.lstm.bias_ih_l0.copy_(_reordered(params["lstm_bias"]))
            self.lstm.bias_hh_l0.zero_()[hidden:2 * hidden] = forget_bias
        self.lstm.bias_hh_l0.requires_grad = False
        self.logits_kernel = nn.Parameter(params["logits_kernel"].T.contiguous())
        self.logits_bias = nn.Parameter(params["logits_bias"].clone())

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """What trains, by jaxcap's names."""
        lstm = self.lstm
        return {"image_embedding": [self.image_embedding], "word_embedding": [self.word_embedding],
                "lstm_kernel": [lstm.weight_ih_l0, lstm.weight_hh_l0], "lstm_bias": [lstm.bias_ih_l0],
                "logits_kernel": [self.logits_kernel], "logits_bias": [self.logits_bias]}

    def forward(self, features_BF: Tensor, tokens_BT1: Tensor, chance: Tensor | None) -> Tensor:
        tokens_TB = tokens_BT1.T
        image_BE = self.linear(features_BF, self.image_embedding, None)
        words_TBE = F.embedding(tokens_TB[:-1], self.word_embedding, sparse=self.sparse)
        sequence = dropout(torch.cat([image_BE[None], words_TBE.to(image_BE.dtype)]), self.dropout, chance)
        hidden_TBD = dropout(self.recur(sequence)[1:], self.dropout, chance)
        logits = self.linear(hidden_TBD.flatten(0, 1), self.logits_kernel, self.logits_bias)
        return F.cross_entropy(logits.float(), tokens_TB[1:].reshape(-1), ignore_index=PAD)

    def recur(self, sequence_TBE: Tensor) -> Tensor:
        """The LSTM's hidden states [T, B, D]."""
        if not self.loop:
            return self.lstm(sequence_TBE)[0]
        lstm = self.lstm
        x_TBG = self.linear(sequence_TBE, lstm.weight_ih_l0, lstm.bias_ih_l0 + lstm.bias_hh_l0)
        return Loop.apply(x_TBG, lstm.weight_hh_l0.to(x_TBG.dtype))


class OneDNN(torch.autograd.Function):
    """`F.linear` by oneDNN. PyTorch's own float32 products on CPUs are MKL's, which on some processors are half as fast."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, kernel_OI)
        return _product(x, kernel_OI, bias_O)

    @staticmethod
    def backward(ctx, d_y: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, kernel_OI = ctx.saved_tensors
        d_y_NO, x_NI = d_y.flatten(0, -2), x.flatten(0, -2)
        d_x = _product(d_y, kernel_OI.T) if ctx.needs_input_grad[0] else None
        return d_x, _product(d_y_NO.T, x_NI.T), d_y_NO.sum(0) if ctx.needs_input_grad[2] else None


def _product(x: Tensor, kernel_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, kernel_OI, bias_O, "none", [], "")


class Loop(torch.autograd.Function):
    """Hidden states [T, B, D] of an LSTM from the zero state, of the input's part of the gates [T, B, 4 D].

    The gradient of the recurrent kernel is one product after the loop.
    """

    @staticmethod
    def forward(ctx, x_TBG: Tensor, kernel_GD: Tensor) -> Tensor:
        gates, cells, hiddens = [], [], []
        for t, gates_BG in enumerate(x_TBG.unbind()):
            if t:
                gates_BG = torch.addmm(gates_BG, hiddens[-1], kernel_GD.T)
            i, f, j, o = gates_BG.chunk(4, dim=1)
            i, f, j, o = i.sigmoid(), f.sigmoid(), j.tanh(), o.sigmoid()
            cells.append(torch.addcmul(i * j, f, cells[-1]) if t else i * j)
            hiddens.append(o * cells[-1].tanh())
            gates.append((i, f, j, o))
        hidden_TBD = torch.stack(hiddens)
        ctx.save_for_backward(kernel_GD, hidden_TBD, *cells, *(gate for four in gates for gate in four))
        return hidden_TBD

    @staticmethod
    def backward(ctx, d_hidden_TBD: Tensor) -> tuple[Tensor, Tensor]:
        kernel_GD, hidden_TBD, *saved = ctx.saved_tensors
        steps = len(hidden_TBD)
        cells, gates = saved[:steps], saved[steps:]
        d_x, d_cell = [None] * steps, 0.0
        for t in reversed(range(steps)):
            i, f, j, o = gates[4 * t:4 * t + 4]
            d_hidden = d_hidden_TBD[t]
            if t < steps - 1:
                d_hidden = torch.addmm(d_hidden, d_x[t + 1], kernel_GD)
            squashed = cells[t].tanh()
            d_cell = d_cell + d_hidden * o * (1 - squashed * squashed)
            d_forget = d_cell * cells[t - 1] * f * (1 - f) if t else torch.zeros_like(f)
            d_output = d_hidden * squashed * o * (1 - o)
            d_x[t] = torch.cat([d_cell * j * i * (1 - i), d_forget, d_cell * i * (1 - j * j), d_output], dim=1)
            d_cell = d_cell * f
        d_x_TBG = torch.stack(d_x)
        return d_x_TBG, d_x_TBG[1:].flatten(0, 1).T @ hidden_TBD[:-1].flatten(0, 1)


def dropout(x: Tensor, rate: float, chance: Tensor | float | None) -> Tensor:
    """`x` with a share of `rate` set to zero and the rest made larger. chance: 1, or 0 and nothing is dropped (None: never)."""
    if chance is None or not rate:
        return x
    if isinstance(chance, float):
        return F.dropout(x, rate * chance)
    keep = 1 - rate * chance
    return x * ((torch.rand_like(x, dtype=torch.float32) < keep) / keep).to(x.dtype)


def _reordered(gates: Tensor) -> Tensor:
    i, j, f, o = gates.chunk(4)
    return torch.cat([i, f, j, o])
