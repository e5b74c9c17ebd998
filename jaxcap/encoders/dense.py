"""Ungrouped convolutions for CPUs, in the form that XLA's CPU backend is fastest at, and with gradients written out.

XLA's own convolution reaches half of what its matrix products do where it has a stride, and knows no bfloat16 instructions; the gradient
of a kernel it computes as a convolution by a kernel the size of the map, in batches mostly at a sixth to three quarters of the speed.
So 3×3 convolutions go by Winograd, but on large maps where AMX makes products cheap; strided ones are one matrix product of the
columns that the kernel sees (Chellapilla et al. 2006); and where factors are rounded to bfloat16 others are one of every pixel with all
taps of the kernel, or of what one of its rows sees with all of its rows, whose results are then added where they belong.
`python -m benchmarks.convolutions` tells what each takes.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxcap import products
from jaxcap.encoders import few, shifted, winograd

SMALL_KERNEL = 9  # taps; larger ones make columns that are too many
THICK = 64  # channels, or numbers that a kernel's row sees, from which on products in bfloat16 pay, and strided convolutions as products


@jax.custom_vjp
def pointwise(x_BHWC, kernel_IO):
    """A 1×1 convolution, a matrix product."""
    return products.matmul(x_BHWC, kernel_IO)


def _pointwise_backward(saved, dy_BHWO):
    x_BHWC, kernel_IO = saved
    return products.back(dy_BHWO, kernel_IO), _into_kernel(x_BHWC, dy_BHWO, kernel_IO).astype(kernel_IO.dtype)


def _into_kernel(x_BHWI, dy_BHWO, kernel_IO):
    """`products.into_kernel`, in float32 as a sum over one axis: XLA is slower at one over three."""
    if not products.rounds(dy_BHWO, kernel_IO):
        x_BHWI, dy_BHWO = (array.reshape(-1, array.shape[-1]) for array in (x_BHWI, dy_BHWO))
    return products.into_kernel(x_BHWI, dy_BHWO, kernel_IO)


pointwise.defvjp(lambda x_BHWC, kernel_IO: (pointwise(x_BHWC, kernel_IO), (x_BHWC, kernel_IO)), _pointwise_backward)


def is_factor(shape: tuple[int, ...]) -> bool:
    """Whether a kernel of this shape is a factor that a CPU multiplies faster in bfloat16 (`jaxcap.products`): [1, 1, in, out], or
    [height, width, in, out] with many channels, ungrouped, or with many in what one of its rows sees."""
    if len(shape) != 4 or shape[:2] == (1, 1):
        return shape[:2] == (1, 1)
    return shape[2] >= THICK or shape[1] * shape[2] >= THICK and _rows_pay(*shape)


def _rows_pay(height: int, width: int, into: int, out: int) -> bool:
    """Whether what a row of a kernel sees is put side by side: it is written once more, for which fewer of the products are."""
    return min(height, width) > 1 and out >= into


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x_BHWC, kernel_hwIO, stride: int, padding):
    """x_BHWC → y_BHWO. `padding` is "SAME", "VALID" or ((above, below), (left, right)); a kernel in bfloat16 rounds x in products."""
    if stride == 1:
        return _unstrided(x_BHWC, kernel_hwIO, padding)
    return (_of_columns if _columns_pay(*kernel_hwIO.shape) else ordinary)(x_BHWC, kernel_hwIO, stride, padding)


def _columns_pay(height: int, width: int, into: int, out: int) -> bool:
    """For photos and for thick maps; thin maps make thin products."""
    return height * width <= SMALL_KERNEL and out >= 32 and (into <= 4 or into >= THICK)


def ordinary(x_BHWC, kernel_hwIO, stride, padding, groups: int = 1):
    """XLA's own convolution, in the type of x."""
    return lax.conv_general_dilated(x_BHWC, kernel_hwIO.astype(x_BHWC.dtype), (stride, stride), padding,
                                    dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)


def _forward(x_BHWC, kernel_hwIO, stride, padding):
    return convolve(x_BHWC, kernel_hwIO, stride, padding), (x_BHWC, kernel_hwIO)


def _backward(stride, padding, saved, dy_BHWO):
    x_BHWC, kernel_hwIO = saved
    if stride == 1:
        dx_BHWC = _unstrided(dy_BHWO, kernel_hwIO[::-1, ::-1].swapaxes(2, 3), _turned(x_BHWC, dy_BHWO, kernel_hwIO, padding))
    else:
        (dx_BHWC,) = jax.vjp(lambda x_BHWC: ordinary(x_BHWC, kernel_hwIO, stride, padding), x_BHWC)[1](dy_BHWO)
    return dx_BHWC, _dkernel(x_BHWC, kernel_hwIO, stride, padding, dy_BHWO)


convolve.defvjp(_forward, _backward)


def _unstrided(x_BHWC, kernel_hwIO, padding):
    rounds = products.rounds(x_BHWC, kernel_hwIO) and is_factor(kernel_hwIO.shape)
    large = max(x_BHWC.shape[1:3]) >= winograd.LARGE
    if winograd.pays(x_BHWC, kernel_hwIO):  # where products cost little, what it writes to have fewer of them costs more
        if not (rounds and large and products.tiles()) or few.fits(x_BHWC.size):
            return winograd.convolve(x_BHWC, kernel_hwIO, padding)
    elif large or not rounds:
        return ordinary(x_BHWC, kernel_hwIO, 1, padding)
    return _of_taps(x_BHWC, kernel_hwIO, padding)


