"""Search against exhaustive enumeration and against im2txt's algorithm written out with lists."""

import collections
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcap import sampling, search
from jaxcap.search import Rules
from jaxcap.vocab import BOS, EOS, PAD


def step(context, state, token_N):
    """A language model that knows only the last two tokens: each row's state carries its own table of logits."""
    rows = jnp.arange(token_N.shape[0])
    return state | {"before": token_N}, state["table"][rows, state["before"], token_N]


@functools.cache
def compiled(**settings):
    return jax.jit(functools.partial(search.beam, step, (), **settings))


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


def im2txt_search(next_log_probs, row, K, longest, alpha, banned=lambda words: []):
    """The original algorithm, one caption at a time, over Python lists; `banned` words do not follow those of a caption."""
    partial, complete = [((), 0.0)], []
    for t in range(longest + 1):
        offers = []
        for words, log_prob in partial:
            p = next_log_probs(row, words).copy()
            p[[PAD, BOS, *banned(words)]] = -np.inf
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


def test_a_penalty_of_the_last_state_is_part_of_the_score():
    start, next_log_probs = table_model(jax.random.key(7), vocabulary=5)

    def counting(context, state, token_N):  # how often word 3 was read
        state, logits_NV = step(context, state, token_N)
        return state | {"threes": state["threes"] + (token_N == 3)}, logits_NV

    found = search.beam(counting, (), start | {"threes": jnp.zeros(2)}, batch=2, beam=8, max_words=2, penalty=lambda s: -3.0 * s["threes"])
    for row in range(2):
        scores = {words: total(next_log_probs, row, words) - 3 * words.count(3)
                  for n in range(3) for words in itertools.product([3, 4], repeat=n)}
        best = sorted(scores, key=lambda words: -scores[words])
        assert [words_of(t) for t in found.tokens_BKT[row][:7]] == best
        assert best != sorted(scores, key=lambda words: -total(next_log_probs, row, words))
        np.testing.assert_allclose(found.scores_BK[row, :7], [scores[words] for words in best], rtol=1e-5)
        np.testing.assert_allclose(found.log_probs_BK[row, 0], total(next_log_probs, row, best[0]), rtol=1e-5)


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


def told_step(context, state, token_N):
    """`step`, but the tables are what stays the same for a photo, shared by its captions; an end is likelier in some than in others."""
    tables_BVVV = context["table"]
    rows = jnp.arange(len(token_N)) // (len(token_N) // len(tables_BVVV))
    return {"before": token_N}, tables_BVVV[rows, state["before"], token_N]


@pytest.mark.parametrize(("places", "settings"), [
    (3, {}), (1, {"beam": 1}), (7, {"length_normalization": 0.7}), (5, {"beam": 4, "groups": 2}), (3, {"must_contain": (4, 6)}),
    (2, {"rules": Rules(min_words=2, no_repeat_ngram=2)}), (3, {"rules": Rules(forbidden=(PAD, BOS, EOS))}), (3, {"penalize": 4})])
def test_photos_in_line_get_the_captions_that_they_get_side_by_side(places, settings):
    settings = {"beam": 3, "max_words": 6} | settings
    if word := settings.pop("penalize", None):
        settings["penalty"] = lambda state: -1.0 * (state["before"] == word)
    start, _ = table_model(jax.random.key(5), vocabulary=7, rows=8)
    ends = jnp.linspace(-3.0, 4.0, 8)[jnp.array([3, 7, 0, 5, 2, 6, 1, 4])]  # some are done long before others
    context = {"table": start.pop("table").at[..., EOS].add(ends[:, None, None])}
    find = jax.jit(functools.partial(search.beam, told_step, batch=8, **settings), static_argnames="places")
    found, expected = find(context, start, places=places), find(context, start)
    lengths_B = (expected.tokens_BKT[:, 0] != PAD).sum(axis=1)
    assert len(set(lengths_B.tolist())) > 1 or EOS in settings.get("rules", Rules()).forbidden
    exists_BK = np.isfinite(expected.log_probs_BK)
    assert exists_BK.any(axis=1).all()
    for mine, theirs in zip(found, expected):
        np.testing.assert_array_equal(np.asarray(mine)[exists_BK], np.asarray(theirs)[exists_BK])
    np.testing.assert_array_equal(exists_BK, np.isfinite(found.log_probs_BK))


