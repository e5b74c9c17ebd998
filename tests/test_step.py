"""The training step: losses, gradients, phases, and the same numbers on one device, on eight, and under pmap."""

import dataclasses
import functools
import math
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from benchmarks import workload
from jaxcap import caption, evaluate, flat, losses, optim, parallel, resident, rows
from jaxcap import step as steps
from jaxcap.captioner import Captioner
from jaxcap.config import Augment, Optim, Phase
from jaxcap.data.augment import augmentation
from jaxcap.decoders.decoder import Decoder
from jaxcap.encoders import EncoderSpec
from jaxcap.errors import UserError
from jaxcap.step import Batch, TrainState
from jaxcap.vocab import PAD

pytestmark = pytest.mark.usefixtures("compiled_as_for_users")
V, F, SIZE = 30, 12, 8


class TinyEncoder(nn.Module):
    """One convolution and one batch norm: enough to have statistics."""

    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, image_BHWC, batch_norm="inference"):
        x = nn.Conv(F, (3, 3), strides=2)(image_BHWC)
        x = nn.BatchNorm(use_running_average=batch_norm == "inference", momentum=0.9,
                         axis_name="data" if batch_norm == "sync" else None)(x)
        return nn.relu(x)


class PlainCaptioner(Captioner):
    """TinyEncoder has no folded form; its frozen one is the plain one."""

    def frozen_encode(self, params, batch_stats, *, few=True):
        variables = {"params": params["encoder"], "batch_stats": batch_stats}
        return lambda image_BHWC: self.encoder.apply(variables, image_BHWC).reshape(len(image_BHWC), -1, F)


SPEC = EncoderSpec(name="tiny", module=TinyEncoder, image_size=SIZE, features=F, preprocess=lambda x: x)
CAPTIONER = PlainCaptioner(spec=SPEC, encoder=TinyEncoder(), unit_scaling=False, feature_dropout=0.0,
                           decoder=Decoder(vocabulary=V, features=F, embedding=8, hidden=16, dropout=0.0))
FROZEN = Phase("decoder", "decoder", steps=1, optim=Optim(name="sgd", learning_rate=0.5))
JOINT = Phase("all", "all", steps=1, batch_norm="sync", optim=Optim(name="momentum", learning_rate=0.5, encoder_l2=1e-3))

WORDS = Phase("words", "all", objective="words", steps=1, batch_norm="sync", optim=Optim(name="sgd", learning_rate=0.5))


def batch_of(rows=16, words=6, seed=0):
    random = np.random.default_rng(seed)
    tokens_BT1 = random.integers(4, V, (rows, words + 2)).astype(np.int32)
    tokens_BT1[:, 0] = 1
    for row, length in zip(tokens_BT1, random.integers(1, words + 1, rows)):  # ragged
        row[length + 1] = 2
        row[length + 2:] = PAD
    return Batch(tokens_BT1, image_BHWC=random.integers(0, 256, (rows, SIZE, SIZE, 3)).astype(np.uint8))


@functools.cache
def compiled(mode, count, phase):
    devices = parallel.Parallel(mode, jax.devices()[:count])
    optimizer = optim.optimizer(phase.optim, optim.schedule(phase.optim, 10, 10))
    function = functools.partial(steps.train_step, captioner=CAPTIONER, phase=phase, optimizer=optimizer,
                                 augment=augmentation(Augment(), SIZE))
    return devices, optimizer, devices.wrap(function, in_sharded=(False, True, False))


def start(phase, optimizer):
    params, batch_stats = CAPTIONER.init(jax.random.PRNGKey(0), SIZE)
    return TrainState(jnp.int32(0), params, batch_stats, optimizer.init(optim.split_params(params, phase)[0]),
                      jax.random.PRNGKey(1))


