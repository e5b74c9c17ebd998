"""Search against exhaustive enumeration and against im2txt's algorithm written out with lists."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcap import search
from jaxcap.vocab import BOS, EOS, PAD


def step(state, token_N):
    """A language model that knows only the last two tokens: each row's state carries its own table of logits."""
    rows = jnp.arange(token_N.shape[0])
    return state | {"before": token_N}, state["table"][rows, state["before"], token_N]


@functools.cache
def compiled(**settings):
    return jax.jit(functools.partial(search.beam, step, **settings))


def table_model(key, vocabulary=6, rows=2, sharpness=2.0):
    logits = jax.random.normal(key, (rows, vocabulary, vocabulary, vocabulary)) * sharpness
    start = {"table": logits, "before": jnp.full((rows,), PAD)}
    log_probs = np.asarray(jax.nn.log_softmax(logits))

    def next_log_probs(row, words):
        before, last = ([PAD, BOS] + list(words))[-2:]
        return log_probs[row, before, last]

    return start, next_log_probs


def total(next_log_probs, row, words):
    return sum(next_log_probs(row, words[:t])[w] for t, w in enumerate([*words, EOS]))


def im2txt_search(next_log_probs, row, K, longest, alpha):
    """The original algorithm, one caption at a time, over Python lists."""
    partial, complete = [((), 0.0)], []
    for t in range(longest + 1):
        offers = []
        for words, log_prob in partial:
            p = next_log_probs(row, words).copy()
            p[[PAD, BOS]] = -np.inf
            for w in np.argsort(-p)[:K]:
                if not np.isfinite(p[w]):
                    continue
                if w == EOS:
                    complete.append((words, (log_prob + p[w]) / (len(words) + 1) ** alpha))
                elif t < longest:
                    offers.append(((*words, int(w)), log_prob + p[w]))
        complete = sorted(complete, key=lambda c: -c[1])[:K]
        if t == longest:
            break
        partial = sorted(offers, key=lambda c: -c[1])[:K]
        if not partial:
            break
    return complete or [(words, log_prob / max(len(words), 1) ** alpha) for words, log_prob in partial]


def words_of(tokens_T):
    return tuple(int(w) for w in tokens_T if w != PAD)


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_equals_im2txts_algorithm(K, alpha, seed):
    start, next_log_probs = table_model(jax.random.key(seed))
    found = compiled(batch=2, beam=K, max_words=4, length_normalization=alpha)(start)
    for row in range(2):
        expected = im2txt_search(next_log_probs, row, K, 4, alpha)
        real = np.isfinite(found.scores_BK[row])
        assert [words_of(t) for t in found.tokens_BKT[row][real]] == [words for words, _ in expected]
        np.testing.assert_allclose(found.scores_BK[row][real], [s for _, s in expected], rtol=1e-5)


def test_a_wide_beam_is_exhaustive_search():
    start, next_log_probs = table_model(jax.random.key(7), vocabulary=5)
    found = compiled(batch=2, beam=8, max_words=2)(start)
    for row in range(2):
        everything = [words for n in range(3) for words in itertools.product([3, 4], repeat=n)]
        best = sorted(everything, key=lambda words: -total(next_log_probs, row, words))
        assert [words_of(t) for t in found.tokens_BKT[row][:7]] == best


def test_beam_one_is_greedy():
    start, next_log_probs = table_model(jax.random.key(3))
    found = compiled(batch=2, beam=1, max_words=6)(start)
    for row in range(2):
        words = []
        while len(words) < 6:
            p = next_log_probs(row, words).copy()
            p[[PAD, BOS]] = -np.inf
            if p.argmax() == EOS:
                break
            words.append(int(p.argmax()))
        assert words_of(found.tokens_BKT[row, 0]) == tuple(words)


def test_log_probs_are_those_of_the_captions():
    start, next_log_probs = table_model(jax.random.key(5))
    found = compiled(batch=2, beam=3, max_words=5, length_normalization=1.0)(start)
    for row in range(2):
        assert found.finished_BK[row, 0]
        for k in np.flatnonzero(found.finished_BK[row]):
            words = words_of(found.tokens_BKT[row, k])
            expected = total(next_log_probs, row, words)
            assert math.isclose(found.log_probs_BK[row, k], expected, rel_tol=1e-5)
            assert math.isclose(found.scores_BK[row, k], expected / (len(words) + 1), rel_tol=1e-5)


def never_ending(vocabulary=5):
    logits = jnp.zeros(vocabulary).at[EOS].set(-1e9)
    return lambda state, token_N: (state, jnp.broadcast_to(logits, (token_N.shape[0], vocabulary)))


def test_what_never_finishes_is_returned_cut():
    found = search.beam(never_ending(), jnp.zeros((1, 1)), batch=1, beam=1, max_words=3)
    assert len(words_of(found.tokens_BKT[0, 0])) == 3
    assert not found.finished_BK[0, 0]
    assert np.isfinite(found.log_probs_BK[0, 0])


def test_stops_as_soon_as_nothing_can_improve():
    calls = []

    def step(state, token_N):
        jax.debug.callback(lambda: calls.append(1))
        logits = jnp.array([0.0, 0.0, 20.0, 0.0, 1.0])  # nearly always ends at once
        return state, jnp.broadcast_to(logits, (token_N.shape[0], 5))

    jax.block_until_ready(search.beam(step, jnp.zeros((1, 1)), batch=1, beam=1, max_words=50))
    jax.effects_barrier()
    assert len(calls) == 1


def test_forbidden_words_are_not_written():
    start, _ = table_model(jax.random.key(1))
    found = compiled(batch=2, beam=4, max_words=5, forbidden=(PAD, BOS, 4))(start)
    assert not np.isin(found.tokens_BKT, [BOS, 4]).any()


def test_one_row_does_not_disturb_another():
    start, _ = table_model(jax.random.key(9), rows=3)
    together = compiled(batch=3, beam=3, max_words=5)(start)
    for row in range(3):
        alone = compiled(batch=1, beam=3, max_words=5)(jax.tree.map(lambda x: x[row:row + 1], start))
        np.testing.assert_array_equal(together.tokens_BKT[row], alone.tokens_BKT[0])
