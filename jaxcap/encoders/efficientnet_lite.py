"""EfficientNet-Lite 0 to 4: EfficientNet (Tan & Le 2019, arXiv 1905.11946) without squeeze-excitation, with ReLU6.

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
    def __call__(self, x_BHWC, batch_norm: BatchNormMode = "inference", run: slice = slice(None)):
        """`run`: of stem, blocks and head these alone, from what comes before them."""
        layer = functools.partial(ConvBN, activation=relu6, batch_norm=batch_norm, dtype=self.dtype)
        block = nn.remat(Block) if self.remat else Block
        stages = blocks(self.width, self.depth)
        layers = [layer(3, _STEM, (3, 3), 2, name="stem"),
                  *(block(*stage[1:], batch_norm, self.dtype, name=f"block{i}") for i, stage in enumerate(stages)),
                  layer(stages[-1].features, _HEAD, name="head")]
        for one in layers[run]:
            x_BHWC = one(x_BHWC)
        return x_BHWC

    def widths(self, height: int, width: int) -> list[int]:
        """Numbers in the widest map within stem, blocks and head, of a photo of so many pixels."""
        height, width, channels, found = -(-height // 2), -(-width // 2), _STEM, []
        for stage in blocks(self.width, self.depth):
            found.append(height * width * channels * stage.expansion)
            height, width, channels = -(-height // stage.stride), -(-width // stage.stride), stage.features
        return [found[0], *found, height * width * _HEAD]


def blocks(width: float, depth: float) -> list[Stage]:
    """One `Stage` of a single block for every block of the network of this width and depth."""
    result = []
    for stage, count in zip(_STAGES, _counts(depth)):
        for j in range(count):
            result.append(stage._replace(blocks=1, stride=stage.stride if j == 0 else 1,
                                         features=_rounded(stage.features * width)))
    return result


def _counts(depth: float) -> list[int]:
    """Blocks in each stage; Lite scales the width of the first and the last one, but not their depth."""
    return [stage.blocks if stage in (_STAGES[0], _STAGES[-1]) else math.ceil(stage.blocks * depth) for stage in _STAGES]


def _rounded(features: float) -> int:
    """The nearest multiple of 8 that is not more than 10 % below."""
    nearest = max(8, int(features + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * features else nearest + 8


def preprocess(image_BHWC):
    """[0, 1] → the (x − 127) / 128 of 8-bit values that the published weights were trained on."""
    return (image_BHWC * 255 - 127) / 128


def pytorch_table(width: float, depth: float) -> dict[str, Entry]:
    """Where every tensor of efficientnet-lite-pytorch's files goes."""
    table = {"_fc.weight": Entry("classifier/kernel", (1, 0)), "_fc.bias": Entry("classifier/bias")}
    _add(table, "stem", "_conv_stem", "_bn0")
    for i, stage in enumerate(blocks(width, depth)):
        if stage.expansion > 1:
            _add(table, f"block{i}/expand", f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0")
        _add(table, f"block{i}/depthwise", f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1")
        _add(table, f"block{i}/project", f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2")
    _add(table, "head", "_conv_head", "_bn1")
    return table


def timm_table(width: float, depth: float) -> dict[str, Entry]:
    """Where every tensor of timm's tf_efficientnet_lite files goes; a block's layers are numbered as they follow."""
    table = {"classifier.weight": Entry("classifier/kernel", (1, 0)), "classifier.bias": Entry("classifier/bias")}
    _add(table, "stem", "conv_stem", "bn1")
    places = [f"blocks.{stage}.{j}" for stage, count in enumerate(_counts(depth)) for j in range(count)]
    for i, (block, place) in enumerate(zip(blocks(width, depth), places, strict=True)):
        layers = ("expand", "depthwise", "project") if block.expansion > 1 else ("depthwise", "project")
        names = ("conv_pw", "conv_dw", "conv_pwl") if block.expansion > 1 else ("conv_dw", "conv_pw")
        for k, (layer, name) in enumerate(zip(layers, names), start=1):
            _add(table, f"block{i}/{layer}", f"{place}.{name}", f"{place}.bn{k}")
    _add(table, "head", "conv_head", "bn2")
    return table


def _add(table: dict[str, Entry], ours: str, convolution: str, norm: str) -> None:
    table[f"{convolution}.weight"] = Entry(f"params/{ours}/kernel", TORCH_KERNEL)
    table[f"{norm}.weight"] = Entry(f"params/{ours}/scale")
    table[f"{norm}.bias"] = Entry(f"params/{ours}/bias")
    table[f"{norm}.running_mean"] = Entry(f"batch_stats/{ours}/mean")
    table[f"{norm}.running_var"] = Entry(f"batch_stats/{ours}/var")
    table[f"{norm}.num_batches_tracked"] = DROPPED


def _spec(number: int, width: float, depth: float, image_size: int, **figures) -> EncoderSpec:
    return EncoderSpec(
        name=f"efficientnet_lite{number}",
        module=functools.partial(EfficientNetLite, width, depth),
        image_size=image_size,
        features=_HEAD,
        preprocess=preprocess,
        tables={"efficientnet-lite-pytorch": functools.partial(pytorch_table, width, depth),
                "timm": functools.partial(timm_table, width, depth)},
        source="arXiv 1905.11946",
        **figures)


SPECS = {spec.name: spec for spec in (
    _spec(0, 1.0, 1.0, 224, parameters=3_413_024, gmacs=0.384, top1=75.1),
    _spec(1, 1.0, 1.1, 240, parameters=4_189_344, gmacs=0.599, top1=76.7),
    _spec(2, 1.1, 1.2, 260, parameters=4_869_168, gmacs=0.858, top1=77.6),
    _spec(3, 1.2, 1.4, 280, parameters=6_992_768, gmacs=1.382, top1=79.8),
    _spec(4, 1.4, 1.8, 300, parameters=11_837_936, gmacs=2.552, top1=81.5),
)}