def run(mode, count, phase, batch, times=2):
    devices, optimizer, function = compiled(mode, count, phase)
    state = devices.replicate(start(phase, optimizer))
    for _ in range(times):
        state, metrics = function(state, devices.shard(batch), None)
    return jax.device_get((state, metrics))


@pytest.mark.parametrize("phase", [FROZEN, JOINT, WORDS], ids=["frozen", "joint", "words"])
def test_one_device_equals_eight_equals_pmap(phase):
    one = run("shard_map", 1, phase, batch_of())
    for mode, count in (("shard_map", 8), ("pmap", 8), ("pmap", 1)):
        other = run(mode, count, phase, batch_of())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other)


@pytest.mark.parametrize(("mode", "count"), [("shard_map", 8), ("pmap", 8), ("shard_map", 1)])
@pytest.mark.parametrize("phase", [FROZEN, JOINT], ids=["frozen", "joint"])
def test_steps_that_go_together_are_the_steps_one_by_one(phase, mode, count):
    batches = [batch_of(seed=seed) for seed in range(3)]
    devices, optimizer, function = compiled(mode, count, phase)
    one, reported = devices.replicate(start(phase, optimizer)), []
    for batch in batches:
        one, metrics = function(one, devices.shard(batch), None)
        reported.append(jax.device_get(metrics))
    many = devices.wrap(functools.partial(steps.train_steps, captioner=CAPTIONER, phase=phase, optimizer=optimizer,
                                          augment=augmentation(Augment(), SIZE)), in_sharded=(False, True, False))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *batches)
    together = jax.device_get(many(devices.replicate(start(phase, optimizer)), devices.shard(stacked), None))
    one = jax.device_get(one), jax.tree.map(lambda *leaves: np.stack(leaves), *reported)
    assert together[1].loss.shape == (3,) and together[0].step == 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, together)


@pytest.mark.parametrize(("mode", "count"), [("shard_map", 1), ("shard_map", 8), ("pmap", 8)])
@pytest.mark.parametrize("phase", [FROZEN, JOINT, WORDS], ids=["frozen", "joint", "words"])
def test_captions_that_share_a_look_are_the_photo_looked_at_for_each(phase, mode, count):
    """Of three captions a photo, the last is PAD alone for some: it counts for nothing."""
    captions = batch_of(rows=24)
    captions.tokens_BT1[2::6] = PAD
    photos = batch_of(rows=8).image_BHWC
    shared = run(mode, count, phase, Batch(captions.tokens_BT1, image_BHWC=photos))
    each = run(mode, count, phase, Batch(captions.tokens_BT1, image_BHWC=np.repeat(photos, 3, axis=0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), shared, each)


def test_statistics_per_device_differ_from_synchronized_ones():
    per_device = run("shard_map", 8, Phase("all", "all", steps=1, batch_norm="batch", optim=JOINT.optim), batch_of(), times=1)
    synchronized = run("shard_map", 8, JOINT, batch_of(), times=1)
    means = [state.batch_stats["BatchNorm_0"]["mean"] for state, _ in (per_device, synchronized)]
    variances = [state.batch_stats["BatchNorm_0"]["var"] for state, _ in (per_device, synchronized)]
    np.testing.assert_allclose(*means, rtol=1e-5)  # a mean of means is the mean; of variances it is not the variance
    assert np.abs(variances[0] - variances[1]).max() > 1e-4


def test_the_step_is_plain_sgd_on_the_mean_token_loss():
    batch = batch_of()
    state, metrics = run("shard_map", 8, FROZEN, batch, times=1)
    before = start(FROZEN, optax.identity())

    def loss(decoder):
        params = {"encoder": before.params["encoder"], "decoder": decoder}
        features, _ = CAPTIONER.encode(params, before.batch_stats, batch.image_BHWC / 255.0)
        targets_BT = batch.tokens_BT1[:, 1:]
        total = losses.cross_entropy_sum(CAPTIONER.logits(params, features, batch.tokens_BT1[:, :-1]), targets_BT)
        return total / (targets_BT != PAD).sum()

    value, grads = jax.value_and_grad(loss)(before.params["decoder"])
    scale = min(1, 5.0 / float(optax.tree.norm(grads)))
    expected = jax.tree.map(lambda p, g: p - 0.5 * scale * g, before.params["decoder"], grads)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), expected, state.params["decoder"])


