"""From photos or features to captions: the captioner and the search in one compiled function."""

import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcap import config as configs
from jaxcap import consensus, sampling, search
from jaxcap.captioner import Captioner
from jaxcap.data.augment import central_crop
from jaxcap.ensemble import Ensemble
from jaxcap.errors import UserError
from jaxcap.parallel import Parallel
from jaxcap.step import AXIS
from jaxcap.vocab import BOS, PAD, UNK, Vocab

PyTree = Any
WORDS = 5  # that most captions have, and more
LINE, LINE_BYTES = 16, 64 * 2**20  # photos that a CPU is given at once: so many batches, if their features take no more


@dataclass(frozen=True)
class Caption:
    """A caption with its score.

    log_prob: natural logarithm of its probability under the model, the end marker included.
    finished: False where it was cut at the longest length.
    """

    text: str
    log_prob: float
    finished: bool = True


def decoder(captioner: Captioner | Ensemble, settings: configs.Search, size: int | tuple[int, ...], parallel: Parallel,
            vocab: Vocab | None = None, places: int = 0) -> Callable[..., search.Captions]:
    """A compiled `decode(params, look, seen, first=0)` from uint8 photos or features to the captions of each.

    `look` is the frozen encoder that sees photos, as the function `look` gives it on the devices; features need none.
    Words that say nothing (padding, start, unknown) are never written. Where captions are drawn, `first` is the number of the
    first photo: what is written for a photo depends on the seed and its number, not on the batch or the devices.

    Args:
      size: side of the square that the encoder sees; for an ensemble a tuple, like all else with an item a member.
      vocab: needed where the settings name words. Raises `UserError` for one that it does not hold, and for settings that ask
        for coverage of a captioner that does not attend.
      places: how many of the photos that it is given a search sees at once, over all devices (`search.beam`); 0: all.
    """
    if settings.coverage and (isinstance(captioner, Ensemble) or not captioner.attends):
        raise UserError("search.coverage needs one model with attention: image-first models and ensembles look at no places")
    words = functools.partial(word_ids, vocab=vocab)
    rules = search.Rules((PAD, BOS, UNK, *words(settings.forbidden)), settings.min_words, settings.no_repeat_ngram)
    options = {"max_words": settings.max_words, "length_normalization": settings.length_normalization, "rules": rules}
    if settings.sample:
        options |= {"draws": settings.beam, "temperature": settings.temperature, "top_k": settings.top_k,
                    "nucleus": settings.nucleus}
    else:
        options |= {"beam": settings.beam, "must_contain": words(settings.must_contain), "groups": settings.groups,
                    "diversity": settings.diversity, "places": -(-places // parallel.size)}

    def decode(params, look, seen, first):
        context, state = captioner.start(params, _features(look, seen, size))
        batch, penalty = jax.tree.leaves(seen)[0].shape[0], None
        step = captioner.stepper(params, reads=batch * settings.beam * WORDS)
        if settings.coverage:
            step, penalty = covering(captioner, params, settings.coverage)
            state = state, jnp.zeros(context.keys_BPA.shape[:2])
        if settings.sample:
            number_B = first + jax.lax.axis_index(AXIS) * batch + jnp.arange(batch)
            key_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(settings.seed)))(number_B)
            return sampling.sample(step, context, state, key_B, **options)
        found = search.beam(step, context, state, batch=batch, penalty=penalty, **options)
        return consensus.rank(found) if settings.consensus else found

    compiled = parallel.wrap(decode, in_sharded=(False, False, True, False), out_sharded=True, typed=False)
    return lambda params, look, seen, first=0: compiled(params, look, seen, np.int32(first))


def look(captioner: Captioner | Ensemble, params: PyTree, batch_stats: PyTree, given: PyTree = None) -> PyTree:
    """The frozen encoder of a captioner, or a tuple of its members'; None where features are `given` and no photo is seen.

    It is made once for all batches: on an accelerator to fold batch norm takes as many kernels as to see photos.
    """
    if isinstance(captioner, Ensemble):
        return tuple(map(look, captioner.members, params, batch_stats, given or (None,) * len(captioner.members)))
    return captioner.folded(params, batch_stats) if given is None else None


