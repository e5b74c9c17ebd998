"""Greedy and beam search over any step function, batched, wholly inside jit; with diverse groups and required words.

The semantics are im2txt's original ones: each live caption offers its K most likely next words; offers that end a caption
compete for the K places of the finished list, the others for the K live places; a caption that is not finished is
returned only where nothing finished. `sampling` draws captions instead, under the same rules of what may be written.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcap import platforms
from jaxcap.vocab import BOS, EOS, PAD

PyTree = Any
NEVER = -jnp.inf
BLOCK, CPU_BLOCK = 128, 32  # words that `likeliest` looks through together: as many as a TPU does at once, and the fastest on CPUs


class Captions(NamedTuple):
    """K captions of each photo: the best ones, best first, or drawn ones, as they were drawn.

    tokens_BKT: words and then PAD, without BOS and EOS. scores_BK: log-probability / length ** normalization, where
    length counts the words and the end marker; -inf where fewer than K captions exist. log_probs_BK: natural logarithm
    of the probability of the caption, its end marker included. finished_BK: False for a caption cut at the longest length.
    """

    tokens_BKT: Array
    scores_BK: Array
    log_probs_BK: Array
    finished_BK: Array


class Rules(NamedTuple):
    """What may be written. Probabilities are not renormalized over what is left.

    forbidden: ids that are never written. min_words: words before a caption may end. no_repeat_ngram: how many words in a
    row never occur twice in a caption (Paulus et al. 2017, arXiv 1705.04304, §2.5, with 3); 0 is no such rule.
    """

    forbidden: tuple[int, ...] = (PAD, BOS)
    min_words: int = 0
    no_repeat_ngram: int = 0

    def apply(self, log_probs_NV: Array, tokens_NT: Array, t_N: Array) -> Array:
        """The next word's log-probabilities, `NEVER` where a rule forbids it, after the first `t_N` of `tokens_NT`."""
        if self.forbidden:  # a mask is many times as fast as writing to some columns
            mask_V = np.isin(np.arange(log_probs_NV.shape[1]), self.forbidden)
            log_probs_NV = jnp.where(mask_V, NEVER, log_probs_NV)
        if self.min_words:
            log_probs_NV = log_probs_NV.at[:, EOS].set(jnp.where(t_N < self.min_words, NEVER, log_probs_NV[:, EOS]))
        (N, T), before = tokens_NT.shape, self.no_repeat_ngram - 1
        if 0 <= before < T:
            # Every earlier place whose `before` words are the last ones forbids the word that came next there.
            t_N1 = t_N[:, None]
            last = jnp.take_along_axis(tokens_NT, jnp.maximum(t_N1 - before + jnp.arange(before), 0), axis=1)
            same = jnp.arange(before, T) < t_N1
            for i in range(before):
                same &= tokens_NT[:, i:i + T - before] == last[:, i:i + 1]
            words = jnp.where(same, tokens_NT[:, before:], log_probs_NV.shape[1])
            log_probs_NV = log_probs_NV.at[jnp.arange(N)[:, None], words].set(NEVER, mode="drop")
        return log_probs_NV


class _Live(NamedTuple):
    tokens_BLT: Array
    log_probs_BL: Array
    last_BL: Array
    state: PyTree  # leading axis B·L


class _Loop(NamedTuple):
    photo_B: Array  # which photos are being searched, in order; past the last one there is none
    t_B: Array  # words that they have so far
    live: _Live
    done: Captions


