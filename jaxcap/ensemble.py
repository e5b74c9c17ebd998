"""Several captioners that write together: at every word, the mean of their probabilities."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxcap.captioner import Captioner
from jaxcap.search import log_softmax

PyTree = Any


@dataclass(frozen=True)
class Ensemble:
    """Captioners with one vocabulary, which stand in a search where a `Captioner` does.

    Encoders, sizes and decoders may differ. Parameters, statistics, photos and features are tuples with an item a member.
    """

    members: tuple[Captioner, ...]

    def start(self, params: PyTree, features: PyTree) -> tuple[PyTree, PyTree]:
        """`(context, state)` before the first word, each with an item a member."""
        started = [member.start(p, f) for member, p, f in zip(self.members, params, features, strict=True)]
        return tuple(context for context, _ in started), tuple(state for _, state in started)

    def stepper(self, params: PyTree, reads: int = 0) -> Callable[[PyTree, PyTree, Array], tuple[PyTree, Array]]:
        """`step(context, state, token_N)`: the members' next states, and log p [N, V] of the next word with p the mean of their
        probabilities."""
        steps = [member.stepper(p, reads) for member, p in zip(self.members, params, strict=True)]

        def step(context: PyTree, state: PyTree, token_N: Array) -> tuple[PyTree, Array]:
            stepped = [own(c, s, token_N) for own, c, s in zip(steps, context, state, strict=True)]
            # One after another: XLA's sum over few rows of many numbers takes a CPU ten times as long.
            sum_NV = functools.reduce(jnp.logaddexp, [log_softmax(logits_NV) for _, logits_NV in stepped])
            return tuple(state for state, _ in stepped), sum_NV - jnp.log(jnp.float32(len(self.members)))

        return step