def test_a_frozen_encoder_does_not_move():
    state, metrics = run("shard_map", 1, FROZEN, batch_of())
    before = start(FROZEN, optax.identity())
    jax.tree.map(np.testing.assert_array_equal, before.params["encoder"], state.params["encoder"])
    jax.tree.map(np.testing.assert_array_equal, before.batch_stats, state.batch_stats)
    assert "encoder" not in metrics.norms
    moved, metrics = run("shard_map", 1, JOINT, batch_of())
    assert metrics.norms["encoder"] > 0
    assert (before.params["encoder"]["Conv_0"]["kernel"] != moved.params["encoder"]["Conv_0"]["kernel"]).any()


def test_words_are_predicted_from_the_photo_alone_in_any_order():
    batch = batch_of()
    backwards = batch.tokens_BT1.copy()
    for row in backwards:
        length = np.argmax(row == 2)
        row[1:length] = row[1:length][::-1]
    before = start(WORDS, optim.optimizer(WORDS.optim, lambda step: 0.0))
    state, metrics = run("shard_map", 1, WORDS, batch, times=1)
    np.testing.assert_allclose(run("shard_map", 1, WORDS, batch._replace(tokens_BT1=backwards), times=1)[1].loss, metrics.loss,
                               rtol=1e-6)
    features, _ = CAPTIONER.encode(before.params, before.batch_stats, batch.image_BHWC / 255.0, batch_norm="batch")
    log_probs_BV = jax.nn.log_softmax(CAPTIONER.words(before.params, features))
    expected = [-log_probs_BV[b, token] for b, row in enumerate(batch.tokens_BT1[:, 1:]) for token in row if token != PAD]
    np.testing.assert_allclose(metrics.loss, np.mean(expected), rtol=1e-4)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, state.params)
    assert moved["encoder"]["Conv_0"]["kernel"]
    assert moved["decoder"] == {name: name in ("image_embedding", "word_embedding", "logits_bias") for name in moved["decoder"]}


def test_first_loss_is_the_logarithm_of_the_vocabulary():
    _, metrics = run("shard_map", 1, FROZEN, batch_of(), times=1)
    assert math.isclose(metrics.loss, math.log(V), rel_tol=0.01)


def test_padding_gets_exactly_no_gradient():
    batch = batch_of()
    params, batch_stats = CAPTIONER.init(jax.random.PRNGKey(0), SIZE)
    features, _ = CAPTIONER.encode(params, batch_stats, batch.image_BHWC / 255.0)
    logits_BTV = CAPTIONER.logits(params, features, batch.tokens_BT1[:, :-1])
    targets_BT = batch.tokens_BT1[:, 1:]
    grads_BTV = jax.grad(lambda x: losses.cross_entropy_sum(x, targets_BT))(logits_BTV)
    assert not grads_BTV[targets_BT == PAD].any()
    assert (jnp.abs(grads_BTV).sum(axis=2)[targets_BT != PAD] > 0).all()
    # and longer padding changes neither the loss nor one gradient
    longer = Batch(np.pad(batch.tokens_BT1, ((0, 0), (0, 3))), image_BHWC=batch.image_BHWC)
    one, other = (run("shard_map", 1, FROZEN, b, times=1) for b in (batch, longer))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one, other)


def test_eight_captions_can_be_learnt_by_heart():
    batch = batch_of(rows=8)
    phase = Phase("all", "all", steps=1, batch_norm="sync", optim=Optim(name="adam", learning_rate=0.03))
    devices, optimizer, function = compiled("shard_map", 1, phase)
    state = devices.replicate(start(phase, optimizer))
    for _ in range(300):
        state, metrics = function(state, devices.shard(batch), None)
    assert metrics.loss < 0.05


