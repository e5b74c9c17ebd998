"""3×3 convolutions with fewer multiplications: F(2×2, 3×3) of Lavin & Gray 2015 (arXiv 1509.09308, section 4.1).

A tile of 2×2 outputs sees 4×4 inputs. Inputs, kernel and outputs are transformed by additions, rows first or columns first, and
what is multiplied between are 16 matrix products over the channels: 16 multiplications for 4 outputs, where the convolution itself
takes 36. In float32 the two differ by about as much as sums in another order do; with a kernel in bfloat16 these products' factors
are rounded (`jaxcap.products`), which costs 1.4 times the error of rounding the convolution's own. Products are four times as many
numbers as outputs: then it goes piece by piece, some photos or some rows of one, through the caches.
"""

import jax.numpy as jnp
from jax import lax

from jaxcap import products
from jaxcap.encoders import few, shifted

LARGE, CHANNELS = 56, 16  # pixels a side, and channels from which on it pays there: fewer make products too thin to gain by
PIXELS, THICK = 1024, 64  # of all photos, and channels, from which on it pays on smaller maps
PIECE = 4 << 20  # bytes a core that the products of a piece may take


def pays(x_BHWC, kernel_hwIO) -> bool:
    """Whether a CPU is faster so with an ungrouped convolution of stride 1."""
    *size, into, out = kernel_hwIO.shape
    large = min(x_BHWC.shape[1:3]) >= LARGE and min(into, out) >= CHANNELS
    thick = x_BHWC.size >= PIXELS * into and min(into, out) >= THICK
    return size == [3, 3] and x_BHWC.dtype == jnp.float32 and (large or thick)


def convolve(x_BHWC, kernel_hwIO, padding):
    """3×3 convolution of stride 1: x_BHWC → y_BHWO. `padding` is "SAME", "VALID" or ((above, below), (left, right))."""
    batch, out = len(x_BHWC), kernel_hwIO.shape[-1]
    (above, below), (left, right) = pads = shifted.pads(x_BHWC, (3, 3), 1, padding)
    height, width = (length + sum(pad) - 2 for length, pad in zip(x_BHWC.shape[1:3], pads))
    photos, rows = _piece(x_BHWC, kernel_hwIO, height, width)
    kernels = [_of_kernel(list(row_wIO)) for row_wIO in _of_kernel(list(kernel_hwIO.astype(x_BHWC.dtype)))]
    kernels = [[kernel_IO.astype(kernel_hwIO.dtype) for kernel_IO in row] for row in kernels]
    x_BHWC = jnp.pad(x_BHWC, ((0, 0), (above, below + rows % 2), (0, 0), (0, 0)))

    def convolved(x_BhWC):
        # Padded here, and kept: what this comes from, if only a slice, would be computed for each of the 16 products.
        x_BhWC = lax.optimization_barrier(jnp.pad(x_BhWC, ((0, 0), (0, 0), (left, right + width % 2), (0, 0))))
        return _of_tiles(x_BhWC, kernels)[:, :rows, :width]

    if (photos, rows) == (batch, height):
        return convolved(x_BHWC)
    strips = -(-height // rows)

    def piece(n, y_BHWO):
        at = n // strips * photos, jnp.minimum(n % strips * rows, height - rows), 0, 0
        seen_BhWC = lax.dynamic_slice(x_BHWC, at, (photos, rows + rows % 2 + 2, *x_BHWC.shape[2:]))
        return lax.dynamic_update_slice(y_BHWO, convolved(seen_BhWC), at)

    return lax.fori_loop(0, batch // photos * strips, piece, jnp.zeros_like(x_BHWC, shape=(batch, height, width, out)))


def _piece(x_BHWC, kernel_hwIO, height: int, width: int) -> tuple[int, int]:
    """How many photos, and how many rows of their outputs, are computed at once, so that caches hold the products of a piece.

    Rows are even in number, or all. All of all photos where each piece would read kernels that fill the caches by themselves, and in
    float32, whose products XLA is slower at where they are small.
    """
    batch, (_, _, into, out) = len(x_BHWC), kernel_hwIO.shape
    room = few.room(PIECE)
    rows = max(room // (4 * width * out), 1)
    if not products.rounds(x_BHWC, kernel_hwIO) or 16 * into * out > room or batch * height <= rows:
        return batch, height
    if rows >= height:
        return few.part(batch, rows // height), height
    strips = -(-height // rows)
    return 1, 2 * -(-height // (2 * strips))


def _of_tiles(x_BHWI, kernels):
    """[B, 2 · down + 2, 2 · across + 2, I] → [B, 2 · down, 2 · across, O], every tile of 4×4 times the 16 transformed kernels."""
    down, across = (length // 2 - 1 for length in x_BHWI.shape[1:3])
    rows = _of_inputs([x_BHWI[:, i:i + 2 * down - 1:2] for i in range(4)])
    tiles = [_of_inputs([row_BhWI[:, :, j:j + 2 * across - 1:2] for j in range(4)]) for row_BhWI in rows]
    multiplied = [[products.matmul(tile_BhwI, kernel_IO) for tile_BhwI, kernel_IO in zip(*pair)] for pair in zip(tiles, kernels)]
    rows = [jnp.stack(_of_products(row), axis=3) for row in multiplied]  # [B, down, across, 2, O], one each of a tile's 4 rows
    y_Bh2w2O = jnp.stack(_of_products(rows), axis=2)
    return y_Bh2w2O.reshape(len(x_BHWI), 2 * down, 2 * across, -1)


# One axis of each transform: Bᵀ, G and Aᵀ of the paper.


def _of_inputs(x):
    return [x[0] - x[2], x[1] + x[2], x[2] - x[1], x[1] - x[3]]


def _of_kernel(taps):
    outer = taps[0] + taps[2]
    return [taps[0], (outer + taps[1]) / 2, (outer - taps[1]) / 2, taps[2]]


def _of_products(m):
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
