"""A batch few photos at a time: what a layer writes is still in a CPU's caches when the next one reads it. The features are the same."""

import functools
import itertools
from collections.abc import Callable

import jax

from jaxcap import memory

CACHE = 3 << 20  # bytes a core that maps may take at their widest


def see(module, layers: Callable[..., jax.Array], image_BHWC: jax.Array) -> jax.Array:
    """`layers(image_BHWC)`, the whole of a network, few photos at a time.

    A network whose maps shrink far has a method `widths`: the numbers in the widest map within each of its layers, of a photo of
    that height and width. `layers` then takes a slice of them, and every run of layers sees as many photos as there is room for
    their maps. Through other networks go as many photos as there is room for the photos themselves.
    """
    _, height, width, channels = image_BHWC.shape
    if not hasattr(module, "widths"):
        return _mapped(layers, image_BHWC, _photos(height * width * channels))
    x_BHWC, photos, start = image_BHWC, [_photos(numbers) for numbers in module.widths(height, width)], 0
    for many, run in itertools.groupby(photos):
        end = start + len(list(run))
        x_BHWC = _mapped(functools.partial(layers, run=slice(start, end)), x_BHWC, many)
        start = end
    return x_BHWC


def _photos(numbers: int) -> int:
    """As many, a power of two, as there is room for in the caches of all cores, of so many float32 numbers each; at least one."""
    return 1 << max(room(CACHE) // numbers, 1).bit_length() - 1


def fits(numbers: int) -> bool:
    """Whether there is room for so many float32 numbers in the caches of all cores."""
    return numbers <= room(CACHE)


def room(bytes_a_core: int) -> int:
    """How many float32 numbers take so many bytes of the caches of each core."""
    return bytes_a_core * memory.cores() // 4


def part(batch: int, photos: int) -> int:
    """How many of a batch at once are equal parts of at most so many; all where only parts of less than half as many would be equal."""
    equal = max(n for n in range(1, min(photos, batch) + 1) if batch % n == 0)
    return batch if 2 * equal < photos else equal


def _mapped(layers: Callable[[jax.Array], jax.Array], x_BHWC: jax.Array, photos: int) -> jax.Array:
    """`layers(x_BHWC)` in such parts."""
    batch = len(x_BHWC)
    at_once = part(batch, photos)
    if at_once == batch:
        return layers(x_BHWC)
    y = jax.lax.map(layers, x_BHWC.reshape(-1, at_once, *x_BHWC.shape[1:]))
    return y.reshape(batch, *y.shape[2:])
