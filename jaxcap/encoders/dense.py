"""Ungrouped convolutions for CPUs: of large maps by Winograd, and with the gradient of the kernel as one matrix product a tap.

XLA's CPU backend computes that gradient as a convolution by a kernel the size of the map, in batches mostly at a sixth to three quarters of the speed.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxcap.encoders import shifted, winograd


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x_BHWC, kernel_hwIO, stride: int, padding):
    """x_BHWC → y_BHWO. `padding` is "SAME", "VALID" or ((above, below), (left, right))."""
    if winograd.pays(x_BHWC.shape, kernel_hwIO.shape, stride, x_BHWC.dtype):
        return winograd.convolve(x_BHWC, kernel_hwIO, padding)
    return _ordinary(x_BHWC, kernel_hwIO, stride, padding)


def _forward(x_BHWC, kernel_hwIO, stride, padding):
    return convolve(x_BHWC, kernel_hwIO, stride, padding), (x_BHWC, kernel_hwIO)


def _backward(stride, padding, saved, dy_BHWO):
    x_BHWC, kernel_hwIO = saved
    (dx_BHWC,) = jax.vjp(lambda x_BHWC: _ordinary(x_BHWC, kernel_hwIO, stride, padding), x_BHWC)[1](dy_BHWO)
    return dx_BHWC, _dkernel(x_BHWC, kernel_hwIO, stride, padding, dy_BHWO)


convolve.defvjp(_forward, _backward)


def _ordinary(x_BHWC, kernel_hwIO, stride, padding):
    return lax.conv_general_dilated(x_BHWC, kernel_hwIO, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _dkernel(x_BHWC, kernel_hwIO, stride, padding, dy_BHWO):
    """Each tap's gradient is the product of what it saw and dy; without a stride dy is shifted rather than x: that is faster."""
    size = kernel_hwIO.shape[:2]
    if stride == 1:
        lows = [low for low, _ in shifted.pads(x_BHWC, size, stride, padding)]
        around = [(length - 1 - low, low + have - left)
                  for length, low, have, left in zip(size, lows, x_BHWC.shape[1:3], dy_BHWO.shape[1:3])]
        pairs = [(x_BHWC, dy) for dy in reversed(list(shifted.windows(dy_BHWO, size, 1, around)))]
    else:
        pairs = [(x, dy_BHWO) for x in shifted.windows(x_BHWC, size, stride, padding)]
    return jnp.stack([jnp.einsum("bhwi,bhwo->io", x, dy) for x, dy in pairs]).reshape(kernel_hwIO.shape)
