"""DenseNet-121 (Huang et al. 2016, arXiv 1608.06993) as Keras and torchvision publish it: every layer sees the outputs of all
layers before it in its block. At 224 × 224 it gives 7 × 7 × 1024 features.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn

from jaxcap.encoders import EncoderSpec
from jaxcap.encoders.layers import BatchNorm, BatchNormMode, ConvBN, convolve, max_pool, require
from jaxcap.module import Module
from jaxcap.weights import DROPPED, TORCH_KERNEL, Entry

_LAYERS = (6, 12, 24, 16)  # of each block; table 1 of the paper
_GROWTH = 32  # channels that each layer adds
_SMALLEST = 29  # pixels
_EPSILON = 1.001e-5  # Keras's; PyTorch has 1e-5
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DenseLayer(nn.Module):
    """x_BHWC → the channels that it adds: 1×1 to four times as many, then 3×3."""

    batch_norm: BatchNormMode
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BHWC):
        options = {"epsilon": _EPSILON, "batch_norm": self.batch_norm, "dtype": self.dtype}
        x_BHWC = BatchNorm(x_BHWC.shape[-1], name="norm", **options)(x_BHWC)
        x_BHWC = ConvBN(x_BHWC.shape[-1], 4 * _GROWTH, name="bottleneck", **options)(x_BHWC)
        return _Convolution(4 * _GROWTH, _GROWTH, (3, 3), self.dtype, name="grow")(x_BHWC)


class DenseNet(nn.Module):
    """image_BHWC, preprocessed → features_BHWF, F = 1024. Raises `UserError` on an image of less than 29 pixels."""

    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, image_BHWC, batch_norm: BatchNormMode = "inference"):
        require(image_BHWC, _SMALLEST)
        options = {"epsilon": _EPSILON, "batch_norm": batch_norm, "dtype": self.dtype}
        layer = nn.remat(DenseLayer) if self.remat else DenseLayer
        around = ((3, 3), (3, 3))
        x_BHWC = ConvBN(3, 64, (7, 7), 2, around, name="stem", **options)(image_BHWC)
        x_BHWC = max_pool(x_BHWC, padding=((1, 1), (1, 1)))
        for i, layers in enumerate(_LAYERS):
            for j in range(layers):
                added_BHWC = layer(batch_norm, self.dtype, name=f"block{i}_{j}")(x_BHWC)
                x_BHWC = jnp.concatenate([x_BHWC, added_BHWC], axis=-1)
            x_BHWC = BatchNorm(x_BHWC.shape[-1], name=f"norm{i}", **options)(x_BHWC)
            if i + 1 < len(_LAYERS):
                channels = x_BHWC.shape[-1]
                # Averaging before the 1×1 convolution is the same function as after it, on a quarter of the pixels.
                x_BHWC = _Convolution(channels, channels // 2, (1, 1), self.dtype, name=f"transition{i}")(_halved(x_BHWC))
        return x_BHWC


class _Convolution(Module):
    """Convolution alone."""

    channels: int
    features: int
    kernel_size: tuple[int, int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BHWC):
        shape = (*self.kernel_size, self.channels, self.features)
        return convolve(x_BHWC, self.param("kernel", nn.initializers.he_normal(), shape).astype(self.dtype))


def _halved(x_BHWC):
    """Mean over 2×2 pixels; an odd last row or column is left out."""
    batch, height, width, channels = x_BHWC.shape
    x_BHWC = x_BHWC[:, :height // 2 * 2, :width // 2 * 2]
    return x_BHWC.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def preprocess(image_BHWC):
    """[0, 1] → zero mean and unit deviation over ImageNet, by color."""
    return (image_BHWC - jnp.array(_MEAN)) / jnp.array(_STD)


def _names(stem, block, transition, last):
    """(our layer, (its convolution, its norm)) in one naming; either may be missing."""
    yield "stem", stem
    for i, layers in enumerate(_LAYERS):
        for j in range(layers):
            norm, bottleneck, bottleneck_norm, grow = block(i, j)
            yield f"block{i}_{j}/norm", ("", norm)
            yield f"block{i}_{j}/bottleneck", (bottleneck, bottleneck_norm)
            yield f"block{i}_{j}/grow", (grow, "")
        norm, convolution = transition(i) if i + 1 < len(_LAYERS) else (last, "")
        yield f"norm{i}", ("", norm)
        if convolution:
            yield f"transition{i}", (convolution, "")


def keras_table() -> dict[str, Entry]:
    """Where every weight of a Keras file goes."""
    def block(i, j):
        layer = f"conv{i + 2}_block{j + 1}"
        return f"{layer}_0_bn", f"{layer}_1_conv", f"{layer}_1_bn", f"{layer}_2_conv"

    table = {"fc1000/kernel": Entry("classifier/kernel"), "fc1000/bias": Entry("classifier/bias"),
             "predictions/kernel": Entry("classifier/kernel"), "predictions/bias": Entry("classifier/bias")}
    for ours, (convolution, norm) in _names(("conv1_conv", "conv1_bn"), block,
                                            lambda i: (f"pool{i + 2}_bn", f"pool{i + 2}_conv"), "bn"):
        if convolution:
            table[f"{convolution}/kernel"] = Entry(f"params/{ours}/kernel")
        if norm:
            table[f"{norm}/gamma"] = Entry(f"params/{ours}/scale")
            table[f"{norm}/beta"] = Entry(f"params/{ours}/bias")
            table[f"{norm}/moving_mean"] = Entry(f"batch_stats/{ours}/mean")
            table[f"{norm}/moving_variance"] = Entry(f"batch_stats/{ours}/var")
    return table


def torchvision_table(dot: str = "") -> dict[str, Entry]:
    """Where every tensor of a torchvision file goes; published ones have a `dot` in names such as norm.1."""
    def block(i, j):
        layer = f"features.denseblock{i + 1}.denselayer{j + 1}"
        return f"{layer}.norm{dot}1", f"{layer}.conv{dot}1", f"{layer}.norm{dot}2", f"{layer}.conv{dot}2"

    def transition(i):
        return f"features.transition{i + 1}.norm", f"features.transition{i + 1}.conv"

    table = {"classifier.weight": Entry("classifier/kernel", (1, 0)), "classifier.bias": Entry("classifier/bias"),
             "*.num_batches_tracked": DROPPED}
    for ours, (convolution, norm) in _names(("features.conv0", "features.norm0"), block, transition, "features.norm5"):
        if convolution:
            table[f"{convolution}.weight"] = Entry(f"params/{ours}/kernel", TORCH_KERNEL)
        if norm:
            table[f"{norm}.weight"] = Entry(f"params/{ours}/scale")
            table[f"{norm}.bias"] = Entry(f"params/{ours}/bias")
            table[f"{norm}.running_mean"] = Entry(f"batch_stats/{ours}/mean")
            table[f"{norm}.running_var"] = Entry(f"batch_stats/{ours}/var", add=1e-5 - _EPSILON)  # so that σ² + ε is theirs
    return table


SPEC = EncoderSpec(
    name="densenet121",
    module=DenseNet,
    image_size=224,
    features=1024,
    preprocess=preprocess,
    tables={"keras": keras_table, "torchvision": torchvision_table,
            "torchvision 2017": functools.partial(torchvision_table, ".")},
    epsilon=_EPSILON,
    source="arXiv 1608.06993",
    parameters=7_037_504,
    gmacs=2.602,  # a quarter of torchvision's at its transitions, which average before they convolve
    top1=75.0,
    top5=92.3,
)
