"""Windowed operations as arithmetic on shifted slices: what XLA's CPU backend is fast at.

Its depthwise convolution, and the gradients of one, take ten to fifty times as long, and so does what it makes of the gradient of
shifted slices itself: gradients are written out.
"""

from collections.abc import Iterator, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax


def windows(x_BHWC, size: tuple[int, int], stride: int, padding) -> Iterator[jax.Array]:
    """What each position of a window sees, row by row, 0 beyond the edge. XLA fuses arithmetic on these into one vectorised loop.

    `padding` is "SAME", "VALID" or ((above, below), (left, right)).
    """
    # Without the barrier the middle position would read x itself: a second stream through memory beside the padded one.
    padded_BHWC = lax.optimization_barrier(_padded(x_BHWC, size, stride, padding))
    batch, height, width, channels = padded_BHWC.shape
    for i in range(size[0]):
        for j in range(size[1]):
            limit = (batch, height - size[0] + i + 1, width - size[1] + j + 1, channels)
            yield lax.slice(padded_BHWC, (0, i, j, 0), limit, (1, stride, stride, 1))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(x_BHWC, kernel_hwC, stride: int, padding):
    """Depthwise convolution."""
    taps = kernel_hwC.reshape(-1, kernel_hwC.shape[-1])
    return sum(x * tap for x, tap in zip(windows(x_BHWC, kernel_hwC.shape[:2], stride, padding), taps))


def _depthwise_forward(x_BHWC, kernel_hwC, stride, padding):
    return depthwise(x_BHWC, kernel_hwC, stride, padding), (x_BHWC, kernel_hwC)


def _depthwise_backward(stride, padding, residuals, dy_BHWC):
    x_BHWC, kernel_hwC = residuals
    return _dx(x_BHWC, kernel_hwC, stride, padding, dy_BHWC), _dkernel(x_BHWC, kernel_hwC, stride, padding, dy_BHWC)


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


@jax.custom_vjp
def sums(x_BHWC):
    """The sum of the 3×3 pixels about each; those beyond the edge count as 0. Its gradient is the same sum."""
    return sum(windows(x_BHWC, (3, 3), 1, "SAME"))


sums.defvjp(lambda x_BHWC: (sums(x_BHWC), None), lambda _, dy_BHWC: (sums(dy_BHWC),))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x_BHWC, size: int, stride: int, padding):
    """Maximum over windows at most `size` apart; what lies beyond the edge counts as 0. Of equal pixels the first has the gradient."""
    return reduce(jnp.maximum, windows(x_BHWC, (size, size), stride, padding))


def _max_pool_forward(x_BHWC, size, stride, padding):
    return max_pool(x_BHWC, size, stride, padding), x_BHWC


def _max_pool_backward(size, stride, padding, x_BHWC, dy_BHWC):
    """Pixels that stand alike to the stride are computed together: the same positions of the windows see them."""
    largest, winner = None, jnp.zeros(dy_BHWC.shape, jnp.int8 if x_BHWC.dtype.itemsize == 2 else jnp.int32)  # it is kept for long
    for position, seen in enumerate(windows(x_BHWC, (size, size), stride, padding)):
        winner = winner if largest is None else jnp.where(seen > largest, winner.dtype.type(position), winner)
        largest = seen if largest is None else jnp.maximum(largest, seen)
    reach = (size - 1) // stride  # windows before the one at a pixel that see it too
    margins = ((0, 0), (reach, reach + 1), (reach, reach + 1), (0, 0))
    winner, dy_BHWC = jnp.pad(winner, margins, constant_values=-1), jnp.pad(dy_BHWC, margins)
    height, width = (length - reach for length in dy_BHWC.shape[1:3])

    def of_pixels(row, column):
        total = 0
        for i in range(row, size, stride):
            for j in range(column, size, stride):
                top, left = reach - i // stride, reach - j // stride
                window = (slice(None), slice(top, top + height), slice(left, left + width))
                total += jnp.where(winner[window] == i * size + j, dy_BHWC[window], 0)
        return total

    dx = jnp.stack([jnp.stack([of_pixels(i, j) for j in range(stride)], axis=3) for i in range(stride)], axis=2)
    dx_BHWC = dx.reshape(len(x_BHWC), stride * height, stride * width, -1)
    (top, _), (left, _) = pads(x_BHWC, (size, size), stride, padding)
    beyond = [max(start + length - have, 0) for start, length, have in zip((top, left), x_BHWC.shape[1:3], dx_BHWC.shape[1:3])]
    dx_BHWC = jnp.pad(dx_BHWC, ((0, 0), (0, beyond[0]), (0, beyond[1]), (0, 0)))  # what no window reaches
    return (dx_BHWC[:, top:top + x_BHWC.shape[1], left:left + x_BHWC.shape[2]],)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _dx(x_BHWC, kernel_hwC, stride, padding, dy_BHWC):
    """The convolution of dy, spread out by the stride, with the kernel turned by 180°."""
    size = kernel_hwC.shape[:2]
    around = []
    for axis, (low, _) in enumerate(pads(x_BHWC, size, stride, padding), start=1):
        spread = (dy_BHWC.shape[axis] - 1) * stride + 1
        low = size[axis - 1] - 1 - low
        around.append((low, x_BHWC.shape[axis] + size[axis - 1] - 1 - low - spread, stride - 1))
    spread_BHWC = lax.pad(dy_BHWC, jnp.zeros((), dy_BHWC.dtype), ((0, 0, 0), *around, (0, 0, 0)))
    return depthwise(spread_BHWC, kernel_hwC[::-1, ::-1], 1, "VALID")


def _dkernel(x_BHWC, kernel_hwC, stride, padding, dy_BHWC):
    """Row by row, so that the sums over pixels stay in the cache."""
    rows, columns, _ = kernel_hwC.shape
    padded_BHWC = _padded(x_BHWC, (rows, columns), stride, padding)
    batch, height, width, channels = dy_BHWC.shape

    def row(n):
        b, h = n // height, n % height
        x_hWC = lax.dynamic_slice(padded_BHWC, (b, h * stride, 0, 0), (1, rows, *padded_BHWC.shape[2:]))[0]
        dy_WC = lax.dynamic_slice(dy_BHWC, (b, h, 0, 0), (1, 1, width, channels))[0, 0]
        return [x_hWC[:, j:j + (width - 1) * stride + 1:stride] * dy_WC for j in range(columns)]

    sums = lax.fori_loop(1, batch * height, lambda n, sums: jax.tree.map(jnp.add, sums, row(n)), row(0))
    return jnp.stack([sum_hWC.sum(axis=1) for sum_hWC in sums], axis=1).astype(kernel_hwC.dtype)


def _padded(x_BHWC, size, stride, padding):
    return jnp.pad(x_BHWC, ((0, 0), *pads(x_BHWC, size, stride, padding), (0, 0)))


def pads(x_BHWC, size: tuple[int, int], stride: int, padding) -> Sequence[tuple[int, int]]:
    """`padding` in pixels: ((above, below), (left, right))."""
    if not isinstance(padding, str):
        return padding
    return lax.padtype_to_pads(x_BHWC.shape[1:3], size, (stride, stride), padding)
