"""Convolution + batch norm + activation, the brick that every published encoder here is built of, and pooling.

XLA's CPU backend runs 1×1 and depthwise convolutions and pooling far slower than the same arithmetic written as a
matrix product and as arithmetic on shifted slices, 3×3 convolutions of large maps slower than with fewer
multiplications, and strided ones and gradients of kernels slower than as matrix products, so on CPU they are written that
way. Other backends get the ordinary operations, but for max pools on NVIDIA cards.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from jaxcap import platforms
from jaxcap.encoders import dense, shifted
from jaxcap.errors import UserError
from jaxcap.module import Module

BatchNormMode = Literal["inference", "batch", "sync", "folded"]
Padding = str | tuple[tuple[int, int], ...]  # "SAME" and "VALID" as TensorFlow's, "CEIL" (of pools) as PyTorch's, or pixels
EPSILON = 1e-3  # added to the variance, in the Inception networks and in EfficientNet-Lite alike


class _Normalized(Module):
    """Batch norm and activation of subclasses that declare `features`, `activation`, `gamma`, `decay`, `epsilon`, `batch_norm`
    and `dtype`.

    `batch_norm` chooses the statistics: "inference" the running ones; "batch" those of this device's batch; "sync"
    those of the batch over all devices of the named axis "data". The last two update the running statistics when the
    collection "batch_stats" is mutable. "folded" reads parameters that `fold` made and has no statistics.
    """

    def setup(self):
        self.bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if self.batch_norm != "folded":
            self.scale = self.param("scale", nn.initializers.ones, (self.features,)) if self.gamma else 1.0
            self.mean = self.variable("batch_stats", "mean", jnp.zeros, (self.features,))
            self.var = self.variable("batch_stats", "var", jnp.ones, (self.features,))

    def normalize(self, y_BHWC):
        if self.batch_norm == "folded":
            y_BHWC = y_BHWC + self.bias.astype(self.dtype)
        else:
            mean, var = self._statistics(y_BHWC.astype(jnp.float32))
            scale = self.scale * lax.rsqrt(var + self.epsilon)
            # The zeros may differ between devices, as y does and its factors must too for a gradient that is written out.
            zeros = jnp.zeros_like(y_BHWC, shape=mean.shape, dtype=mean.dtype)
            y_BHWC = _affine(y_BHWC, scale + zeros, self.bias - mean * scale + zeros).astype(self.dtype)
        return self.activation(y_BHWC) if self.activation else y_BHWC

    def _statistics(self, y_BHWC):
        """Mean and (biased) variance of each channel that `batch_norm` asks for."""
        if self.batch_norm == "inference" or self.is_initializing():
            return self.mean.value, self.var.value
        mean, mean_of_squares = _moments(y_BHWC)
        if self.batch_norm == "sync":
            mean, mean_of_squares = lax.pmean((mean, mean_of_squares), "data")
        var = jnp.maximum(mean_of_squares - jnp.square(mean), 0.0)
        if self.is_mutable_collection("batch_stats"):
            self.mean.value = self.decay * self.mean.value + (1 - self.decay) * mean
            self.var.value = self.decay * self.var.value + (1 - self.decay) * var
        return mean, var


class ConvBN(_Normalized):
    """Bias-free convolution, batch norm, activation: x_BHWC → y_BHWC."""

    channels: int  # of x
    features: int  # channels of y
    kernel_size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: Padding = "SAME"
    depthwise: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = nn.relu
    gamma: bool = True  # learn a scale per channel
    decay: float = 0.99  # of the running statistics
    epsilon: float = EPSILON
    batch_norm: BatchNormMode = "inference"
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        shape = (*self.kernel_size, 1 if self.depthwise else self.channels, self.features)
        self.kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        super().setup()

    def __call__(self, x_BHWC):
        kernel = _factor(self.kernel, self.dtype)
        return self.normalize(convolve(x_BHWC.astype(self.dtype), kernel, self.stride, self.padding))


class BatchNorm(_Normalized):
    """Batch norm and activation where no convolution of its own comes before: x_BHWC → y_BHWC."""

    features: int  # channels of x and y
    activation: Callable[[jax.Array], jax.Array] | None = nn.relu
    gamma: bool = True
    decay: float = 0.99
    epsilon: float = EPSILON
    batch_norm: BatchNormMode = "inference"
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        super().setup()
        if self.batch_norm == "folded":
            self.scale = self.param("scale", nn.initializers.ones, (self.features,))

    def __call__(self, x_BHWC):
        x_BHWC = x_BHWC.astype(self.dtype)
        return self.normalize(x_BHWC * self.scale.astype(self.dtype) if self.batch_norm == "folded" else x_BHWC)


class Biased(Module):
    """Convolution and bias, without batch norm and activation, padded to the same size: x_BHWC → y_BHWC."""

    channels: int  # of x
    features: int  # channels of y
    kernel_size: tuple[int, int] = (1, 1)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC):
        kernel = self.param("kernel", nn.initializers.he_normal(), (*self.kernel_size, self.channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return convolve(x_BHWC.astype(self.dtype), _factor(kernel, self.dtype)) + bias.astype(self.dtype)


def fold(variables: dict, epsilon: float = EPSILON) -> dict:
    """The parameters of a network for `batch_norm="folded"`: kernel · γ/√(σ²+ε) and β − μ · γ/√(σ²+ε).

    A `BatchNorm` keeps γ/√(σ²+ε) as its scale; what has no statistics stays as it is.
    """

    def walk(params, stats):
        if "mean" not in stats:
            return {name: walk(child, stats[name]) if name in stats else child for name, child in params.items()}
        scale = params.get("scale", 1.0) * lax.rsqrt(stats["var"] + epsilon)
        folded = {"kernel": params["kernel"] * scale} if "kernel" in params else {"scale": scale}
        return {**folded, "bias": params["bias"] - stats["mean"] * scale}

    return walk(variables["params"], variables["batch_stats"])


def siblings(x_BHWC, layers: Sequence[ConvBN], block: nn.Module) -> list[jax.Array]:
    """The 1×1 convolutions of several layers on the same input, computed as one and not yet normalized.

    block: the module that they are in. Where its collection "joined" has their kernels side by side, they are read there (`joined`).
    """
    kernel = block.get_variable("joined", "kernel")
    if kernel is None:
        kernel = jnp.concatenate([layer.kernel for layer in layers], axis=-1)
    ends = np.cumsum([layer.features for layer in layers])[:-1]
    return jnp.split(convolve(x_BHWC.astype(layers[0].dtype), _factor(kernel, layers[0].dtype)), ends, axis=-1)


def joined(params: dict, siblings: dict[tuple[str, ...], Sequence[str]]) -> dict:
    """The collection "joined" of a network, by the path of a block those of its layers that are computed as one."""
    known = flatten_dict(params)
    return unflatten_dict({(*block, "kernel"): jnp.concatenate([known[*block, name, "kernel"] for name in names], axis=-1)
                           for block, names in siblings.items()})


def rounded(params: dict, dtype: jnp.dtype | None) -> dict:
    """The parameters with the kernels that are factors of matrix products in `dtype` (`jaxcap.products`, `dense.is_factor`)."""

    def of(path, leaf):
        return leaf.astype(dtype) if path[-1].key == "kernel" and dense.is_factor(leaf.shape) else leaf

    return jax.tree_util.tree_map_with_path(of, params) if dtype else params


def _factor(kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The kernel in the type of the arithmetic, unless it comes `rounded`."""
    return kernel if kernel.dtype == jnp.bfloat16 else kernel.astype(dtype)


