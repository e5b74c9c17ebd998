"""The caption that the others agree with: agreement by counting, the order, and the flag."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcap import config, consensus
from jaxcap.errors import UserError
from jaxcap.search import Captions
from jaxcap.vocab import EOS, PAD


def counted(one: list[int], other: list[int]) -> float:
    """The agreement of two captions, with dictionaries."""
    total = 0.0
    for n in range(1, 5):
        a, b = (collections.Counter(tuple(text[i:i + n]) for i in range(len(text) - n + 1)) for text in (one, other))
        total += 2 * (a & b).total() / max(a.total() + b.total(), 1)
    return total / 4


def beam_of(texts: list[list[int]], scores: list[float], finished: list[bool] | None = None, longest: int = 9) -> Captions:
    """The captions of one photo."""
    tokens_BKT = np.full((1, len(texts), longest), PAD, np.int32)
    for row, text in zip(tokens_BKT[0], texts):
        row[:len(text)] = text
    scores_BK = jnp.array([scores], jnp.float32)
    return Captions(jnp.asarray(tokens_BKT), scores_BK, scores_BK, jnp.array([finished or [True] * len(texts)]))


@pytest.mark.parametrize("seed", range(5))
def test_agreement_is_the_f_measure_of_ngrams(seed):
    """Few words, so that many stand in a caption several times; captions of no word up to the longest, some cut."""
    random = np.random.default_rng(seed)
    texts = [random.integers(4, 8, length).tolist() for length in [0, 1, 9, *random.integers(2, 10, 5)]]
    finished = [True, True, False, *(random.random(5) < 0.8).tolist()]
    beam = beam_of(texts, [0.0] * 8, finished)
    found = jax.jit(consensus.agreement)(beam.tokens_BKT, beam.finished_BK)
    ended = [text + [EOS] * end for text, end in zip(texts, finished)]
    np.testing.assert_allclose(found[0], [[counted(a, b) for b in ended] for a in ended], rtol=1e-6)
    whole = found[0].diagonal()[np.array([len(text) > 3 for text in ended])]
    np.testing.assert_allclose(whole, 1, rtol=1e-6)  # a caption of four words or more agrees with itself


def test_what_several_say_is_written_instead_of_what_is_likeliest():
    short, dog, brown, big = [5, 6], [5, 7, 8, 9, 10], [5, 11, 7, 8, 9, 10], [5, 12, 7, 8, 9, 13]
    ranked = consensus.rank(beam_of([short, dog, brown, big], [-1.0, -1.2, -1.2, -1.2]))
    assert ranked.tokens_BKT[0, 0, :5].tolist() == dog  # nearest to both longer ones
    assert ranked.tokens_BKT[0, -1, :2].tolist() == short
    assert ranked.log_probs_BK[0].tolist() == pytest.approx([-1.2, -1.2, -1.2, -1.0])
    sure = consensus.rank(beam_of([short, dog, brown, big], [0.0, -9.0, -9.0, -9.0]))
    assert sure.tokens_BKT[0, 0, :2].tolist() == short  # what is nearly certain needs no other's consent


def test_places_without_a_caption_stay_last():
    beam = beam_of([[5, 6, 7, 8], [], []], [-1.0, -jnp.inf, -jnp.inf], [True, False, False])
    ranked = consensus.rank(beam)
    jax.tree.map(np.testing.assert_array_equal, ranked, beam)
    alone = beam_of([[5, 6, 7, 8]], [-1.0])
    jax.tree.map(np.testing.assert_array_equal, consensus.rank(alone), alone)


def test_drawn_captions_are_not_ranked():
    with pytest.raises(UserError, match="search.consensus .* search.sample"):
        config.load(None, ["search.consensus=true", "search.sample=true"])
