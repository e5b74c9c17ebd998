"""The reward of self-critical training, and training with it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcap import captioner as captioners
from jaxcap import cider, config, losses, optim, reward, vocab
from jaxcap import step as steps
from jaxcap.errors import UserError
from jaxcap.parallel import Parallel
from jaxcap.vocab import BOS, EOS, PAD

WORDS = (*vocab.SPECIAL, ".", *"abcdefgh")


def references(texts):
    return reward.references([[[BOS, *text, EOS] for text in photo] for photo in texts], WORDS)


def drawn(seed, photos=30, captions=120, words=12):
    """Photos with one to five references of 0 to 12 words, and captions for them, ids 4 … words."""
    random = np.random.default_rng(seed)

    def text():
        return random.integers(4, words + 1, random.integers(0, 13)).tolist()

    return ([[text() for _ in range(random.integers(1, 6))] for _ in range(photos)], [text() for _ in range(captions)],
            random.integers(0, photos, captions))


def test_equals_the_metric_on_random_captions():
    texts, captions, photo_N = drawn(0)
    expected = cider.CiderD([[[*text, EOS] for text in photo] for photo in texts])([[*c, EOS] for c in captions], photo_N)
    tokens_NT = vocab.pad([[*c, EOS] for c in captions], 14)
    found = jax.jit(reward.cider_d)(references(texts), tokens_NT, photo_N)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
    assert expected.max() > 1


def test_equals_coco_caption_on_real_captions(shared):
    scorer = pytest.importorskip("pycocoevalcap.cider.cider", reason="pycocoevalcap is not installed").Cider()
    lines = shared("flickr8k", "Flickr8k_text", "Flickr8k.token.txt").read_text("utf-8").splitlines()[:5000]
    texts = [line.split("\t")[1] for line in lines]
    words = vocab.build(texts)
    encoded = [[words.encode(text, 60) for text in texts[i:i + 5]] for i in range(0, len(texts), 5)]
    captions, photos = [photo[0] for photo in encoded], [photo[1:] for photo in encoded]  # the first against the others
    spelled = {i: [" ".join(map(str, text[1:])) for text in photo] for i, photo in enumerate(photos)}
    _, expected = scorer.compute_score(spelled, {i: [" ".join(map(str, c[1:]))] for i, c in enumerate(captions)})
    tokens_NT = vocab.pad([c[1:] for c in captions], 61)
    of = reward.references(photos, words.words)
    score = jax.jit(reward.cider_d)
    found = np.concatenate([score(of, tokens_NT[i:i + 100], np.arange(i, i + 100)) for i in range(0, 1000, 100)])
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-6)
    assert expected.mean() > 0.5


def test_captions_that_nobody_would_write():
    # "a" is read 300 times and ends no reference; "b" ends all of them, with or without a mark after it.
    of = references([[[5, 6, 4], [5, 6]]] * 150 + [[[8, 9]]] * 10)
    a, b, c, d, mark = 5, 6, 7, 8, 4
    sound = [[a, b], [a, b, mark], [], [mark], [a, b, c, a, b], [c, b, a, b, d, b]]
    broken = [[b, a], [b, a, mark], [a, a, b], [a, b, c, d, a, b, c, b]]
    found = reward.broken(of, vocab.pad([[*text, EOS] for text in sound + broken], 12))
    np.testing.assert_array_equal(found, [False] * len(sound) + [True] * len(broken))
    assert reward.broken(of, jnp.array([[a, b, b + 1]]))[0]  # cut: no end marker
    earned = reward.reward(of, vocab.pad([[a, b, EOS], [a, b], [b, a, EOS]], 12), np.array([0, 0, 0]))
    assert earned[0] > 0 and earned[1] == earned[2] == 0


def test_the_gradient_is_that_of_the_expected_reward():
    """With every caption of one word and its probability and reward known, the mean over draws tends to the exact gradient."""
    logits_V = jnp.array([9.0, 9.0, 0.3, 9.0, 0.5, -0.4, 0.2])  # PAD, BOS and UNK are never drawn, however likely
    reward_V = jnp.array([0.0, 0.0, 1.0, 0.0, 3.0, 0.5, 2.0])
    allowed = jnp.array([2, 4, 5, 6])

    def expected(logits_V):
        return -jnp.sum(jax.nn.softmax(logits_V[allowed]) * reward_V[allowed])

    N = 40_000
    word_N = allowed[jax.random.categorical(jax.random.key(0), logits_V[allowed], shape=(N,))]

    def objective(logits_V):
        nats, total = losses.policy_sums(jnp.ones((1, N, 1)), jnp.zeros((1, 7)), logits_V, word_N[None], reward_V[word_N] - 1.5)
        return total / N

    found, exact = jax.grad(objective)(logits_V), jax.grad(expected)(logits_V)
    np.testing.assert_allclose(found, exact, atol=0.02)
    assert float(jnp.abs(exact).max()) > 0.2


def test_the_policy_gradient_is_that_of_whole_logits_and_padding_is_never_projected(monkeypatch):
    random = np.random.default_rng(0)
    T, B, W, V, advantage_B = 9, 6, 5, 12, jnp.array([0.5, -1.0, 2.0, 0.0, -0.3, 1.0])
    given = [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((T, B, W), (W, V), V)]
    lengths_B = np.array([1, 3, 2, 9, 1, 2])
    targets_TB = jnp.asarray(np.where(np.arange(T)[:, None] < lengths_B, random.choice([EOS, *range(4, V)], (T, B)), PAD))

    def plain(outputs_TBW, kernel_WV, bias_V):
        logits_TBV = (outputs_TBW @ kernel_WV + bias_V).at[:, :, jnp.array(losses.FORBIDDEN)].set(-jnp.inf)
        log_probs_TB = jnp.take_along_axis(
            jax.nn.log_softmax(logits_TBV), jnp.where(targets_TB == PAD, EOS, targets_TB)[..., None], axis=2)[..., 0]
        nats_TB = jnp.where(targets_TB == PAD, 0, -log_probs_TB)
        return 3 * jnp.sum(nats_TB * advantage_B), jnp.sum(nats_TB)

    chunks, logits = [], losses._logits

    def counted(*arguments):
        jax.debug.callback(lambda: chunks.append(1))
        return logits(*arguments)

    def found(*given):
        nats, objective = losses.policy_sums(*given, targets_TB, advantage_B)
        return 3 * objective, nats

    monkeypatch.setattr(losses, "_logits", counted)
    for size, filled in ((7, 3), (100, 1)):  # 18 of 54 tokens are words
        monkeypatch.setattr(losses, "CHUNK", size)
        chunks.clear()
        results = [jax.jit(jax.value_and_grad(objective, (0, 1, 2), has_aux=True))(*given) for objective in (plain, found)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
        jax.effects_barrier()
        assert len(chunks) == filled
        np.testing.assert_allclose(found(*given), plain(*given), rtol=1e-6)


def tiny(**changes):
    phase = dataclasses.replace(config.Phase(objective="reward", steps=40, optim=config.Optim(name="adam", learning_rate=0.05)), **changes)
    return config.Config(decoder=config.Decoder(embedding=8, hidden=12, dropout=0.3), phases=(phase,))


def train(configuration, mode="shard_map", devices=1, count=40):
    """Mean rewards of `count` steps on four photos whose features differ and whose references are one caption each."""
    phase, photos = configuration.phases[0], 8
    captioner = captioners.build(configuration, len(WORDS))
    texts = [[[4 + i, 5 + (i + 3) % 8, 4 + (i + 5) % 8]] for i in range(photos)]
    captioner = dataclasses.replace(captioner, decoder=captioner.decoder.clone(features=photos))
    params = {"encoder": {}, "decoder": captioner.decoder.init(
        jax.random.key(0), jnp.zeros((1, 1, photos)), jnp.zeros((1, 1), jnp.int32))["params"]}
    on = Parallel(mode, jax.devices()[:devices])
    optimizer = optim.optimizer(phase.optim, optim.schedule(phase.optim, count, 1))
    state = steps.TrainState(jnp.int32(0), params, {}, optimizer.init({"decoder": params["decoder"]}), jax.random.PRNGKey(1))
    state, of, table = on.replicate((state, references(texts), 3 * np.eye(photos, dtype=np.float32)[:, None]))
    common = {"captioner": captioner, "phase": phase, "augment": None}
    draw = on.wrap(functools.partial(steps.draw_step, max_words=4, **common), in_sharded=(False, True, False, False),
                   out_sharded=True, typed=False)
    step = on.wrap(functools.partial(steps.train_step, optimizer=optimizer, **common), in_sharded=(False, True, False))
    rows = np.arange(photos, dtype=np.int32)
    batch = on.shard(steps.Batch(tokens_BT1=np.zeros((photos, 6), np.int32), index_B=rows, photo_B=rows))
    rewards = []
    for _ in range(count):
        taught = draw(state, batch, table, of)
        state, metrics = step(state, taught, table)
        rewards.append(float(metrics.reward))
    return rewards, taught, state


@pytest.mark.parametrize("baseline", ["others", "greedy"])
def test_captions_earn_more_and_more(baseline):
    rewards, taught, _ = train(tiny(reward=config.Reward(samples=6, baseline=baseline)), count=100)
    assert np.mean(rewards[-5:]) > 4 * np.mean(rewards[:5]) and np.mean(rewards[-5:]) > 1
    tokens_BT1 = np.asarray(taught.tokens_BT1)
    assert tokens_BT1.shape == (48, 6) and (tokens_BT1[:, 0] == BOS).all()
    assert not np.isin(tokens_BT1[:, 1:], [BOS, vocab.UNK]).any()


def test_the_baseline_is_the_mean_of_the_others():
    _, taught, _ = train(tiny(reward=config.Reward(samples=3)), count=1)
    reward_BK, baseline_BK = (np.asarray(x).reshape(-1, 3) for x in (taught.reward_B, taught.baseline_B))
    np.testing.assert_allclose(baseline_BK[:, 1], (reward_BK[:, 0] + reward_BK[:, 2]) / 2, rtol=1e-6)


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_devices_share_the_work(mode):
    """Draws differ with the number of devices, but what is drawn is scored and learned from on each."""
    rewards, taught, _ = train(tiny(reward=config.Reward(samples=4)), mode=mode, devices=4, count=60)
    assert np.asarray(taught.reward_B).shape == (32,)
    assert np.mean(rewards[-5:]) > 2 * np.mean(rewards[:5])


@pytest.mark.parametrize(("phases", "message"), [
    ([config.Phase(objective="reward", steps=1)], "objective=captions must come before it"),
    ([config.Phase(steps=1), config.Phase(objective="reward", steps=1, sampling="linear")], "neither sampling nor"),
    ([config.Phase(steps=1), config.Phase(objective="reward", steps=1, reward=config.Reward(samples=1))], "others needs 2"),
    ([config.Phase(steps=1), config.Phase(objective="reward", steps=1, reward=config.Reward(samples=0, baseline="greedy"))],
     "too few"),
])
def test_phases_that_cannot_be_rewarded_are_refused(phases, message):
    with pytest.raises(UserError, match=message):
        config.check(config.Config(phases=tuple(phases)))
