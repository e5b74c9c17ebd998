"""Greedy and beam search over any step function, batched, wholly inside jit.

The semantics are im2txt's original ones: each live caption offers its K most likely next words; offers that end a caption
compete for the K places of the finished list, the others for the K live places; a caption that is not finished is
returned only where nothing finished.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcap.vocab import BOS, EOS, PAD

PyTree = Any
NEVER = -jnp.inf


class Captions(NamedTuple):
    """The K best captions of each photo, best first.

    tokens_BKT: words and then PAD, without BOS and EOS. scores_BK: log-probability / length ** normalization, where
    length counts the words and the end marker; -inf where fewer than K captions exist. log_probs_BK: natural logarithm
    of the probability of the caption, its end marker included. finished_BK: False for a caption cut at the longest length.
    """

    tokens_BKT: Array
    scores_BK: Array
    log_probs_BK: Array
    finished_BK: Array


class _Live(NamedTuple):
    tokens_BKT: Array
    log_probs_BK: Array
    last_BK: Array
    state: PyTree  # leading axis B·K


class _Loop(NamedTuple):
    t: Array
    live: _Live
    done: Captions


def beam(step: Callable[[PyTree, Array], tuple[PyTree, Array]], start: PyTree, *, batch: int, beam: int = 3,
         max_words: int = 20, length_normalization: float = 0.0, forbidden: tuple[int, ...] = (PAD, BOS)) -> Captions:
    """The `beam` best captions a row.

    Args:
      step: `(state, token [N]) → (state, logits [N, V])`, rows independent.
      start: the state of the `batch` rows before the first word, leading axis B.
      beam: K; 1 is greedy search.
      max_words: longest caption, the end marker not counted.
      length_normalization: the exponent that divides scores by length ** it; 0 compares plain log-probabilities.
      forbidden: ids that are never written; probabilities are not renormalized.

    The loop ends as soon as no live caption can still enter the finished list.
    """
    K, T = beam, max_words

    def score(log_probs, length):
        return log_probs / jnp.float32(length) ** length_normalization if length_normalization else log_probs

    def condition(loop: _Loop) -> Array:
        # A caption only loses probability as it grows, so its best possible score is today's at the longest length.
        bound_B = score(loop.live.log_probs_BK.max(axis=1), T + 1)
        hopeful_B = (bound_B > loop.done.scores_BK[:, -1]) & (bound_B > NEVER)
        return (loop.t <= T) & jnp.any(hopeful_B)

    def body(loop: _Loop) -> _Loop:
        t, live, done = loop
        state, logits_NV = step(live.state, live.last_BK.reshape(-1))
        log_probs_NV = jax.nn.log_softmax(logits_NV.astype(jnp.float32))
        log_probs_NV = log_probs_NV.at[:, jnp.array(forbidden, jnp.int32)].set(NEVER) if forbidden else log_probs_NV
        offers = min(K, logits_NV.shape[-1])
        word_log_probs, words = jax.lax.top_k(log_probs_NV, offers)
        words = words.reshape(batch, K, offers)
        totals = live.log_probs_BK[:, :, None] + word_log_probs.reshape(batch, K, offers)

        # At most one offer of a live caption ends it.
        ends = words == EOS
        ended_BK = jnp.where(ends, totals, NEVER).max(axis=2)
        done = _best(done, Captions(live.tokens_BKT, score(ended_BK, t + 1), ended_BK, ended_BK > NEVER))

        # Live captions: the K best of K × K offers that go on. After the last word only endings count.
        going = jnp.where(ends | (t >= T), NEVER, totals).reshape(batch, K * offers)
        if K * offers < K:
            going = jnp.pad(going, ((0, 0), (0, K - K * offers)), constant_values=NEVER)
        log_probs_BK, picks_BK = jax.lax.top_k(going, K)
        parents_BK = picks_BK // offers
        last_BK = jnp.take_along_axis(words.reshape(batch, -1), picks_BK, axis=1)
        rows_N = (jnp.arange(batch)[:, None] * K + parents_BK).reshape(-1)
        tokens_BKT = jnp.take_along_axis(live.tokens_BKT, parents_BK[:, :, None], axis=1)
        tokens_BKT = jnp.where(jnp.arange(T) == t, last_BK[:, :, None], tokens_BKT)
        # In the last round nothing lives on, but what was alive is still the answer where nothing has finished.
        alive = t < T
        live = jax.tree.map(lambda new, old: jnp.where(alive, new, old),
                            _Live(tokens_BKT, log_probs_BK, last_BK, jax.tree.map(lambda x: x[rows_N], state)),
                            live)
        return _Loop(t + 1, live, done)

    empty_BKT = jnp.full((batch, K, T), PAD, jnp.int32)
    never_BK = jnp.full((batch, K), NEVER, jnp.float32)
    live = _Live(empty_BKT, never_BK.at[:, 0].set(0.0), jnp.full((batch, K), BOS, jnp.int32),
                 jax.tree.map(lambda x: jnp.repeat(x, K, axis=0), start))
    done = Captions(empty_BKT, never_BK, never_BK, jnp.zeros((batch, K), bool))
    loop = jax.lax.while_loop(condition, body, _Loop(jnp.int32(0), live, done))

    live_score_BK = score(loop.live.log_probs_BK, jnp.maximum((loop.live.tokens_BKT != PAD).sum(axis=2), 1))
    partial = Captions(loop.live.tokens_BKT, live_score_BK, loop.live.log_probs_BK, jnp.zeros((batch, K), bool))
    nothing_B = ~loop.done.finished_BK.any(axis=1)
    return jax.tree.map(lambda p, d: jnp.where(nothing_B.reshape(-1, *[1] * (d.ndim - 1)), p, d), partial, loop.done)


def _best(one: Captions, other: Captions) -> Captions:
    """The K best of two lists of K captions, best first; the earlier list wins ties."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), one, other)
    _, order_BK = jax.lax.top_k(both.scores_BK, one.scores_BK.shape[1])
    return jax.tree.map(
        lambda x: jnp.take_along_axis(x, order_BK.reshape(*order_BK.shape, *[1] * (x.ndim - 2)), axis=1), both)
