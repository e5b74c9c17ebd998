"""A convolutional network of this project, small enough to learn from nothing in minutes on two CPU cores.

It cuts the picture into patches of 4 × 4 pixels, and those into 2 × 2 (as Dosovitskiy et al. 2020 and Liu et al. 2022, arXiv 2201.03545,
section 2.2, do): products without a window's overlap are cheap. Only the last convolution overlaps.

The decoder sees only the mean over positions, in which a network that is not deep loses what was where. So the last map
is cut into GRID × GRID overlapping places, and the features are the strongest response of every channel in each place
and in the whole picture (as in spatial pyramid pooling, He et al. 2014), on one scale for all.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxcap.encoders import EncoderSpec
from jaxcap.encoders.layers import BatchNormMode, ConvBN

PATCH = 4  # pixels along each side
CONVOLUTIONS = ((24, 1, 1), (48, 2, 2), (48, 3, 1))  # channels, side of the kernel, stride
GRID = 3  # places along each side
REACH = 0.7  # of a place around its middle, in places
CHANNELS = 32  # of one place


class SmallCNN(nn.Module):
    """image_BHWC, preprocessed → features [B, 1, 1, F], F = (GRID² + 1) · CHANNELS: the places row by row, then the whole."""

    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, image_BHWC, batch_norm: BatchNormMode = "inference"):
        layer = nn.remat(ConvBN) if self.remat else ConvBN
        x_BHWC = _patches(image_BHWC)
        for i, (width, side, stride) in enumerate(CONVOLUTIONS):
            y_BHWC = layer(x_BHWC.shape[-1], width, (side, side), stride=stride, batch_norm=batch_norm,
                           dtype=self.dtype, name=f"conv{i}")(x_BHWC)
            x_BHWC = x_BHWC + y_BHWC if x_BHWC.shape == y_BHWC.shape else y_BHWC
        x_BHWC = layer(x_BHWC.shape[-1], CHANNELS, batch_norm=batch_norm, dtype=self.dtype, name="head")(x_BHWC)
        places_B11F = _strongest_by_place(x_BHWC)
        features = places_B11F.shape[-1]
        return layer(features, features, depthwise=True, activation=None, batch_norm=batch_norm, dtype=self.dtype,
                     name="places")(places_B11F)


def _patches(image_BHWC: jax.Array) -> jax.Array:
    """Every PATCH × PATCH pixels as one with all their channels; what an edge lacks is its last pixel again."""
    *_, height, width, channels = image_BHWC.shape
    image_BHWC = jnp.pad(image_BHWC, ((0, 0), (0, -height % PATCH), (0, -width % PATCH), (0, 0)), mode="edge")
    x = image_BHWC.reshape(-1, -(-height // PATCH), PATCH, -(-width // PATCH), PATCH, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *x.shape[1:4:2], PATCH**2 * channels)


def _strongest_by_place(x_BHWC: jax.Array) -> jax.Array:
    rows, columns = ([*_places(length), slice(0, length)] for length in x_BHWC.shape[1:3])
    by_row = [_strongest(x_BHWC[:, row]) for row in rows]  # each [B, W, C]
    places = [(i, j) for i in range(GRID) for j in range(GRID)]
    features = [_strongest(by_row[i][:, columns[j]]) for i, j in (*places, (GRID, GRID))]
    return jnp.concatenate(features, axis=-1)[:, None, None]


def _strongest(x: jax.Array) -> jax.Array:
    """Maximum over axis 1, pair by pair: a reduction's gradient divides by how many inputs equal the maximum, which can be none
    where the compiler computes the inputs a second time."""
    return functools.reduce(jnp.maximum, (x[:, i] for i in range(x.shape[1])))


def _places(length: int) -> list[slice]:
    """The positions of each place along a side; never none."""
    places = []
    for i in range(GRID):
        start = max(round((i + 0.5 - REACH) / GRID * length), 0)
        places.append(slice(min(start, length - 1), max(round((i + 0.5 + REACH) / GRID * length), start + 1)))
    return places


def preprocess(image_BHWC: jax.Array) -> jax.Array:
    """[0, 1] → [−1, 1]."""
    return 2 * image_BHWC - 1


SPEC = EncoderSpec(
    name="small_cnn",
    module=SmallCNN,
    image_size=64,
    features=(GRID * GRID + 1) * CHANNELS,
    preprocess=preprocess,
    source="this project; there are no published weights",
    parameters=30_240,
)