def _of_columns(x_BHWC, kernel_hwIO, stride, padding):
    """What a window sees is one row of the product's first factor."""
    *size, _, out = kernel_hwIO.shape
    columns = _columns(x_BHWC.astype(kernel_hwIO.dtype), size, stride, padding)
    return jnp.matmul(columns, kernel_hwIO.reshape(-1, out), preferred_element_type=x_BHWC.dtype)


def _columns(x_BHWC, size, stride, padding):
    """[..., height · width · C]: what each position of a window sees, side by side."""
    seen = shifted.windows(products.words(x_BHWC), size, stride, padding)
    return products.numbers(jnp.concatenate(list(seen), axis=-1))


def _of_taps(x_BHWC, kernel_hwIO, padding):
    """Without a stride: every pixel times every tap, and each tap's share moved to the outputs that it is for; or every row of
    pixels that a row of the kernel sees times every row of it."""
    *size, into, out = kernel_hwIO.shape
    pads = shifted.pads(x_BHWC, size, 1, padding)
    if _rows_pay(*size, into, out):
        x_BHWC = _columns(x_BHWC.astype(kernel_hwIO.dtype), (1, size[1]), 1, ((0, 0), pads[1]))
        size, into, pads = (size[0], 1), size[1] * into, (pads[0], (0, 0))
        kernel_hwIO = kernel_hwIO.reshape(*size, into, out)
    lengths = [length + sum(pad) - side + 1 for length, pad, side in zip(x_BHWC.shape[1:3], pads, size)]
    every_BHWN = products.summed(x_BHWC, kernel_hwIO.transpose(2, 0, 1, 3).reshape(into, -1))

    def moved(i, j):
        tap = (i * size[1] + j) * out
        lows = [low - at for (low, _), at in zip(pads, (i, j))]
        around = [(low, to - have - low, 0) for low, to, have in zip(lows, lengths, x_BHWC.shape[1:3])]
        return lax.pad(every_BHWN[..., tap:tap + out], jnp.float32(0), ((0, 0, 0), *around, (0, 0, 0)))

    return sum(moved(i, j) for i in range(size[0]) for j in range(size[1]))


def _turned(x_BHWC, dy_BHWO, kernel_hwIO, padding):
    """The padding with which dy, without a stride, meets the turned kernel to give x's gradient."""
    size = kernel_hwIO.shape[:2]
    lows = [low for low, _ in shifted.pads(x_BHWC, size, 1, padding)]
    return [(side - 1 - low, low + have - left) for side, low, have, left in zip(size, lows, x_BHWC.shape[1:3], dy_BHWO.shape[1:3])]


def _dkernel(x_BHWC, kernel_hwIO, stride, padding, dy_BHWO):
    """Each tap's gradient is the product of what it saw and dy. With a stride, small kernels take one product of columns; without,
    thin ones one a row, and for others dy is shifted rather than x, which is faster."""
    *size, into, out = kernel_hwIO.shape
    factor = kernel_hwIO.reshape(-1, out)
    if stride > 1 and size[0] * size[1] <= SMALL_KERNEL:
        taps = _into_kernel(_columns(x_BHWC.astype(factor.dtype), size, stride, padding), dy_BHWO, factor)
    elif stride > 1:
        taps = jnp.stack([products.into_kernel(x, dy_BHWO, factor) for x in shifted.windows(x_BHWC, size, stride, padding)])
    elif _rows_pay(*size, into, out) and into <= products.THIN:
        taps = _dkernel_by_rows(x_BHWC, kernel_hwIO, padding, dy_BHWO)
    else:
        around = _turned(x_BHWC, dy_BHWO, kernel_hwIO, padding)
        shifts = shifted.windows(products.words(dy_BHWO.astype(factor.dtype)), size, 1, around)
        taps = jnp.stack(products.into_kernels(x_BHWC, [products.numbers(dy_BHWO) for dy_BHWO in shifts][::-1], factor))
    return taps.reshape(kernel_hwIO.shape).astype(kernel_hwIO.dtype)


def _dkernel_by_rows(x_BHWI, kernel_hwIO, padding, dy_BHWO):
    """One product for each row of the kernel, [width · I, N] @ [N, O]. Both maps lie on a grid of N places, row after row and photo
    after photo with zeros between, on which a tap is a distance along one axis: shifts are runs of memory, and few."""
    (height, width), dtype = kernel_hwIO.shape[:2], kernel_hwIO.dtype
    pads = shifted.pads(x_BHWI, (height, width), 1, padding)
    sides = [max(have + max(pad), seen) for have, pad, seen in zip(x_BHWI.shape[1:3], pads, dy_BHWO.shape[1:3])]
    x_NI, dy_NO = lax.optimization_barrier([_on_grid(array.astype(dtype), sides) for array in (x_BHWI, dy_BHWO)])
    (top, _), (left, _) = pads
    x_IN = jnp.pad(products.words(products.transposed(x_NI)), ((0, 0), (left, width - 1 - left)))
    seen_KN = products.numbers(jnp.concatenate([x_IN[:, j:j + len(x_NI)] for j in range(width)]))
    dy_NO = jnp.pad(products.words(dy_NO), (((height - 1 - top) * sides[1], top * sides[1]), (0, 0)))
    shifts = [products.numbers(dy_NO[i * sides[1]:i * sides[1] + len(x_NI)]) for i in reversed(range(height))]
    return jnp.stack([jnp.matmul(seen_KN, dy_NO, preferred_element_type=products.sums(dtype)) for dy_NO in shifts])


def _on_grid(x_BHWC, sides):
    """[B · height · width, C] with zeros below and to the right up to those sides."""
    around = [(0, side - have) for side, have in zip(sides, x_BHWC.shape[1:3])]
    return jnp.pad(x_BHWC, ((0, 0), *around, (0, 0))).reshape(-1, x_BHWC.shape[-1])