def test_a_photo_that_is_done_makes_room_for_the_next_one():
    calls = []

    def step(context, state, token_N):
        jax.debug.callback(lambda: calls.append(1))
        ends_BV = jnp.where(jnp.arange(5) == EOS, jnp.where(state == 0, 20.0, -20.0), jnp.where(jnp.arange(5) == 4, 1.0, 0.0))
        return state - 1, ends_BV

    words = jnp.array([[9], [2], [2], [2]])  # before each one's end
    found = search.beam(step, (), words, batch=4, places=2, beam=1, max_words=20)
    jax.effects_barrier()
    assert (found.tokens_BKT[:, 0] != PAD).sum(axis=1).tolist() == words[:, 0].tolist()
    assert len(calls) == 10  # while the first one is written, the three others are, one after another


def never_ending(vocabulary=5):
    logits = jnp.zeros(vocabulary).at[EOS].set(-1e9)
    return lambda context, state, token_N: (state, jnp.broadcast_to(logits, (token_N.shape[0], vocabulary)))


def test_what_never_finishes_is_returned_cut():
    found = search.beam(never_ending(), (), jnp.zeros((1, 1)), batch=1, beam=1, max_words=3)
    assert len(words_of(found.tokens_BKT[0, 0])) == 3
    assert not found.finished_BK[0, 0]
    assert np.isfinite(found.log_probs_BK[0, 0])


def test_stops_as_soon_as_nothing_can_improve():
    calls = []

    def step(context, state, token_N):
        jax.debug.callback(lambda: calls.append(1))
        logits = jnp.array([0.0, 0.0, 20.0, 0.0, 1.0])  # nearly always ends at once
        return state, jnp.broadcast_to(logits, (token_N.shape[0], 5))

    jax.block_until_ready(search.beam(step, (), jnp.zeros((1, 1)), batch=1, beam=1, max_words=50))
    jax.effects_barrier()
    assert len(calls) == 1


@pytest.mark.parametrize(("words", "count"), [(1000, 3), (1024, 1), (1025, 4), (2935, 10), (200, 3), (7, 7)])
def test_the_likeliest_words_are_those_of_top_k(words, count):
    random = np.random.default_rng(0)
    many = random.standard_normal((2, 4, words), np.float32)
    alike = random.integers(0, 3, (2, 4, words)).astype(np.float32)  # the earlier one of those that are alike
    few = np.where(random.random((2, 4, words)) < 1 / words, many, -np.inf)  # fewer than `count` that may be written
    few[0, 0], few[1, 1, -1] = -np.inf, 1.0
    for log_probs_BLV in (many, alike, few):
        expected = jax.lax.top_k(log_probs_BLV, count)[1]
        np.testing.assert_array_equal(search.likeliest(log_probs_BLV, count), expected)
        np.testing.assert_array_equal(search._likeliest(log_probs_BLV, count, search.BLOCK), expected)  # as on accelerators


def test_forbidden_words_are_not_written():
    start, _ = table_model(jax.random.key(1))
    found = compiled(batch=2, beam=4, max_words=5, rules=Rules(forbidden=(PAD, BOS, 4)))(start)
    assert not np.isin(found.tokens_BKT, [BOS, 4]).any()


def test_one_row_does_not_disturb_another():
    start, _ = table_model(jax.random.key(9), rows=3)
    together = compiled(batch=3, beam=3, max_words=5)(start)
    for row in range(3):
        alone = compiled(batch=1, beam=3, max_words=5)(jax.tree.map(lambda x: x[row:row + 1], start))
        np.testing.assert_array_equal(together.tokens_BKT[row], alone.tokens_BKT[0])


