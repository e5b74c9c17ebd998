"""The reward of self-critical training: CIDEr-D of captions that the model draws, computed where it draws them.

Self-critical sequence training (Rennie et al. 2017, arXiv 1612.00563): captions are drawn, and their probability is raised by as
much as their CIDEr-D is above a baseline. Drawing, scoring and the baseline are one program on the device, so that nothing
waits for the host and captions are never older than the parameters that learn from them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcap import cider, sampling, search
from jaxcap import config as configs
from jaxcap.captioner import Captioner
from jaxcap.losses import FORBIDDEN
from jaxcap.vocab import BOS, EOS, PAD

PyTree = Any
# A word ends no caption if it is read so often and stands at the end of fewer than one caption in so many times that it is read.
SEEN, RARELY = 200, 500
LONGEST = 60  # words of a reference that count


class Level(NamedTuple):
    """The n-grams of one length: those that extend n-gram p of the level before are rows start_P[p] to start_P[p + 1]."""

    start_P: Array
    last_K: Array  # their last words, rising within a row range
    idf_K: Array


class References(NamedTuple):
    """What drawn captions are held against, arrays for the device.

    tokens_RT: int32 references, without BOS, with EOS. norms_RO: length of each reference's TF-IDF vector by order.
    first_N, count_N: the references of a photo are rows first to first + count - 1; mask_C: as many as any photo has.
    unseen: idf of an n-gram that stands nowhere. never_last_V, mark_V: which words end no caption, and which are marks (".").
    """

    tokens_RT: Array
    norms_RO: Array
    first_N: Array
    count_N: Array
    mask_C: Array
    levels: tuple[Level, ...]
    unseen: Array
    never_last_V: Array
    mark_V: Array


def references(captions: Sequence[Sequence[Sequence[int]]], words: Sequence[str]) -> References:
    """Counts the references of a split's photos, each `[BOS, …, EOS]` as `Vocab.encode` gives them.

    The end marker is a word like any other: without it a caption that breaks off would cost nothing. Raises `ValueError` for a
    photo without a reference.
    """
    counted = cider.CiderD([[text[1:] for text in texts] for texts in captions])
    levels, before = [], 1
    for keys, idf in zip(counted.keys, counted.idf):
        start_P = np.searchsorted(keys, np.arange(before + 1) * counted.base)
        levels.append(Level(start_P.astype(np.int32), (keys % counted.base).astype(np.int32), idf.astype(np.float32)))
        before = len(keys)
    mark_V = np.array([not any(letter.isalnum() for letter in word) for word in words])
    mark_V[[PAD, BOS, EOS]] = True
    seen_V, last_V = np.zeros(len(words), np.int64), np.zeros(len(words), np.int64)
    for text in (np.asarray(text) for texts in captions for text in texts):
        said = text[~mark_V[text]]
        np.add.at(seen_V, said, 1)
        last_V[said[-1:]] += 1
    return References(
        np.where(counted.tokens_RT < 0, cider.OTHER, counted.tokens_RT).astype(np.int32), counted.norm_RO.astype(np.float32),
        counted.first_N.astype(np.int32), counted.count_N.astype(np.int32), np.arange(counted.count_N.max(), dtype=np.int32),
        tuple(levels), np.float32(counted.unseen), (seen_V >= SEEN) & (last_V * RARELY < seen_V), mark_V)


def cider_d(of: References, tokens_NT: Array, photo_N: Array) -> Array:
    """CIDEr-D [N] of captions, EOS included and then PAD, against the references of their photos.

    Computes what `cider.CiderD` does, in float32.
    """
    tokens_NT = jnp.where(tokens_NT == PAD, cider.NO_WORD, tokens_NT)
    count_N = of.count_N[photo_N]
    row_NC = of.first_N[photo_N][:, None] + jnp.minimum(of.mask_C, count_N[:, None] - 1)
    other_NCT = of.tokens_RT[row_NC]
    here = cider.same_ngrams(tokens_NT, jnp.where(tokens_NT < 0, cider.OTHER, tokens_NT))
    there = cider.same_ngrams(tokens_NT[:, None], other_NCT)
    ids_NT, dots, squares = jnp.zeros_like(tokens_NT), [], []
    for n, (level, same_NTT, same_NCTT) in enumerate(zip(of.levels, here, there)):
        ids_NT, idf_NT = _find(level, ids_NT[:, :tokens_NT.shape[1] - n], tokens_NT[:, n:], of.unseen)
        count_NT, in_other_NCT = same_NTT.sum(axis=2), same_NCTT.sum(axis=3)
        squares.append(jnp.sum(count_NT * idf_NT**2, axis=1))
        weight_NT = idf_NT**2 / jnp.maximum(count_NT, 1)
        dots.append(jnp.sum(jnp.minimum(count_NT[:, None], in_other_NCT) * in_other_NCT * weight_NT[:, None], axis=2))
    norms_NCO = jnp.sqrt(jnp.stack(squares, axis=-1))[:, None] * of.norms_RO[row_NC]
    similar_NC = jnp.mean(jnp.where(norms_NCO > 0, jnp.stack(dots, axis=-1) / jnp.where(norms_NCO > 0, norms_NCO, 1), 0), axis=2)
    length_N, length_NC = jnp.sum(tokens_NT >= 0, axis=1), jnp.sum(other_NCT >= 0, axis=2)
    difference_NC = jnp.maximum(length_N, 1)[:, None] - jnp.maximum(length_NC, 1)
    similar_NC *= jnp.exp(-(difference_NC**2) / (2 * cider.SIGMA**2))
    return 10 * jnp.sum(jnp.where(of.mask_C < count_N[:, None], similar_NC, 0), axis=1) / count_N


def _find(level: Level, ids_NT: Array, last_NT: Array, unseen: Array) -> tuple[Array, Array]:
    """Ids of the n-grams that extend `ids_NT` by `last_NT`, -1 where no reference holds one, and their idf: a binary search."""
    known_NT = (ids_NT >= 0) & (last_NT >= 0)
    low_NT, high_NT = level.start_P[jnp.maximum(ids_NT, 0)], level.start_P[jnp.maximum(ids_NT, 0) + 1]
    end_NT, rows = high_NT, level.last_K.shape[0]
    if not rows:
        return jnp.full_like(ids_NT, -1), jnp.full(ids_NT.shape, unseen)
    for _ in range(rows.bit_length()):
        middle_NT = (low_NT + high_NT) // 2
        right_NT = level.last_K[jnp.minimum(middle_NT, rows - 1)] < last_NT
        open_NT = low_NT < high_NT
        low_NT, high_NT = jnp.where(open_NT & right_NT, middle_NT + 1, low_NT), jnp.where(open_NT & ~right_NT, middle_NT, high_NT)
    place_NT = jnp.minimum(low_NT, rows - 1)
    found_NT = known_NT & (low_NT < end_NT) & (level.last_K[place_NT] == last_NT)
    return jnp.where(found_NT, place_NT, -1), jnp.where(found_NT, level.idf_K[place_NT], unseen)


def broken(of: References, tokens_NT: Array) -> Array:
    """Which captions [N] no one would write: cut before their end, ending in a word that ends none ("a man in a"), or with a word
    twice in a row or three words in a row twice. They earn nothing, whatever their CIDEr-D.
    """
    ended_N = jnp.any(tokens_NT == EOS, axis=1)
    said_NT = ~of.mark_V[tokens_NT]
    place_N = jnp.max(jnp.where(said_NT, jnp.arange(tokens_NT.shape[1]), 0), axis=1)
    last_N = jnp.take_along_axis(tokens_NT, place_N[:, None], axis=1)[:, 0]
    return ~ended_N | (said_NT.any(axis=1) & of.never_last_V[last_N]) | _repeats(tokens_NT, 1, 2) | _repeats(tokens_NT, 3, 0)


def _repeats(tokens_NT: Array, n: int, within: int) -> Array:
    """Whether n words in a row stand twice in a caption, less than `within` places apart; 0: anywhere."""
    places = tokens_NT.shape[1] - n + 1
    if places < 2:
        return jnp.zeros(tokens_NT.shape[0], bool)
    runs = jnp.stack([tokens_NT[:, i:i + places] for i in range(n)], axis=-1)
    same_NTT = jnp.all(runs[:, :, None] == runs[:, None], axis=-1) & (tokens_NT[:, n - 1:] != PAD)[:, :, None]
    apart = jnp.arange(places)[None] - jnp.arange(places)[:, None]
    return jnp.any(same_NTT & (apart > 0) & ((apart < within) if within else True), axis=(1, 2))


def reward(of: References, tokens_NT: Array, photo_N: Array) -> Array:
    """CIDEr-D [N] of captions, 0 for those that are `broken`."""
    return jnp.where(broken(of, tokens_NT), 0.0, cider_d(of, tokens_NT, photo_N))


def draw(captioner: Captioner, params: PyTree, features_BPF: Array, photo_B: Array, key: Array, of: References, *,
         settings: configs.Reward, max_words: int) -> tuple[Array, Array, Array]:
    """Draws captions and rewards them: `(tokens_NT1, reward_N, baseline_N)` with N = B · samples, those of a photo side by side.

    tokens_NT1: int32 [N, max_words + 2], BOS … EOS PAD, as training reads them. baseline_N: with "others", the mean reward of
    the photo's other drawn captions (Luo 2020, arXiv 2003.09971); with "greedy", the reward of the caption of likeliest
    words, as in the first paper.
    """
    batch, samples = features_BPF.shape[0], settings.samples
    context, state = captioner.start(params, features_BPF)
    rules, step = search.Rules(FORBIDDEN), captioner.stepper(params)

    def rewarded(found: search.Captions) -> tuple[Array, Array]:
        words_NT, finished_N = found.tokens_BKT.reshape(-1, max_words), found.finished_BK.reshape(-1)
        words_NT = jnp.pad(words_NT, ((0, 0), (0, 1)))
        length_N = jnp.sum(words_NT != PAD, axis=1)
        ends_NT = (jnp.arange(max_words + 1) == length_N[:, None]) & finished_N[:, None]
        tokens_NT = jnp.where(ends_NT, EOS, words_NT)
        photo_N = jnp.repeat(photo_B, tokens_NT.shape[0] // batch)
        return tokens_NT, reward(of, tokens_NT, photo_N)

    key_B = jax.random.split(key, batch)
    tokens_NT, reward_N = rewarded(sampling.sample(step, context, state, key_B, draws=samples, max_words=max_words, rules=rules))
    if settings.baseline == "greedy":
        _, greedy_B = rewarded(search.beam(step, context, state, batch=batch, beam=1, max_words=max_words, rules=rules))
        baseline_N = jnp.repeat(greedy_B, samples)
    else:
        reward_BK = reward_N.reshape(batch, samples)
        baseline_N = ((reward_BK.sum(axis=1, keepdims=True) - reward_BK) / (samples - 1)).reshape(-1)
    return jnp.pad(tokens_NT, ((0, 0), (1, 0)), constant_values=BOS), reward_N, baseline_N
