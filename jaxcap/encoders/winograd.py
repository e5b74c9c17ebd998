"""3×3 convolutions with fewer multiplications: F(2×2, 3×3) of Lavin & Gray 2015 (arXiv 1509.09308, section 4.1).

A tile of 2×2 outputs sees 4×4 inputs. Inputs, kernel and outputs are transformed by additions, rows first or columns first, and
what is multiplied between are 16 matrix products over the channels: 16 multiplications for 4 outputs, where the convolution itself
takes 36. In float32 the two differ by about as much as sums in another order do; with a kernel in bfloat16 these products' factors
are rounded (`jaxcap.products`), which costs 1.4 times the error of rounding the convolution's own.
"""

import jax.numpy as jnp
from jax import lax

from jaxcap import products
from jaxcap.encoders import shifted

LARGE, CHANNELS = 56, 16  # pixels a side, and channels from which on it pays there: fewer make products too thin to gain by
PIXELS, THICK = 1024, 64  # of all photos, and channels, from which on it pays on smaller maps


def pays(x_BHWC, kernel_hwIO) -> bool:
    """Whether a CPU is faster so with an ungrouped convolution of stride 1."""
    *size, into, out = kernel_hwIO.shape
    large = min(x_BHWC.shape[1:3]) >= LARGE and min(into, out) >= CHANNELS
    thick = x_BHWC.size >= PIXELS * into and min(into, out) >= THICK
    return size == [3, 3] and x_BHWC.dtype == jnp.float32 and (large or thick)


def convolve(x_BHWC, kernel_hwIO, padding):
    """3×3 convolution of stride 1: x_BHWC → y_BHWO. `padding` is "SAME", "VALID" or ((above, below), (left, right))."""
    pads = shifted.pads(x_BHWC, (3, 3), 1, padding)
    height, width = (length + sum(pad) - 2 for length, pad in zip(x_BHWC.shape[1:3], pads))
    down, across = -(-height // 2), -(-width // 2)  # tiles
    x_BHWC = jnp.pad(x_BHWC, ((0, 0), *((low, high + length % 2) for (low, high), length in zip(pads, (height, width))), (0, 0)))
    x_BHWC = lax.optimization_barrier(x_BHWC)  # or what it comes from would be computed for each of the 16 products
    rows = _of_inputs([x_BHWC[:, i:i + 2 * down - 1:2] for i in range(4)])
    tiles = [_of_inputs([row_BhWI[:, :, j:j + 2 * across - 1:2] for j in range(4)]) for row_BhWI in rows]
    kernels = [_of_kernel(list(row_wIO)) for row_wIO in _of_kernel(list(kernel_hwIO.astype(x_BHWC.dtype)))]
    multiplied = [[products.matmul(tile_BhwI, kernel_IO.astype(kernel_hwIO.dtype)) for tile_BhwI, kernel_IO in zip(*pair)]
                  for pair in zip(tiles, kernels)]
    rows = [jnp.stack(_of_products(row), axis=3) for row in multiplied]  # [B, down, across, 2, O], one each of a tile's 4 rows
    y_Bh2w2O = jnp.stack(_of_products(rows), axis=2)
    return y_Bh2w2O.reshape(len(x_BHWC), 2 * down, 2 * across, -1)[:, :height, :width]


# One axis of each transform: Bᵀ, G and Aᵀ of the paper.


def _of_inputs(x):
    return [x[0] - x[2], x[1] + x[2], x[2] - x[1], x[1] - x[3]]


def _of_kernel(taps):
    outer = taps[0] + taps[2]
    return [taps[0], (outer + taps[1]) / 2, (outer - taps[1]) / 2, taps[2]]


def _of_products(m):
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