@pytest.mark.parametrize("n", [1, 2])
def test_words_in_a_row_and_short_captions_are_kept_out_as_by_a_list(n):
    start, next_log_probs = table_model(jax.random.key(2), vocabulary=8, rows=6)
    found = compiled(batch=6, beam=3, max_words=7, rules=Rules(min_words=4, no_repeat_ngram=n))(start)

    def banned(words):
        grams = {words[i:i + n] for i in range(len(words) - n + 1)}
        repeating = [w for w in range(8) if (*words, w)[-n:] in grams]
        return repeating + [EOS] * (len(words) < 4)

    plain = compiled(batch=6, beam=3, max_words=7)(start)
    assert (plain.tokens_BKT != found.tokens_BKT).any()
    for row in range(6):
        expected = im2txt_search(next_log_probs, row, 3, 7, 0.0, banned)
        real = np.isfinite(found.scores_BK[row])
        assert [words_of(t) for t in found.tokens_BKT[row][real]] == [words for words, _ in expected]
        for words in map(words_of, found.tokens_BKT[row][real]):
            grams = [words[i:i + n] for i in range(len(words) - n + 1)]
            assert len(words) >= 4 and len(set(grams)) == len(grams)


@pytest.mark.parametrize("off", [
    {"rules": Rules(no_repeat_ngram=6)},  # longer than any caption
    {"rules": Rules(min_words=0, no_repeat_ngram=0), "groups": 1, "diversity": 9.0, "must_contain": ()},
])
def test_options_that_change_nothing_leave_every_bit(off):
    start, _ = table_model(jax.random.key(8), rows=4)
    settings = {"batch": 4, "beam": 3, "max_words": 5, "length_normalization": 0.5}
    jax.tree.map(np.testing.assert_array_equal, compiled(**settings)(start), compiled(**settings, **off)(start))


def test_required_words_with_a_wide_beam_are_exhaustive_search():
    start, next_log_probs = table_model(jax.random.key(11), rows=3)
    found = compiled(batch=3, beam=40, max_words=3, must_contain=(5, 3))(start)
    everything = [words for n in range(4) for words in itertools.product([3, 4, 5], repeat=n) if {3, 5} <= set(words)]
    for row in range(3):
        best = sorted(everything, key=lambda words: -total(next_log_probs, row, words))
        assert [words_of(t) for t in found.tokens_BKT[row][np.isfinite(found.scores_BK[row])]] == best


def constrained_search(next_log_probs, row, K, longest, required):
    """Anderson et al.'s search over lists: K captions for each subset of the required words."""
    live, complete = {frozenset(): [((), 0.0)]}, []
    for t in range(longest + 1):
        offers = {}
        for subset, captions in live.items():
            for words, log_prob in captions:
                p = next_log_probs(row, words)
                free = [w for w in np.argsort(-p) if w not in (PAD, BOS, *required) and (w != EOS or subset == set(required))]
                for w in [*free[:K], *required]:
                    if w == EOS:
                        complete.append((words, log_prob + p[w]))
                    else:
                        offers.setdefault(subset | ({w} & set(required)), []).append(((*words, int(w)), log_prob + p[w]))
        complete = sorted(complete, key=lambda c: -c[1])[:K]
        if t < longest:
            live = {subset: sorted(captions, key=lambda c: -c[1])[:K] for subset, captions in offers.items()}
    return complete or live[frozenset(required)]


@pytest.mark.parametrize("required", [(6,), (7, 5, 4)])
def test_required_words_with_a_narrow_beam_are_the_search_over_lists(required):
    start, next_log_probs = table_model(jax.random.key(4), vocabulary=8, rows=5, sharpness=3.0)
    found = compiled(batch=5, beam=2, max_words=5, must_contain=required)(start)
    for row in range(5):
        expected = constrained_search(next_log_probs, row, 2, 5, required)
        real = np.isfinite(found.scores_BK[row])
        assert [words_of(t) for t in found.tokens_BKT[row][real]] == [words for words, _ in expected]
        np.testing.assert_allclose(found.log_probs_BK[row][real], [s for _, s in expected], rtol=1e-5)


def test_required_words_are_in_every_caption_also_where_they_fill_it_and_where_none_ends():
    start, _ = table_model(jax.random.key(6), vocabulary=9, rows=8, sharpness=4.0)
    found = compiled(batch=8, beam=2, max_words=3, must_contain=(4, 8, 6))(start)
    assert np.isfinite(found.log_probs_BK[:, 0]).all()
    for tokens_T in found.tokens_BKT[np.isfinite(found.log_probs_BK)]:
        assert {4, 8, 6} <= set(words_of(tokens_T))
    cut = search.beam(never_ending(6), (), jnp.zeros((1, 1)), batch=1, beam=2, max_words=3, must_contain=(3,))
    assert not cut.finished_BK.any() and all(3 in tokens_T for tokens_T in cut.tokens_BKT[0])


