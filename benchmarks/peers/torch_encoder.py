"""Inception V3 in PyTorch, made from jaxcap's description of the network and its parameters; image [B, C, H, W]."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON, DECAY = 1e-3, 0.9997  # of the batch norm: added to the variance, and of the running statistics


class ConvBN(nn.Module):
    """Convolutions of one kernel size on the same input, computed as one, their batch norm and a ReLU.

    names: where their parameters are. `fold` makes the batch norm part of the convolution, for a network that is frozen; with
    `onednn` the ReLU becomes part of it, too, and the filters are laid out once as oneDNN wants them.
    """

    def __init__(self, arrays: dict[str, np.ndarray], names: list[str], stride: int = 1, padding: str = "SAME"):
        super().__init__()

        def join(what: str) -> Tensor:
            return torch.from_numpy(np.concatenate([arrays[what.format(name)] for name in names], axis=-1))

        kernel = join("params/encoder/{}/kernel").permute(3, 2, 0, 1).contiguous()
        if stride > 1 and padding == "SAME":
            raise ValueError("a strided convolution with TensorFlow's padding is not written here")
        self.stride, self.padding = stride, tuple(n // 2 for n in kernel.shape[2:]) if padding == "SAME" else (0, 0)
        self.kernel = nn.Parameter(kernel)
        self.bias = nn.Parameter(join("params/encoder/{}/bias"))
        self.register_buffer("mean", join("batch_stats/{}/mean"))
        self.register_buffer("var", join("batch_stats/{}/var"))
        self.register_buffer("ones", torch.ones_like(self.bias))  # the network has no γ; cuDNN wants one
        self.folded, self.onednn, self.laid_out = False, False, None

    def fold(self, onednn: bool) -> None:
        with torch.no_grad():
            scale = torch.rsqrt(self.var + EPSILON)
            self.bias.copy_(self.bias - self.mean * scale)
            self.kernel.copy_(self.kernel * scale[:, None, None, None])
        self.folded, self.onednn = True, onednn

    def round(self) -> None:
        self.kernel.data = self.kernel.data.bfloat16()
        if self.folded:  # else the batch norm's, which is float32
            self.bias.data = self.bias.data.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        if self.onednn:
            geometry = self.padding, (self.stride, self.stride), (1, 1), 1
            if self.laid_out is None:
                self.laid_out = torch._C._nn.mkldnn_reorder_conv2d_weight(self.kernel.to_mkldnn(), *geometry, list(x.shape))
            return torch.ops.mkldnn._convolution_pointwise(x, self.laid_out, self.bias, *geometry, "relu", [], "")
        y = F.conv2d(x, self.kernel, self.bias if self.folded else None, self.stride, self.padding)
        if not self.folded:
            y = F.batch_norm(y, self.mean, self.var, self.ones, self.bias, self.training, 1 - DECAY, EPSILON)
        return F.relu(y, inplace=True)


class Mixed(nn.Module):
    """A block of branches. merged: the 1×1 convolutions that start them are computed as one."""

    def __init__(self, arrays: dict[str, np.ndarray], name: str, block: dict, merged: bool):
        super().__init__()
        if block["pooling"] != "average" or block["padding"] != ("VALID" if block["stride"] > 1 else "SAME"):
            raise ValueError(f"the pooling of {name} is not written here")
        branches, self.widths = block["branches"], []
        is_start = [branch[0]["type"] == "Conv" and (branch[0]["height"], branch[0]["width"]) == (1, 1) for branch in branches]
        self.merged = merged and sum(is_start) > 1
        if self.merged:
            names = [f"{name}/branch{i}_0" for i, start in enumerate(is_start) if start]
            self.start = ConvBN(arrays, names)
            self.widths = [len(arrays[f"params/encoder/{n}/bias"]) for n in names]
        self.starts_merged = [self.merged and start for start in is_start]
        self.branches = nn.ModuleList()
        for i, branch in enumerate(branches):
            chain = nn.ModuleList()
            for j, conv in enumerate(branch):
                if self.starts_merged[i] and j == 0:
                    continue
                if conv["type"] == "Fork":
                    chain.append(Fork(arrays, [f"{name}/branch{i}_{j}{side}" for side in "ab"]))
                else:
                    stride = (block["stride"], block["padding"]) if j == len(branch) - 1 else (1, "SAME")
                    chain.append(ConvBN(arrays, [f"{name}/branch{i}_{j}"], *stride))
            self.branches.append(chain)
        self.pool = ConvBN(arrays, [f"{name}/pool"]) if block["pool"] else None
        self.strided = block["stride"] > 1

    def forward(self, x: Tensor) -> Tensor:
        starts = iter(self.start(x).split(self.widths, dim=1)) if self.merged else None
        outputs = []
        for chain, merged in zip(self.branches, self.starts_merged):
            y = next(starts) if merged else x
            for layer in chain:
                y = layer(y)
            outputs.append(y)
        if self.pool is not None:
            outputs.append(self.pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        elif self.strided:
            outputs.append(F.max_pool2d(x, 3, 2))
        return torch.cat(outputs, dim=1)


class Fork(nn.Module):
    """Two convolutions of the same input, concatenated."""

    def __init__(self, arrays: dict[str, np.ndarray], names: list[str]):
        super().__init__()
        self.sides = nn.ModuleList(ConvBN(arrays, [name]) for name in names)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([side(x) for side in self.sides], dim=1)


class MaxPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2)


class Encoder(nn.Module):
    """image [B, C, H, W] with values in [0, 1] → features [B, F], the mean over the last map in float32."""

    def __init__(self, network: list[dict], arrays: dict[str, np.ndarray], *, merged: bool):
        super().__init__()
        self.steps, stems, blocks = nn.ModuleList(), 0, 0
        for step in network:
            if step["type"] == "MaxPool" and (step["size"], step["padding"]) == (3, "VALID"):
                self.steps.append(MaxPool())
            elif step["type"] == "Conv":
                self.steps.append(ConvBN(arrays, [f"stem{stems}"], step["stride"], step["padding"]))
                stems += 1
            elif step["type"] == "Mixed":
                self.steps.append(Mixed(arrays, f"mixed{blocks}", step, merged))
                blocks += 1
            else:
                raise ValueError(f"a step {step} is not written here")

    def fold(self, onednn: bool) -> None:
        for module in self.modules():
            if isinstance(module, ConvBN):
                module.fold(onednn)

    def round(self) -> None:
        """Keeps a frozen network's convolutions in bfloat16, after `fold`: autocast would round them anew in every step."""
        for module in self.modules():
            if isinstance(module, ConvBN):
                module.round()

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x = (image_BCHW - 0.5) * 2
        for step in self.steps:
            x = step(x)
        return x.float().mean((2, 3))