def test_one_compilation_per_shape():
    devices, optimizer, function = compiled("shard_map", 1, FROZEN)
    state = devices.replicate(start(FROZEN, optimizer))
    before = function._cache_size()
    for words in (3, 5, 3, 5, 3):
        state, _ = function(state, devices.shard(batch_of(words=words)), None)
    assert function._cache_size() - before == 2


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_resident_rows_equal_the_photos_themselves(platform):
    batch = batch_of()
    devices, optimizer, function = compiled("shard_map", 8, FROZEN)
    state = devices.replicate(start(FROZEN, optimizer))
    table = devices.replicate(resident.table(np.asarray(batch.image_BHWC)[::-1].copy(), platform))
    assert table.tiled == (platform == "tpu")
    rows = Batch(batch.tokens_BT1, index_B=np.arange(16, dtype=np.int32)[::-1].copy())
    one, _ = function(state, devices.shard(batch), None)
    other, _ = function(state, devices.shard(rows), table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one.params, other.params)


@pytest.mark.parametrize("shape", [(7, 10, 9, 3), (7, 1, 5), (7, 4, 5)])
def test_a_resident_table_gives_back_the_rows_it_was_made_of(shape):
    array_N, index_B = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8), np.array([3, 0, 3, 6])
    for platform in ("cpu", "gpu", "tpu"):
        made = resident.table(array_N, platform)
        np.testing.assert_array_equal(jax.jit(lambda table, index_B: table[index_B])(made, index_B), array_N[index_B])
        tiles = [rest % tile for rest, tile in zip(made.rows.shape[1:], resident.TPU_TILE)]
        assert (made.tiled and tiles == [0, 0]) == (platform == "tpu" and len(shape) == 4)


def test_a_batch_that_cannot_be_shared_out_is_refused():
    with pytest.raises(UserError, match="batch_size=12 .* 8 devices .* multiple of 8"):
        parallel.Parallel("shard_map", jax.devices()[:8]).check_batch(12)


def test_label_smoothing_is_cross_entropy_against_a_spread_target():
    logits_BTV = jax.random.normal(jax.random.key(0), (2, 3, V))
    targets_BT = jnp.array([[4, 5, PAD], [6, PAD, PAD]])
    target_BTV = 0.9 * jax.nn.one_hot(targets_BT, V) + 0.1 / V
    expected = (-(target_BTV * jax.nn.log_softmax(logits_BTV)).sum(axis=2) * (targets_BT != PAD)).sum()
    np.testing.assert_allclose(losses.cross_entropy_sum(logits_BTV, targets_BT, 0.1), expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_in_chunks_is_the_loss_with_its_gradient(smoothing, monkeypatch):
    random = np.random.default_rng(0)
    outputs_TBW, kernel_WV, bias_V = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((5, 7, 6), (6, V), V))
    targets_TB = jnp.asarray(random.integers(0, V, (5, 7)).clip(3) - 3)  # some are padding
    assert 0 < (targets_TB == PAD).sum() < 30

    def loss(*given):
        return 3 * losses.projected_sum(*given, targets_TB, smoothing)

    whole = jax.value_and_grad(loss, (0, 1, 2))(outputs_TBW, kernel_WV, bias_V)
    monkeypatch.setattr(losses, "CHUNK", 8)  # 35 tokens in five chunks of seven
    np.testing.assert_allclose(loss(outputs_TBW, kernel_WV, bias_V), whole[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole,
                 jax.value_and_grad(loss, (0, 1, 2))(outputs_TBW, kernel_WV, bias_V))
    monkeypatch.setattr(losses, "CHUNK", 12)  # 36 places for 35 tokens
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole,
                 jax.value_and_grad(loss, (0, 1, 2))(outputs_TBW, kernel_WV, bias_V))


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_a_step_with_its_loss_in_chunks_is_the_step(mode, monkeypatch):
    whole = run(mode, 2, FROZEN, batch_of(), times=1)
    monkeypatch.setattr(losses, "CHUNK", 8)
    compiled.cache_clear()
    chunked = run(mode, 2, FROZEN, batch_of(), times=1)
    compiled.cache_clear()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, chunked)


