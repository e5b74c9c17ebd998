"""Matrix products of activations and a kernel, whose factors a CPU may round to bfloat16.

Processors with bfloat16 instructions (AVX512-BF16, AMX) multiply such numbers, and add in float32, at twice the speed of float32
and more. For sums, exponentials and the like they have none: with activations in bfloat16 a CPU is slower than with float32.
So on CPUs `dtype="bfloat16"` rounds what is multiplied, and nothing else: activations stay in float32, the kernels
alone come as bfloat16, and a product of these two is one with rounded factors. Where both are of one type it is the plain product.
Other CPUs have no use for bfloat16, and XLA no routine for every such product there: they stay with float32.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array, lax

LARGE, THIN = 1 << 22, 96  # numbers, and channels, of the maps that a product with the identity transposes faster


def instructions() -> bool:
    """Whether this machine's processor multiplies bfloat16 numbers, as far as is known (Linux on x86 tells)."""
    return bool(_features() & {"avx512_bf16", "amx_bf16"})


def tiles() -> bool:
    """Whether it multiplies tiles of them (AMX), as far as is known: three to eight times as fast as AVX512-BF16."""
    return "amx_bf16" in _features()


@functools.cache
def _features() -> frozenset[str]:
    try:
        return frozenset(Path("/proc/cpuinfo").read_text("utf-8").split())
    except OSError:
        return frozenset()


def dtypes(asked: str, platform: str) -> tuple[jnp.dtype, jnp.dtype | None]:
    """The types of activations and, if another, of kernels for an arithmetic of that name on a platform."""
    if asked == "bfloat16" and platform == "cpu":
        return jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16) if instructions() else None
    return jnp.dtype(asked), None


def matmul(x: Array, kernel_IJ: Array) -> Array:
    """x [..., I] @ kernel, of the type of x."""
    return _matmul(x, kernel_IJ) if rounds(x, kernel_IJ) else x @ kernel_IJ


def summed(x: Array, kernel_IJ: Array) -> Array:
    """As `matmul`, of float32 where x is bfloat16: logits rounded to bfloat16 tie for the likeliest word in 3 rows of 100."""
    return _summed(x, kernel_IJ) if x.dtype == jnp.bfloat16 else matmul(x, kernel_IJ)


def back(d_y: Array, kernel_IJ: Array) -> Array:
    """The gradient [..., I] of x in `matmul`, for gradients that are written out."""
    if not rounds(d_y, kernel_IJ):
        return d_y @ kernel_IJ.T
    return jnp.einsum("...j,ij->...i", d_y.astype(kernel_IJ.dtype), kernel_IJ, preferred_element_type=d_y.dtype)


def into_kernel(x: Array, d_y: Array, kernel_IJ: Array) -> Array:
    """The gradient of the kernel in `matmul`, summed over all leading axes, in float32."""
    return into_kernels(x, [d_y], kernel_IJ)[0]


def into_kernels(x: Array, d_ys: Sequence[Array], kernel_IJ: Array) -> list[Array]:
    """`into_kernel` for several kernels by which the same x was multiplied. Of x and d_ys either may be rounded already."""
    if not any(rounds(factor, kernel_IJ) for factor in (x, *d_ys)):
        leading = "bhw"[:x.ndim - 1]
        return [jnp.einsum(f"{leading}i,{leading}j->ij", x, d_y, preferred_element_type=sums(x.dtype)) for d_y in d_ys]
    # XLA makes a transposed factor part of the product, and its bfloat16 routine takes none. Where x has several leading axes they are
    # made one in between, which keeps transposition and product apart; where it has one, a row of zeros does.
    extra, rounded = int(x.ndim == 2), x.astype(kernel_IJ.dtype)
    if extra:
        x_IN = jnp.pad(rounded.T, ((0, 0), (0, 1)))
    elif x.shape[-1] <= THIN and x.size >= LARGE:
        x_IN = transposed(rounded)
    else:
        x_IN = lax.optimization_barrier(jnp.moveaxis(rounded, -1, 0)).reshape(x.shape[-1], -1)
    d_ys_NJ = [jnp.pad(d_y.astype(kernel_IJ.dtype).reshape(-1, d_y.shape[-1]), ((0, extra), (0, 0))) for d_y in d_ys]
    return [jnp.matmul(x_IN, d_y_NJ, preferred_element_type=jnp.float32) for d_y_NJ in d_ys_NJ]


def transposed(x: Array) -> Array:
    """x [..., I] → [I, N] as a product with the identity, which is exact. XLA makes what x comes from part of a transposition, which
    then reads all of it once a channel: where caches do not hold it, the product takes a third of that time."""
    x_NI = x.reshape(-1, x.shape[-1])
    return jnp.einsum("ki,ni->kn", jnp.eye(x.shape[-1], dtype=x.dtype), x_NI, preferred_element_type=sums(x.dtype)).astype(x.dtype)


def sums(dtype: jnp.dtype) -> jnp.dtype:
    """The type in which products of numbers of that type are added up."""
    return jnp.promote_types(dtype, jnp.float32)


def words(x: Array) -> Array:
    """bfloat16 numbers as integers of 16 bits, others as they are: XLA moves bfloat16 by way of float32 on CPUs, integers at once."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def numbers(x: Array) -> Array:
    """What `words` were."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def rounds(x: Array, kernel: Array) -> bool:
    """Whether the product of these rounds x."""
    return x.dtype == jnp.float32 and kernel.dtype == jnp.bfloat16


@jax.custom_vjp
def _matmul(x, kernel_IJ):
    return jnp.matmul(x.astype(kernel_IJ.dtype), kernel_IJ, preferred_element_type=x.dtype)


def _forward(x, kernel_IJ):
    return _matmul(x, kernel_IJ), (x, kernel_IJ)


def _backward(saved, d_y):
    x, kernel_IJ = saved
    return back(d_y, kernel_IJ), into_kernel(x, d_y, kernel_IJ).astype(kernel_IJ.dtype)


_matmul.defvjp(_forward, _backward)


@jax.custom_vjp
def _summed(x, kernel_IJ):
    return jnp.matmul(x, kernel_IJ, preferred_element_type=jnp.float32)


def _summed_backward(saved, d_y):  # else the products of the gradient would be float32's
    return _backward(saved, d_y.astype(saved[0].dtype))


_summed.defvjp(lambda x, kernel_IJ: (_summed(x, kernel_IJ), (x, kernel_IJ)), _summed_backward)
