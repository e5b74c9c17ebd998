"""Convolution + batch norm + activation, the one brick that every published encoder here is built of.

XLA's CPU backend runs 1×1 and depthwise convolutions one to two orders of magnitude slower than the same arithmetic
written as a matrix product and as shifted multiply-adds, so on CPU they are written that way. Other backends get the
ordinary convolution.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

BatchNormMode = Literal["inference", "batch", "sync", "folded"]
EPSILON = 1e-3  # added to the variance, in Inception V3 and in EfficientNet-Lite alike


class ConvBN(nn.Module):
    """Bias-free convolution, batch norm, activation: x_BHWC → y_BHWC.

    `batch_norm` chooses the statistics: "inference" the running ones; "batch" those of this device's batch; "sync"
    those of the batch over all devices of the named axis "data". The last two update the running statistics when the
    collection "batch_stats" is mutable. "folded" reads parameters that `fold` made and has no statistics.
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"
    depthwise: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None
    gamma: bool = True  # learn a scale per channel
    decay: float = 0.99  # of the running statistics
    batch_norm: BatchNormMode = "inference"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC):
        shape = (*self.kernel, 1 if self.depthwise else x_BHWC.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y_BHWC = convolve(x_BHWC.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.padding)
        if self.batch_norm == "folded":
            y_BHWC = y_BHWC + bias.astype(self.dtype)
        else:
            scale = self.param("scale", nn.initializers.ones, (self.features,)) if self.gamma else 1.0
            mean, var = self._statistics(y_BHWC)
            scale = scale * lax.rsqrt(var + EPSILON)
            y_BHWC = (y_BHWC * scale + (bias - mean * scale)).astype(self.dtype)
        return self.activation(y_BHWC) if self.activation else y_BHWC

    def _statistics(self, y_BHWC):
        """Mean and (biased) variance per channel, in float32, that `batch_norm` asks for."""
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (self.features,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (self.features,))
        if self.batch_norm == "inference":
            return running_mean.value, running_var.value
        y_BHWC = y_BHWC.astype(jnp.float32)
        mean, mean_of_squares = y_BHWC.mean((0, 1, 2)), jnp.square(y_BHWC).mean((0, 1, 2))
        if self.batch_norm == "sync" and not self.is_initializing():
            mean, mean_of_squares = lax.pmean((mean, mean_of_squares), "data")
        var = jnp.maximum(mean_of_squares - jnp.square(mean), 0.0)
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            running_mean.value = self.decay * running_mean.value + (1 - self.decay) * mean
            running_var.value = self.decay * running_var.value + (1 - self.decay) * var
        return mean, var


def fold(variables: dict) -> dict:
    """The parameters of a network of `ConvBN`s for `batch_norm="folded"`: kernel · γ/√(σ²+ε) and β − μ · γ/√(σ²+ε)."""

    def walk(params, stats):
        if "mean" not in stats:
            return {name: walk(child, stats[name]) if name in stats else child for name, child in params.items()}
        scale = params.get("scale", 1.0) * lax.rsqrt(stats["var"] + EPSILON)
        return {"kernel": params["kernel"] * scale, "bias": params["bias"] - stats["mean"] * scale}

    return walk(variables["params"], variables["batch_stats"])


def convolve(x_BHWC, kernel, stride: int = 1, padding: str = "SAME"):
    """2-D convolution with a kernel of shape [height, width, in, out]; with in = 1 < C it is depthwise."""
    channels = x_BHWC.shape[-1]
    groups = channels // kernel.shape[2]

    def ordinary(x_BHWC, kernel):
        return lax.conv_general_dilated(x_BHWC, kernel, (stride, stride), padding,
                                        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)

    if kernel.shape[:2] == (1, 1) and stride == 1 and groups == 1:
        on_cpu = lambda x_BHWC, kernel: x_BHWC @ kernel[0, 0]  # noqa: E731
    elif groups == channels > 1:
        on_cpu = lambda x_BHWC, kernel: _shifted(x_BHWC, kernel[:, :, 0], stride, padding)  # noqa: E731
    else:
        return ordinary(x_BHWC, kernel)
    return lax.platform_dependent(x_BHWC, kernel, cpu=on_cpu, default=ordinary)


def _shifted(x_BHWC, kernel_hwC, stride: int, padding: str):
    """Depthwise convolution as a sum over the kernel's positions, which XLA fuses into one vectorised loop."""
    batch, height, width, channels = x_BHWC.shape
    rows, columns = kernel_hwC.shape[:2]
    pads = lax.padtype_to_pads((height, width), (rows, columns), (stride, stride), padding)
    x_BHWC = jnp.pad(x_BHWC, ((0, 0), *pads, (0, 0)))
    bottom, right = x_BHWC.shape[1] - rows, x_BHWC.shape[2] - columns
    return sum(
        lax.slice(x_BHWC, (0, i, j, 0), (batch, i + bottom + 1, j + right + 1, channels), (1, stride, stride, 1))
        * kernel_hwC[i, j]
        for i in range(rows) for j in range(columns))
