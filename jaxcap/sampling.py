"""Captions drawn from the model instead of searched for, batched, wholly inside jit: temperature, top-k, nucleus."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcap.search import NEVER, Captions, PyTree, Rules, log_softmax, score
from jaxcap.vocab import BOS, EOS, PAD

FEW = 512  # words that a nucleus is first looked for among


class _Loop(NamedTuple):
    t: Array
    tokens_NT: Array
    log_probs_N: Array
    last_N: Array
    ended_N: Array
    state: PyTree  # leading axis N = B·K


def sample(step: Callable[[PyTree, PyTree, Array], tuple[PyTree, Array]], context: PyTree, start: PyTree, key_B: Array, *,
           draws: int = 1, max_words: int = 20, length_normalization: float = 0.0, rules: Rules = Rules(), temperature: float = 1.0,
           top_k: int = 0, nucleus: float = 1.0) -> Captions:
    """`draws` independent captions a row, as they are drawn, with the model's own probabilities.

    Args:
      step, context, start, max_words, length_normalization, rules: as for `search.beam`.
      key_B: a random key a row; a row's captions depend on its key and on nothing beside it.
      temperature, top_k, nucleus: as for `draw`.
    """
    (B,), K, T = key_B.shape, draws, max_words
    key_N = jax.vmap(lambda key: jax.random.split(key, K))(key_B).reshape(-1)

    def condition(loop: _Loop) -> Array:
        return (loop.t <= T) & ~loop.ended_N.all()

    def body(loop: _Loop) -> _Loop:
        t, tokens_NT, log_probs_N, last_N, ended_N, state = loop
        state, logits_NV = step(context, state, last_N)
        log_probs_NV = rules.apply(log_softmax(logits_NV), tokens_NT, jnp.broadcast_to(t, last_N.shape))
        now_N = jax.vmap(jax.random.fold_in, (0, None))(key_N, t)
        word_N = draw(now_N, log_probs_NV, temperature=temperature, top_k=top_k, nucleus=nucleus)
        ends_N = word_N == EOS
        # After the last word only endings count, as in beam search: another word leaves the caption cut.
        counts_N = ~ended_N & (ends_N | (t < T))
        log_probs_N += jnp.where(counts_N, jnp.take_along_axis(log_probs_NV, word_N[:, None], axis=1)[:, 0], 0.0)
        written_NT = (counts_N & ~ends_N)[:, None] & (jnp.arange(T) == t)
        return _Loop(t + 1, jnp.where(written_NT, word_N[:, None], tokens_NT), log_probs_N, word_N,
                     ended_N | ends_N, state)

    N = B * K
    first = _Loop(jnp.int32(0), jnp.full((N, T), PAD, jnp.int32), jnp.zeros(N), jnp.full(N, BOS, jnp.int32),
                  jnp.zeros(N, bool), jax.tree.map(lambda x: jnp.repeat(x, K, axis=0), start))
    loop = jax.lax.while_loop(condition, body, first)
    lengths_N = jnp.maximum((loop.tokens_NT != PAD).sum(axis=1) + loop.ended_N, 1)
    found = Captions(loop.tokens_NT, score(loop.log_probs_N, lengths_N, length_normalization), loop.log_probs_N, loop.ended_N)
    return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), found)


def draw(key_N: Array, log_probs_NV: Array, *, temperature: float = 1.0, top_k: int = 0, nucleus: float = 1.0) -> Array:
    """One id a row.

    Args:
      key_N: a random key a row.
      log_probs_NV: of the ids, up to a constant; -inf where one is never drawn.
      temperature: divides the log-probabilities.
      top_k: draw among so many likeliest ids; 0 is all.
      nucleus: of those, draw among the fewest likeliest ids whose probability together, renormalized, is at least this
        (Holtzman et al. 2019, arXiv 1904.09751, §3.1), and those just as likely as the last of them. The likeliest id always remains.
    """
    scaled_NO, ids_NO = log_probs_NV / temperature, None
    if top_k:
        scaled_NO, ids_NO = jax.lax.top_k(scaled_NO, min(top_k, scaled_NO.shape[1]))
    if nucleus < 1:
        scaled_NO = jnp.where(scaled_NO >= _least(scaled_NO, nucleus)[:, None], scaled_NO, NEVER)
    picks_N = jax.vmap(categorical)(key_N, scaled_NO)
    return picks_N if ids_NO is None else jnp.take_along_axis(ids_NO, picks_N[:, None], axis=1)[:, 0]


def _least(log_probs_NV: Array, share: float) -> Array:
    """The least log-probability in a row's nucleus. All words are sorted only where the likeliest `FEW` are too few for a row."""
    total_N = jax.nn.logsumexp(log_probs_NV, axis=1)

    def among(count: int) -> tuple[Array, Array]:
        sorted_NO = jax.lax.top_k(log_probs_NV, count)[0]
        probs_NO = jnp.exp(sorted_NO - total_N[:, None])
        together_NO = jnp.cumsum(probs_NO, axis=1)
        least_N = jnp.min(jnp.where(together_NO - probs_NO < share, sorted_NO, jnp.inf), axis=1)
        return least_N, together_NO[:, -1] >= share

    V = log_probs_NV.shape[1]
    if V <= FEW:
        return among(V)[0]
    least_N, enough_N = among(FEW)
    return jax.lax.cond(enough_N.all(), lambda: least_N, lambda: among(V)[0])


def categorical(key: Array, log_probs_XV: Array) -> Array:
    """As `jax.random.categorical` over the last axis, and the same ids: the likeliest once Gumbel's noise is added.

    It is found by two reductions, because XLA's argmax goes number by number on CPUs and takes three times as long as the noise.
    """
    noisy_XV = log_probs_XV + jax.random.gumbel(key, log_probs_XV.shape, log_probs_XV.dtype)
    V = noisy_XV.shape[-1]
    return jnp.min(jnp.where(noisy_XV == noisy_XV.max(axis=-1, keepdims=True), jnp.arange(V), V), axis=-1)
