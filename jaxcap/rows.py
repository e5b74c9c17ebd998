"""The gradient of a table of which a step reads few rows: of these rows alone, over all devices.

A table's whole gradient is zeros but for these rows, and is written, summed over devices, squared for its norm and subtracted all
the same. Rules whose step follows from the gradient alone (plain descent, clipped or not) need only the rows.
"""

import jax.numpy as jnp
from jax import Array


def pay(read: int, table: int) -> bool:
    """Whether so many rows read, over all devices, are few enough of the table's."""
    return 4 * read <= table


def summed(gradient_ME: Array, index_M: Array, table: int) -> Array:
    """[M, E]: for a row that was read more than once the sum at the first of its places, and zeros at the others.

    So the norm is that of the gradient of the whole table, which has `table` rows, and what is made of it can be added to its rows
    `index_M`.
    """
    place_M = jnp.arange(len(index_M))
    first_M = jnp.full(table, len(index_M)).at[index_M].min(place_M)[index_M]
    return jnp.zeros_like(gradient_ME).at[first_M].add(gradient_ME)