def beam(step: Callable[[PyTree, PyTree, Array], tuple[PyTree, Array]], context: PyTree, start: PyTree, *, batch: int,
         places: int = 0, beam: int = 3, max_words: int = 20, length_normalization: float = 0.0, rules: Rules = Rules(),
         must_contain: tuple[int, ...] = (), groups: int = 1, diversity: float = 0.5,
         penalty: Callable[[PyTree], Array] | None = None) -> Captions:
    """The `beam` best captions of each of `batch` photos.

    Args:
      step: `(context, state, token [N]) → (state, logits [N, V])`: N is a multiple of the photos in `context`, those of a photo
        stand side by side, and all are independent.
      context, start: what stays the same for a photo, and the state before its first word, leading axis `batch`.
      places: so many photos are searched at once, each until it is done, when the next one takes its place; 0: all, as long as one
        of them takes. The captions are the same.
      beam: K; 1 is greedy search.
      max_words: longest caption, the end marker not counted.
      length_normalization: the exponent that divides scores by length ** it; 0 compares plain log-probabilities.
      rules: what may be written.
      must_contain: ids that every caption contains, by constrained beam search (Anderson et al. 2017, arXiv 1612.00576):
        every subset of them has K live places of its own for the captions that contain just that subset, each live caption
        also offers each of them, and only captions that contain all may end. Not together with `groups`.
      groups: G, of diverse beam search (Vijayakumar et al. 2016, arXiv 1610.02424) with Hamming diversity: the beam falls
        into G searches with K / G places each, and a word costs a group `diversity` for every live caption of an earlier
        group that has just written it. The cost steers the choice alone: scores and probabilities are without it.
      penalty: `state → [N]`, at most 0, is added to the score of a caption that ends in that state.

    A photo is done as soon as none of its live captions can still enter the finished list.
    """
    B, G, W, T, subsets = min(places or batch, batch), groups, beam // groups, max_words, 2 ** len(must_contain)
    L = W * subsets  # live captions of a group: W for each subset of the required words, the whole set last
    required = jnp.array(must_contain, jnp.int32)

    def going(loop: _Loop) -> Array:
        # A caption only loses probability as it grows, so its best possible score is today's at the longest length.
        bound_BG = score(loop.live.log_probs_BL.reshape(B, G, L).max(axis=2), T + 1, length_normalization)
        hopeful_BG = (bound_BG > loop.done.scores_BK[:, W - 1::W]) & (bound_BG > NEVER)
        return (loop.t_B <= T) & jnp.any(hopeful_BG, axis=1)

    def write(loop: _Loop) -> _Loop:
        photo_B, t_B, live, done = loop
        t_B1 = t_B[:, None]
        here = context if B == batch else _rows(context, photo_B)
        state, logits_NV = step(here, live.state, live.last_BL.reshape(-1))
        log_probs_NV = rules.apply(log_softmax(logits_NV), live.tokens_BLT.reshape(-1, T), jnp.repeat(t_B, G * L))
        log_probs_BLV = log_probs_NV.reshape(B, G * L, -1)
        if must_contain:
            log_probs_BLV = log_probs_BLV.at[:, :-W, EOS].set(NEVER)

        penalty_BL = penalty(state).reshape(B, G * L) if penalty else jnp.zeros((B, G * L))
        cost_BV, parts = jnp.zeros_like(log_probs_BLV[:, 0]) if G > 1 else None, []
        for g in range(G):
            own = slice(g * L, (g + 1) * L)
            ended, *chosen = advance(live.tokens_BLT[:, own], live.log_probs_BL[:, own], log_probs_BLV[:, own],
                                     penalty_BL[:, own], cost_BV, t_B1)
            finished = _best(_side_by_side(jax.tree.map(lambda x: x[:, g * W:(g + 1) * W], done), ended), W)
            parts.append((finished, chosen[0], chosen[1] + g * L, chosen[2]))
            if G > 1:
                cost_BV = cost_BV.at[jnp.arange(B)[:, None], chosen[2]].add(jnp.where(chosen[0] > NEVER, diversity, 0.0))
        done, log_probs_BL, parents_BL, last_BL = _side_by_side(*parts)

        rows_N = (jnp.arange(B)[:, None] * (G * L) + parents_BL).reshape(-1)
        tokens_BLT = jnp.take_along_axis(live.tokens_BLT, parents_BL[:, :, None], axis=1)
        tokens_BLT = jnp.where(jnp.arange(T) == t_B1[:, :, None], last_BL[:, :, None], tokens_BLT)
        # In the last round nothing lives on, but what was alive is still the answer where nothing has finished.
        live = _where(t_B < T, _Live(tokens_BLT, log_probs_BL, last_BL, _rows(state, rows_N)), live)
        return _Loop(photo_B, t_B + 1, live, done)

    def advance(tokens_BLT, log_probs_BL, word_log_probs_BLV, penalty_BL, cost_BV, t_B1):
        """A group's captions that may end here; and of its next live ones log-probabilities, places of their parents, words."""
        free_BLV = word_log_probs_BLV.at[:, :, required].set(NEVER) if must_contain else word_log_probs_BLV
        words_BLO = likeliest(free_BLV if cost_BV is None else free_BLV - cost_BV[:, None], min(W, free_BLV.shape[2]))
        offers_BLO = jnp.take_along_axis(free_BLV, words_BLO, axis=2)
        if must_contain:  # each required word is an offer of its own
            words_BLO = jnp.concatenate([words_BLO, jnp.broadcast_to(required, (B, L, len(must_contain)))], axis=2)
            offers_BLO = jnp.concatenate([offers_BLO, word_log_probs_BLV[:, :, required]], axis=2)
        totals_BLO = log_probs_BL[:, :, None] + offers_BLO

        # At most one offer of a live caption ends it.
        ends_BLO = words_BLO == EOS
        ended_BL = jnp.where(ends_BLO, totals_BLO, NEVER).max(axis=2)
        scores_BL = score(ended_BL, t_B1 + 1, length_normalization) + penalty_BL
        ended = Captions(tokens_BLT, scores_BL, ended_BL, ended_BL > NEVER)

        # Live captions: for every subset of the required words the W best offers that go on. After the last word only
        # endings count.
        going_BLO = jnp.where(ends_BLO | (t_B1 >= T)[:, :, None], NEVER, totals_BLO)
        if cost_BV is not None:
            going_BLO -= jnp.take_along_axis(cost_BV[:, None], words_BLO.reshape(B, 1, -1), axis=2).reshape(words_BLO.shape)
        subset_BLO = jnp.broadcast_to(jnp.arange(L)[:, None] // W, words_BLO.shape)
        for i, word in enumerate(must_contain):
            subset_BLO |= (words_BLO == word) << i
        in_subset_BSO = subset_BLO.reshape(B, 1, -1) == jnp.arange(subsets)[:, None]
        best_BSW, picks_BSW = jax.lax.top_k(jnp.where(in_subset_BSO, going_BLO.reshape(B, 1, -1), NEVER), W)
        picks_BL = picks_BSW.reshape(B, L)
        totals_BL = jnp.take_along_axis(totals_BLO.reshape(B, -1), picks_BL, axis=1)
        return (ended, jnp.where(best_BSW.reshape(B, L) > NEVER, totals_BL, NEVER), picks_BL // words_BLO.shape[2],
                jnp.take_along_axis(words_BLO.reshape(B, -1), picks_BL, axis=1))

    def begin(photo_B: Array) -> _Loop:
        first_BL = jnp.where((jnp.arange(G * L) % L == 0) & (photo_B < batch)[:, None], 0.0, NEVER).astype(jnp.float32)
        live = _Live(jnp.full((B, G * L, T), PAD, jnp.int32), first_BL, jnp.full((B, G * L), BOS, jnp.int32),
                     _rows(start, jnp.repeat(photo_B, G * L)))
        return _Loop(photo_B, jnp.zeros(B, jnp.int32), live, _nothing(B, beam, T))

    def result(loop: _Loop) -> Captions:
        # Of subsets only the last holds captions to return; groups have no subsets, and all their captions are.
        tokens_BKT, log_probs_BK = loop.live.tokens_BLT[:, -beam:], loop.live.log_probs_BL[:, -beam:]
        lengths_BK = jnp.maximum((tokens_BKT != PAD).sum(axis=2), 1)
        partial = Captions(tokens_BKT, score(log_probs_BK, lengths_BK, length_normalization), log_probs_BK,
                           jnp.zeros((B, beam), bool))
        found = _where(~loop.done.finished_BK.any(axis=1), partial, loop.done)
        return _best(found, beam) if G > 1 else found

    def write_in_line(line: tuple[_Loop, Captions]) -> tuple[_Loop, Captions]:
        loop, found = write(line[0]), line[1]
        over_B = ~going(loop)  # also where there is no photo
        row_B = jnp.where(over_B, loop.photo_B, batch)
        found = jax.tree.map(lambda of_all, of_some: of_all.at[row_B].set(of_some, mode="drop"), found, result(loop))
        next_B = jnp.where(over_B, loop.photo_B.max() + jnp.cumsum(over_B), loop.photo_B)
        return _where(over_B, begin(next_B), loop), found

    first = begin(jnp.arange(B))
    if B == batch:
        return result(jax.lax.while_loop(lambda loop: going(loop).any(), write, first))
    return jax.lax.while_loop(lambda line: (line[0].photo_B < batch).any(), write_in_line, (first, _nothing(batch, beam, T)))[1]


def likeliest(log_probs_XV: Array, count: int) -> Array:
    """The places of the `count` largest numbers along the last axis, largest first; the earlier one wins ties.

    As `jax.lax.top_k`, but of many words only those few blocks are looked through that can hold one of them: those whose
    largest number is among the `count` largest of all blocks'.
    """
    return platforms.dependent(log_probs_XV, cpu=functools.partial(_likeliest, count=count, block=CPU_BLOCK),
                               default=functools.partial(_likeliest, count=count, block=BLOCK))


def _likeliest(log_probs_XV: Array, count: int, block: int) -> Array:
    (*X, V), blocks = log_probs_XV.shape, -(-log_probs_XV.shape[-1] // block)
    if blocks < 2 * count:
        return jax.lax.top_k(log_probs_XV, count)[1]
    ragged = [(0, 0)] * len(X) + [(0, blocks * block - V)]
    largest_XS = jnp.pad(log_probs_XV, ragged, constant_values=NEVER).reshape(*X, blocks, block).max(axis=-1)
    chosen_XK = jnp.sort(jax.lax.top_k(largest_XS, count)[1])  # in their order, for the earlier of two that are alike to win
    places_XKP = chosen_XK[..., None] * block + jnp.arange(block)
    places_XC = places_XKP.reshape(*X, count * block)
    candidates_XC = jnp.take_along_axis(log_probs_XV, places_XC, axis=-1, mode="fill", fill_value=NEVER)
    picks_XK = jax.lax.top_k(candidates_XC, count)[1]
    return jnp.take_along_axis(places_XC, picks_XK, axis=-1)


def log_softmax(logits_NV: Array) -> Array:
    """Log-probabilities, float32. `jax.nn.log_softmax` takes the maximum from the logits first: XLA's CPU compiler makes that one
    routine with the product that they come from, which then takes half as long again."""
    logits_NV = logits_NV.astype(jnp.float32)
    return logits_NV - jax.nn.logsumexp(logits_NV, axis=-1, keepdims=True)


def score(log_probs: Array, length: Array | int, normalization: float) -> Array:
    """What captions are compared by: log-probability / length ** normalization."""
    return log_probs / jnp.float32(length) ** normalization if normalization else log_probs


def _best(captions: Captions, count: int) -> Captions:
    """The `count` best of a list, best first; the earlier one wins ties."""
    return ordered(captions, jax.lax.top_k(captions.scores_BK, count)[1])


def ordered(captions: Captions, order_BK: Array) -> Captions:
    """Those captions of each photo whose places `order_BK` names, in that order."""
    return jax.tree.map(
        lambda x: jnp.take_along_axis(x, order_BK.reshape(*order_BK.shape, *[1] * (x.ndim - 2)), axis=1), captions)


def _nothing(batch: int, beam: int, max_words: int) -> Captions:
    """`beam` captions of each photo that do not exist."""
    never_BK = jnp.full((batch, beam), NEVER, jnp.float32)
    return Captions(jnp.full((batch, beam, max_words), PAD, jnp.int32), never_BK, never_BK, jnp.zeros((batch, beam), bool))


def _rows(tree: PyTree, index_N: Array) -> PyTree:
    """Those rows of every array; a place without a photo gets the last one's."""
    return jax.tree.map(lambda x: x.at[index_N].get(mode="clip"), tree)


def _where(which_B: Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` for the photos that are meant, `old` for the others; leading axes are B, or a multiple: rows of a photo, side by side."""

    def choose(new, old):
        which_N = jnp.repeat(which_B, len(new) // len(which_B))
        return jnp.where(which_N.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, new, old)


def _side_by_side(*parts: PyTree) -> PyTree:
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=1), *parts)