@pytest.mark.parametrize("options", [{"schedule": "constant"}, {"schedule": "cosine", "warmup_steps": 3}, {"schedule": "staircase", "decay_epochs": 0.5}])
def test_rates_on_the_host_are_those_of_the_schedule(options):
    learning_rate = optim.schedule(Optim(learning_rate=0.3, **options), 12, 4)
    rates = optim.rates(learning_rate, 12)
    assert isinstance(rates, np.ndarray)  # asked of a device, each would wait for the steps in line
    np.testing.assert_allclose(rates, [float(learning_rate(step)) for step in range(12)], rtol=1e-6)


@pytest.mark.parametrize("command", [evaluate, caption])
def test_commands_that_do_not_train_refuse_to_be_one_of_several_processes(command, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    words = {evaluate: [str(tmp_path)], caption: [str(tmp_path), str(tmp_path)]}[command]
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    with pytest.raises(UserError, match="one of 2 processes .* unset it"):
        command.main(words)
    with pytest.raises(UserError, match="parallel=pmap knows the devices of one host"):
        parallel.Parallel("pmap", [types.SimpleNamespace(process_index=i) for i in (0, 1)])


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("kind", [workload.KINDS["joint"], workload.CACHED_8], ids=lambda kind: kind.name)
def test_rows_of_words_that_were_read_learn_what_the_whole_table_would(kind, devices, monkeypatch):
    """Words that are read more than once, on one device and on several, and clipping by the norm of the whole."""
    of = dataclasses.replace(workload.settings(tiny=True, overrides=["phases.0.optim.clip_norm=0.01"]), vocabulary=160)
    model = workload.model(of)
    learned, programs = [], []
    for few in (True, False):
        if not few:
            monkeypatch.setattr(rows, "pay", lambda read, table: False)
        step = workload.Step(kind, of, *model, 8, devices=jax.devices()[:devices])
        programs.append(step.lower().as_text())
        learned.append(jax.device_get((step(), step.params)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *learned)
    moved = (learned[0][1]["decoder"]["word_embedding"] != model[1]["decoder"]["word_embedding"]).any(axis=1)
    assert 4 < moved.sum() < 160  # rows that were not read stay as they are
    assert [len(re.findall(r"\}\) : \(tensor<160x16xf32>\) ->", text)) for text in programs] == [0, 1]  # sums over devices


def test_a_frozen_encoder_that_was_made_before_and_set_aside_gives_the_same_step():
    of = workload.settings(tiny=True)
    model = workload.model(of)
    given, made = (workload.Step(workload.KINDS["frozen"], of, *model, 8, devices=jax.devices()[:2]) for _ in range(2))
    assert jax.tree.leaves(given._look) and list(given._state.params) == ["decoder"] and given._state.batch_stats == {}
    made._look, made._state, made._whole = None, made._whole(made._state), lambda state: state
    losses_of = [float(step().loss) for step in (given, made)]
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), given.params, made.params)


def test_a_frozen_encoder_of_other_weights_needs_no_other_program():
    captioner, params, batch_stats = workload.model(workload.settings(tiny=True))
    see = jax.jit(lambda look, image_BHWC: look(image_BHWC))
    image_BHWC = jax.random.uniform(jax.random.key(0), (2, 24, 24, 3))
    for factor in (1, 2):
        others = jax.tree.map(lambda leaf: factor * leaf, params)
        found = see(jax.jit(lambda *given: captioner.frozen_encode(*given))(others, batch_stats), image_BHWC)  # traced anew
        np.testing.assert_allclose(found, captioner.encode(others, batch_stats, image_BHWC)[0], rtol=1e-4, atol=1e-5)
        captioner.folded(others, batch_stats)
    assert see._cache_size() == captioner.folded._cache_size() == 1


