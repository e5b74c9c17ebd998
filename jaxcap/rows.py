"""The gradient of a table of which a step reads few rows: of these rows alone, over all devices.

A table's whole gradient is zeros but for these rows, and is written, summed over devices, squared for its norm and subtracted all
the same. Rules whose step follows from the gradient alone (plain descent, clipped or not) need only the rows.
"""

import jax
import jax.numpy as jnp
from jax import Array


def pay(read: int, table: int) -> bool:
    """Whether so many rows read, over all devices, are few enough of the table's."""
    return 4 * read <= table


def gathered(gradient_NE: Array, index_N: Array, axis: str) -> tuple[Array, Array]:
    """All devices' rows one after another: gradients [M, E] and where they belong [M], M = N · devices."""
    (count, _), devices = gradient_NE.shape, jax.lax.axis_size(axis)

    def place(x_N: Array) -> Array:
        if devices > 1:
            empty_M = jax.lax.pcast(jnp.zeros((devices * count, *x_N.shape[1:]), x_N.dtype), axis, to="varying")
            x_N = jax.lax.dynamic_update_slice_in_dim(empty_M, x_N, jax.lax.axis_index(axis) * count, axis=0)
        return jax.lax.psum(x_N, axis)

    return place(gradient_NE), place(index_N)


def summed(gradient_ME: Array, index_M: Array, table: int) -> Array:
    """[M, E]: for a row that was read more than once the sum at the first of its places, and zeros at the others.

    So the norm is that of the gradient of the whole table, which has `table` rows, and what is made of it can be added with `add`.
    """
    place_M = jnp.arange(len(index_M))
    first_M = jnp.full(table, len(index_M)).at[index_M].min(place_M)[index_M]
    return jnp.zeros_like(gradient_ME).at[first_M].add(gradient_ME)


def add(table_VE: Array, index_M: Array, change_ME: Array) -> Array:
    """The table with a change of some rows added."""
    return table_VE.at[index_M].add(change_ME)