def covering(captioner: Captioner, params: PyTree, weight: float) -> tuple[Callable, Callable]:
    """A step whose state also adds up what was attended to, [N, P], and for `search.beam` the penalty on what was left out.

    weight · mean_p log min(P · Σ_t α_tp, 1): the coverage penalty of Wu et al. 2016 (arXiv 1609.08144, eq. 14) made for maps,
    which have more places than captions have words. A place is covered once it got what one word gives it that looks at
    all places alike.
    """

    def step(context, state, token_N):
        inner, looked_NP = state
        inner, logits_NV, weights_NP = captioner.step_and_attention(params, context, inner, token_N)
        return (inner, looked_NP + weights_NP.astype(jnp.float32)), logits_NV

    def penalty(state):
        looked_NP = state[1] * state[1].shape[1]
        return weight * jnp.log(jnp.clip(looked_NP, 1e-6, 1.0)).mean(axis=1)

    return step, penalty


def word_ids(words: Sequence[str], vocab: Vocab | None) -> tuple[int, ...]:
    """The ids of single words. Raises `UserError` for one that is not in the vocabulary, naming those that are near."""
    ids = {}
    for word in words:
        tokens = vocab.tokenize(word)
        if len(tokens) != 1:
            raise UserError(f"{word!r} is {len(tokens)} words to this run's vocabulary; name single ones")
        if tokens[0] not in vocab.words:
            near = difflib.get_close_matches(tokens[0], vocab.words, n=3)
            raise UserError(f"{word!r} is not in the run's vocabulary of {len(vocab)} words"
                            + (f"; near it are {', '.join(near)}" if near else ""))
        ids[vocab.words.index(tokens[0])] = None
    return tuple(ids)


def _features(look, seen, size):
    if isinstance(seen, tuple):
        return tuple(map(_features, look or (None,) * len(seen), seen, size))
    return look(central_crop(seen, size)) if seen.ndim == 4 else seen


def captions(decode: Callable, params: PyTree, look: PyTree, vocab: Vocab, parallel: Parallel,
             batches: Iterable[tuple[PyTree, int]], first: int = 0) -> Iterator[list[Caption]]:
    """For every photo its captions, best first (drawn ones as drawn).

    `batches` yields `(photos or features, number that are real)`; their first photo has the number `first`. Raises `UserError`
    where the settings leave no caption to write.
    """
    pending = None
    for seen, real in batches:  # one batch late, so that the device decodes while the host spells
        decoded = decode(params, look, parallel.shard(seen), first), real
        first += real
        if pending:
            yield from _spell(*pending, vocab)
        pending = decoded
    if pending:
        yield from _spell(*pending, vocab)


def rows(array: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """`array` in batches of one size; its last rows are repeated to fill the last one."""
    for start in range(0, len(array), batch_size):
        part = np.asarray(array[start:start + batch_size])
        yield np.resize(part, (batch_size, *part.shape[1:])), len(part)


def in_line(batch_size: int, settings: configs.Search, parallel: Parallel, *features_NPF: np.ndarray | None) -> int:
    """How many photos to give at once to a `decoder` with `batch_size` places: all batches of one size.

    On CPUs, where a round of a search takes as long as there are captions in it, a photo that is done makes room for the next.
    """
    if settings.sample or parallel.platform != "cpu" or any(array is None for array in features_NPF):
        return batch_size
    count, nbytes = len(features_NPF[0]), sum(array.nbytes for array in features_NPF)
    most = max(min(LINE, LINE_BYTES * count // (nbytes * batch_size)), 1)
    batches = -(-count // batch_size)
    return batch_size * -(-batches // -(-batches // most))


def together(batches: Sequence[Iterable[tuple[np.ndarray, int]]]) -> Iterator[tuple[tuple[np.ndarray, ...], int]]:
    """The batches of an ensemble from those of its members."""
    for parts in zip(*batches):
        yield tuple(seen for seen, _ in parts), parts[0][1]


def _spell(found: search.Captions, real: int, vocab: Vocab) -> Iterator[list[Caption]]:
    found = jax.device_get(found)
    for tokens_KT, log_probs_K, finished_K in zip(found.tokens_BKT[:real], found.log_probs_BK, found.finished_BK):
        written = [Caption(vocab.decode(tokens), float(log_prob), bool(finished))
                   for tokens, log_prob, finished in zip(tokens_KT, log_probs_K, finished_K) if log_prob > -jnp.inf]
        if not written:
            raise UserError("no caption can be written: search.forbidden, no_repeat_ngram and min_words together leave no word")
        yield written
