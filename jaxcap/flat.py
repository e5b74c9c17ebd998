"""An encoder's hundreds of arrays side by side in two, as training keeps them on NVIDIA cards.

There XLA sends a kernel or two for the norm and one for the change of every array of its own, most of them smaller than what it
takes to begin a kernel.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

PyTree = Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrices", "vectors"], meta_fields=["structure", "shapes"])
@dataclass(frozen=True)
class Flat:
    """A pytree of arrays as two, for whatever treats all matrices alike and all vectors alike: optimizers, norms, sums over devices.

    matrices: [1, n], what has two axes or more, convolutions' kernels above all, each with its last axis, the channels out, first:
    the order in which cuDNN reads and writes them. vectors: [m], the rest. Either is None where there is nothing of its kind.
    structure, shapes: of the pytree and of its arrays.
    """

    matrices: Array | None
    vectors: Array | None
    structure: jax.tree_util.PyTreeDef
    shapes: tuple[tuple[int, ...], ...]


def pack(tree: PyTree) -> Flat:
    """`tree` as a `Flat`."""
    leaves, structure = jax.tree.flatten(tree)
    matrices = [jnp.moveaxis(leaf, -1, 0).reshape(1, -1) for leaf in leaves if leaf.ndim > 1]
    vectors = [leaf.reshape(-1) for leaf in leaves if leaf.ndim < 2]
    return Flat(jnp.concatenate(matrices, axis=1) if matrices else None, jnp.concatenate(vectors) if vectors else None,
                structure, tuple(leaf.shape for leaf in leaves))


def unpack(tree: PyTree) -> PyTree:
    """What was packed; any other tree as it is."""
    if not isinstance(tree, Flat):
        return tree

    def parts(packed: Array | None, shapes: list[tuple[int, ...]]):
        return iter(lax.split(packed.reshape(-1), [math.prod(shape) for shape in shapes]) if shapes else ())

    matrices = parts(tree.matrices, [shape for shape in tree.shapes if len(shape) > 1])
    vectors = parts(tree.vectors, [shape for shape in tree.shapes if len(shape) < 2])
    leaves = [jnp.moveaxis(next(matrices).reshape(shape[-1], *shape[:-1]), 0, -1) if len(shape) > 1 else next(vectors).reshape(shape)
              for shape in tree.shapes]
    return jax.tree.unflatten(tree.structure, leaves)


def pack_like(tree: PyTree, *patterns: PyTree) -> PyTree:
    """`tree` with everything in it packed that is built as one of `patterns` is: parameters, and what an optimizer keeps of them."""
    structures = {jax.tree.structure(pattern) for pattern in patterns}

    def is_one(node: PyTree) -> bool:
        return jax.tree.structure(node) in structures

    return jax.tree.map(lambda node: pack(node) if is_one(node) else node, tree, is_leaf=is_one)


def unpack_all(tree: PyTree) -> PyTree:
    """`tree` with all that is packed in it as it was."""
    return jax.tree.map(unpack, tree, is_leaf=lambda node: isinstance(node, Flat))