@jax.custom_vjp
def _moments(y_BHWC):
    """The mean and the mean of the squares of each channel."""
    pixels = y_BHWC.size // y_BHWC.shape[-1]
    return tuple(total / pixels for total in _sums(y_BHWC, jnp.square(y_BHWC)))


def _moments_backward(y_BHWC, gradients):
    d_mean, d_squares = (gradient / (y_BHWC.size // y_BHWC.shape[-1]) for gradient in gradients)
    return (d_mean + 2 * d_squares * y_BHWC,)


_moments.defvjp(lambda y_BHWC: (_moments(y_BHWC), y_BHWC), _moments_backward)


@jax.custom_vjp
def _affine(y_BHWC, scale, offset):
    return y_BHWC * scale + offset


def _affine_backward(saved, dz_BHWC):
    y_BHWC, scale = saved
    d_scale, d_offset = _sums(dz_BHWC * y_BHWC, dz_BHWC)
    return (dz_BHWC * scale).astype(y_BHWC.dtype), d_scale, d_offset


_affine.defvjp(lambda y_BHWC, scale, offset: (_affine(y_BHWC, scale, offset), (y_BHWC, scale)), _affine_backward)


def _sums(one_BHWC, other_BHWC):
    """Both summed over all pixels. On NVIDIA cards a sum takes two kernels, and two sums at once no more."""
    return platforms.dependent(one_BHWC, other_BHWC, cuda=_at_once, default=lambda *both: tuple(x.sum((0, 1, 2)) for x in both))


def _at_once(*both):
    zeros = tuple(jnp.zeros((), x.dtype) for x in both)
    return tuple(lax.reduce(both, zeros, lambda x, y: tuple(map(jnp.add, x, y)), (0, 1, 2)))


def convolve(x_BHWC, kernel, stride: int = 1, padding: Padding = "SAME"):
    """2-D convolution with a kernel of shape [height, width, in, out]; with in = 1 < C it is depthwise."""
    channels = x_BHWC.shape[-1]
    groups = channels // kernel.shape[2]

    def ordinary(x_BHWC, kernel):
        return dense.ordinary(x_BHWC, kernel, stride, padding, groups)

    def matrix_product(x_BHWC, kernel):
        return dense.pointwise(x_BHWC, kernel[0, 0])

    def ungrouped(x_BHWC, kernel):
        return dense.convolve(x_BHWC, kernel, stride, padding)

    def depthwise(x_BHWC, kernel):
        return shifted.depthwise(x_BHWC, kernel[:, :, 0], stride, padding)

    if kernel.shape[:2] == (1, 1) and stride == groups == 1:
        on_cpu = matrix_product
    elif groups == channels > 1:
        on_cpu = depthwise
    elif groups == 1:
        on_cpu = ungrouped
    else:
        return ordinary(x_BHWC, kernel)
    return platforms.dependent(x_BHWC, kernel, cpu=on_cpu, default=ordinary)


def max_pool(x_BHWC, size: int = 3, stride: int = 2, padding: Padding = "VALID"):
    """Maximum over windows; `x_BHWC` must not be negative, as after a ReLU: what lies beyond the edge counts as 0."""
    if padding == "CEIL":
        padding = tuple((0, _reach(length, size, stride)) for length in x_BHWC.shape[1:3])

    def written_out(x_BHWC):
        return shifted.max_pool(x_BHWC, size, stride, padding)

    # XLA's gradient on NVIDIA cards writes five numbers for every window and then scatters, which is a tenth of a joint step's bytes.
    return platforms.dependent(x_BHWC, cpu=written_out, cuda=written_out,
                               default=lambda x_BHWC: nn.max_pool(x_BHWC, (size, size), (stride, stride), padding))


def _reach(length: int, size: int, stride: int) -> int:
    """Pixels beyond the far edge that PyTorch's ceil_mode adds: every window that begins inside counts."""
    windows = -(-(length - size) // stride) + 1
    windows -= (windows - 1) * stride >= length
    return max((windows - 1) * stride + size - length, 0)


def average_pool(x_BHWC, whole_windows: bool = False):
    """Mean over 3×3 windows, stride 1, of the same size; pixels beyond the edge count as 0 in `whole_windows`, else not."""
    ones_1HW1 = np.ones((1, *x_BHWC.shape[1:3], 1), np.float32)
    count_1HW1 = np.float32(9) if whole_windows else sum(shifted.windows(ones_1HW1, (3, 3), 1, "SAME"))
    return shifted.sums(x_BHWC) * (1 / count_1HW1).astype(x_BHWC.dtype)


def require(image_BHWC, smallest: int) -> None:
    """Raises `UserError` on photos of which a network's strides would leave nothing."""
    height, width = image_BHWC.shape[1:3]
    if min(height, width) < smallest:
        raise UserError(f"this encoder needs photos of at least {smallest} × {smallest} pixels; these are {height} × {width}")