def diverse_search(next_log_probs, row, groups, width, longest, diversity):
    """Vijayakumar et al.'s search over lists, without an early stop."""
    live, complete = [[((), 0.0)] for _ in range(groups)], [[] for _ in range(groups)]
    for t in range(longest + 1):
        cost = np.zeros(len(next_log_probs(row, ())))
        for g in range(groups):
            offers = []
            for words, log_prob in live[g]:
                p = next_log_probs(row, words).copy()
                p[[PAD, BOS]] = -np.inf
                for w in np.argsort(-(p - cost))[:width]:
                    if w == EOS:
                        complete[g].append((words, log_prob + p[w]))
                    else:
                        offers.append(((*words, int(w)), log_prob + p[w], log_prob + p[w] - cost[w]))
            complete[g] = sorted(complete[g], key=lambda c: -c[1])[:width]
            live[g] = [offer[:2] for offer in sorted(offers, key=lambda c: -c[2])[:width]]
            for words, _ in live[g]:
                cost[words[-1]] += diversity
    return sorted((caption for captions in complete for caption in captions), key=lambda c: -c[1])


def test_diverse_groups_are_the_search_over_lists_and_differ():
    start, next_log_probs = table_model(jax.random.key(12), vocabulary=9, rows=6)
    found = compiled(batch=6, beam=6, max_words=4, groups=3, diversity=0.7)(start)
    for row in range(6):
        expected = diverse_search(next_log_probs, row, 3, 2, 4, 0.7)
        real = np.isfinite(found.scores_BK[row])
        assert [words_of(t) for t in found.tokens_BKT[row][real]] == [words for words, _ in expected]
        np.testing.assert_allclose(found.log_probs_BK[row][real], [s for _, s in expected], rtol=1e-5)

    def distinct(captions):
        return sum(len({words_of(t) for t in row}) for row in captions.tokens_BKT)

    assert distinct(compiled(batch=6, beam=2, max_words=4)(start)) + 6 < distinct(found)  # else all groups are one


@functools.cache
def drawn(**settings):
    return jax.jit(functools.partial(sampling.sample, step, (), **settings))


def keys(seed, rows):
    return jax.random.split(jax.random.key(seed), rows)


def chi_square(counts, p):
    """Pearson's statistic over its 99.9 % point (Wilson and Hilferty), so that a right sampler stays below 1."""
    expected, free = counts.sum() * p[p > 0], (p > 0).sum() - 1
    assert not counts[p == 0].any()
    if free == 0:
        return 0.0
    return ((counts[p > 0] - expected) ** 2 / expected).sum() / (free * (1 - 2 / (9 * free) + 3.09 * (2 / (9 * free)) ** 0.5) ** 3)


@pytest.mark.parametrize("settings", [
    {}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 4}, {"top_k": 1}, {"nucleus": 0.5}, {"nucleus": 0.9}, {"nucleus": 1e-6},
    {"temperature": 1.5, "top_k": 6, "nucleus": 0.8},
])
def test_draws_follow_the_distribution_that_was_asked_for(settings):
    log_probs_V = np.array(jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (10,)) * 1.5), np.float64)
    log_probs_V[3] = -np.inf
    p = np.exp(log_probs_V / settings.get("temperature", 1.0))
    order = np.argsort(-p)
    p[order[settings.get("top_k") or 10:]] = 0
    p /= p.sum()
    kept = next(n for n in range(1, 11) if p[order[:n]].sum() >= settings.get("nucleus", 1.0) - 1e-12)
    p[order[kept:]] = 0
    p /= p.sum()
    rows = 20_000
    words = sampling.draw(keys(1, rows), jnp.broadcast_to(jnp.float32(log_probs_V), (rows, 10)), **settings)
    assert chi_square(np.bincount(words, minlength=10), p) < 1


