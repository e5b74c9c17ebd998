"""A whole split's photos or features on the devices, of which every step reads some rows."""

import functools
from dataclasses import dataclass

import jax
import numpy as np
from jax import Array, lax

TPU_TILE = (32, 128)  # rows and columns of uint8 that lie together there


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["shape", "tiled"])
@dataclass(frozen=True)
class Table:
    """Photos or features, kept so that one row can be read without the others.

    rows: [N, …], what `table` makes of them. shape: of a row as it is given back. tiled: whether rows are photos in a TPU's tiles.
    """

    rows: Array
    shape: tuple[int, ...]
    tiled: bool = False

    def __getitem__(self, index_B: Array) -> Array:
        """Rows [B, *shape]."""
        if not self.tiled:
            return self.rows[index_B].reshape(-1, *self.shape)
        # A gather of rows as large as photos begins on TPUs by cutting the whole table in pieces.
        found_BYX = lax.map(lambda index: lax.dynamic_index_in_dim(self.rows, index, keepdims=False), index_B)
        height, width, channels = self.shape
        return found_BYX[:, :height, :width * channels].reshape(-1, *self.shape)


def table(array_N: np.ndarray, platform: str) -> Table:
    """Photos [N, H, W, C] or features [N, P, F] as devices of a platform, "cpu", "gpu" or "tpu", should be given them.

    A TPU lays arrays out by what wastes least of its tiles, and for photos that is photo beside photo: every step would turn the whole
    table over. So there they are matrices [N, H, W · C] that fill tiles (13 % more memory at im2txt's size); and features of one
    position have no axis for it anywhere, which would have them copied at every step too.
    """
    shape, tiled = array_N.shape[1:], array_N.ndim == 4 and platform == "tpu"
    if tiled:
        array_N = array_N.reshape(*array_N.shape[:2], -1)
        array_N = np.pad(array_N, [(0, 0), *((0, -side % tile) for side, tile in zip(array_N.shape[1:], TPU_TILE))])
    elif shape[0] == 1:
        array_N = array_N[:, 0]
    return Table(array_N, shape, tiled)