@pytest.mark.parametrize("rule, mode", [("sgd", "pmap"), ("adamw", "shard_map")])
def test_an_encoder_that_learns_packed_gives_the_same_step(rule, mode):
    """As NVIDIA cards have it, beside the same program with the arrays as they are: clipping, decay of matrices alone, an own rate."""
    of = workload.settings(tiny=True, parallel=mode, overrides=[
        f"phases.1.optim.name={rule}", "phases.1.optim.clip_norm=0.1", "phases.1.optim.encoder_learning_rate_scale=0.5",
        "phases.1.optim.weight_decay=0.1", "phases.1.optim.learning_rate=0.01"])
    captioner, *variables = workload.model(of, platform="gpu")
    packed, loose = (workload.Step(workload.KINDS["joint"], of, captioner, *variables, 8, devices=jax.devices()[:2]) for _ in range(2))
    assert isinstance(packed._state.params["encoder"], flat.Flat) and isinstance(packed._state.batch_stats, flat.Flat)
    assert len(jax.tree.leaves(packed._state.params["encoder"])) == 2
    loose._state, loose._whole = packed._whole(packed._state), lambda state: state
    for _ in range(3):
        assert float(packed().loss) == pytest.approx(float(loose().loss), rel=1e-5)
    states = [jax.device_get(step._whole(step._state)) for step in (packed, loose)]
    before = {"params": variables[0], "batch_stats": variables[1]}
    one, other = ({name: jax.tree.map(np.subtract, getattr(state, name), before[name]) for name in before} for state in states)
    apart = jax.tree.map(lambda one, other: np.linalg.norm(one - other) / np.linalg.norm(other), one, other)  # not a number: unmoved
    assert all(share < 1e-3 for share in jax.tree.leaves(apart))


def test_what_is_packed_comes_back_as_it_was():
    random = np.random.default_rng(0)
    draw = functools.partial(random.standard_normal, dtype=np.float32)
    tree = {"kernel": draw((3, 2, 4, 5)), "product": draw((4, 6)), "bias": draw(5), "none": {}}
    there = flat.pack(tree)
    assert there.matrices.shape == (1, 144) and there.vectors.shape == (5,)
    np.testing.assert_array_equal(there.matrices[0, :24], tree["kernel"][..., 0].ravel())  # the first channel out
    jax.tree.map(np.testing.assert_array_equal, flat.unpack(there), tree)
    state = {"mean": {"encoder": tree, "decoder": tree["product"]}, "count": np.int32(3)}
    packed = flat.pack_like(state, tree)
    assert [leaf.ndim for leaf in jax.tree.leaves(packed)] == [0, 2, 2, 1]
    jax.tree.map(np.testing.assert_array_equal, flat.unpack_all(packed), state)
    assert flat.unpack(flat.pack({})) == {} and flat.unpack(tree) is tree


@pytest.mark.parametrize("kind", ["frozen", "joint"])
def test_the_network_is_traced_once_for_captions_of_all_lengths(kind):
    of = workload.settings(tiny=True)
    captioner, *variables = workload.model(of)
    traced = []
    spec = dataclasses.replace(captioner.spec, preprocess=lambda x: traced.append(x) or captioner.spec.preprocess(x))
    step = workload.Step(workload.KINDS[kind], of, dataclasses.replace(captioner, spec=spec), *variables, 8)
    batch = next(step._batches)
    for length in (5, 7):
        of_length = batch._replace(tokens_BT1=np.ones((8, length), np.int32))
        step._step.trace(*step._arguments(of_length, step._table))
    assert len(traced) == 1