@pytest.mark.parametrize("words", [11, 300, 3000])
def test_the_same_words_are_drawn_as_jax_draws(words):
    log_probs_NV = 3 * jax.random.normal(jax.random.key(0), (64, words))
    log_probs_NV = log_probs_NV.at[:, 5].set(-jnp.inf)
    key, key_N = jax.random.key(1), jax.random.split(jax.random.key(2), 64)
    np.testing.assert_array_equal(sampling.categorical(key, log_probs_NV), jax.random.categorical(key, log_probs_NV))
    np.testing.assert_array_equal(sampling.draw(key_N, log_probs_NV), jax.vmap(jax.random.categorical)(key_N, log_probs_NV))


@pytest.mark.parametrize("sharp", [(6.0, 6.0), (6.0, 0.5)])  # the nucleus of the second row has over a thousand words
def test_a_nucleus_of_many_words_is_the_same_whether_few_or_all_are_sorted(sharp):
    log_probs_NV = jax.nn.log_softmax(jnp.array(sharp)[:, None] * jax.random.normal(jax.random.key(0), (2, 3000)))
    least = []
    for log_probs_V in np.asarray(log_probs_NV):
        ordered_V = np.sort(log_probs_V)[::-1]
        least.append(ordered_V[np.argmax(np.cumsum(np.exp(ordered_V, dtype=np.float64)) >= 0.9)])
    assert (np.sum(log_probs_NV[1] >= least[1]) > sampling.FEW) == (sharp[1] < 1)
    np.testing.assert_array_equal(sampling._least(log_probs_NV, 0.9), np.float32(least))


def test_drawn_captions_follow_the_model():
    start, next_log_probs = table_model(jax.random.key(7), vocabulary=5, rows=1, sharpness=1.0)
    found = jax.device_get(drawn(draws=20_000, max_words=2)(start, keys(3, 1)))
    captions = [(words_of(tokens_T), bool(end)) for tokens_T, end in zip(found.tokens_BKT[0], found.finished_BK[0])]
    cases = [(words, True) for n in range(3) for words in itertools.product([3, 4], repeat=n)]
    cases += [(words, False) for words in itertools.product([3, 4], repeat=2)]  # cut before their end

    def probability(words, end):
        p = 1.0
        for t, w in enumerate([*words, EOS]):
            q = np.exp(next_log_probs(0, words[:t]))[2:]  # without padding and start, renormalized
            p *= q[w - 2] / q.sum() if end or t < 2 else 1 - q[0] / q.sum()
        return p

    counts = collections.Counter(captions)
    assert chi_square(np.array([counts[case] for case in cases]), np.array([probability(*case) for case in cases])) < 1
    for k in range(50):
        words, end = captions[k]
        expected = total(next_log_probs, 0, words) - (0 if end else next_log_probs(0, words)[EOS])
        assert math.isclose(found.log_probs_BK[0, k], expected, rel_tol=1e-5)


def test_drawing_the_likeliest_word_is_greedy_search_and_rows_are_their_keys():
    start, _ = table_model(jax.random.key(3), vocabulary=8, rows=6)
    rules = Rules(min_words=2, no_repeat_ngram=1)
    greedy = compiled(batch=6, beam=1, max_words=6, rules=rules)(start)
    found = drawn(max_words=6, top_k=1, rules=rules)(start, keys(0, 6))
    np.testing.assert_array_equal(found.tokens_BKT, greedy.tokens_BKT)
    np.testing.assert_array_equal(found.finished_BK, greedy.finished_BK)
    np.testing.assert_allclose(found.log_probs_BK, greedy.log_probs_BK, rtol=1e-6)
    ruled = drawn(draws=5, max_words=6, rules=rules)
    together = ruled(start, keys(5, 6))
    alone = ruled(jax.tree.map(lambda x: x[2:4], start), keys(5, 6)[2:4])
    np.testing.assert_array_equal(together.tokens_BKT[2:4], alone.tokens_BKT)
    assert (together.tokens_BKT != ruled(start, keys(6, 6)).tokens_BKT).any()
    for words in map(words_of, together.tokens_BKT.reshape(-1, 6)):
        assert len(words) >= 2 and len(set(words)) == len(words) and BOS not in words
