"""The training step and the evaluation step: pure functions of one device, with collectives over the axis "data".

No jit and no device is named here; `parallel.py` wraps these functions. All arrays are the device's own share.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxcap import flat, losses, optim, reward, rows
from jaxcap.captioner import Captioner
from jaxcap.config import Phase
from jaxcap.decoders.attention import doubly_stochastic
from jaxcap.resident import Table

AXIS = "data"
PyTree = Any


class TrainState(NamedTuple):
    """Everything that training changes: arrays only, the same on every device."""

    step: Array  # int32, optimizer steps since the run began
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree  # of the current phase's trainable parameters
    rng: Array  # the run's key; step and device number are folded in


class Batch(NamedTuple):
    """One device's share of a batch. Exactly one of `image_BHWC`, `features_BPF` and `index_B` says what is seen.

    tokens_BT1: int32 [B, T + 1], BOS … EOS and PAD; the model reads all but the last and is asked for all but the first.
    There may be several captions a photo, side by side.
    image_BHWC: uint8 photos at the stored size. features_BPF: features computed before.
    index_B: rows of the resident table that the step is given, photos or features.
    photo_B: the photos' numbers in the split, which self-critical training finds their references by.
    reward_B, baseline_B: of captions that were drawn (`draw_step`): how good each is, and how good it had to be.
    """

    tokens_BT1: Array
    image_BHWC: Array | None = None
    features_BPF: Array | None = None
    index_B: Array | None = None
    photo_B: Array | None = None
    reward_B: Array | None = None
    baseline_B: Array | None = None


class Metrics(NamedTuple):
    """Scalars of one step, the same on every device.

    loss: nats per token, in self-critical training of the captions that were drawn. reward: the mean of those, 0 elsewhere.
    norm: of the whole gradient before clipping. norms: of its parts, `encoder` as one and the decoder's by name. tokens: how many the loss is a mean over.
    """

    loss: Array
    reward: Array
    norm: Array
    norms: dict[str, Array]
    tokens: Array


def set_aside(state: TrainState, phase: Phase, captioner: Captioner) -> tuple[TrainState, Callable[[TrainState], TrainState]]:
    """What the steps of `phase` need of `state`, and a function that makes a whole state again of what they make of it.

    A frozen encoder stays behind with its statistics: these steps read features or are given `look`. Every array that only passes
    through a dispatch costs the host microseconds, and an encoder has hundreds. One that learns goes along, on NVIDIA cards packed
    (`flat.py`).
    """
    if phase.train == "all":
        if captioner.platform != "gpu":
            return state, lambda part: part
        pack = jax.jit(lambda state: flat.pack_like(state, state.params["encoder"], state.batch_stats))
        return pack(state), jax.jit(flat.unpack_all)
    trainable, frozen = optim.split_params(state.params, phase)

    def whole(part: TrainState) -> TrainState:
        return part._replace(params={**frozen, **part.params}, batch_stats=state.batch_stats)

    return state._replace(params=trainable, batch_stats={}), whole


def train_step(state: TrainState, batch: Batch, table: Table | None, look: Callable[[Array], Array] | None = None, *,
               captioner: Captioner, phase: Phase, optimizer: optax.GradientTransformation,
               augment: Callable[[Array, Array], Array],
               own: Callable[[Array], Array] | None = None) -> tuple[TrainState, Metrics]:
    """One optimizer step on the mean loss over all devices' tokens: Σ masked cross-entropy / Σ mask.

    `augment(key, image_BHWC uint8) → image_BHWC float32 in [0, 1]` at the size that the encoder sees; in a phase whose
    augmentation is off it is the central crop. `look` is the frozen encoder (`Captioner.frozen_encode`) where it was made before,
    for all steps of a phase; `state` may then be what `set_aside` leaves of it. `own(step)` is the probability with which the
    decoder reads a word of its own (scheduled sampling); None is teacher forcing. Gradients are summed over the axis "data", so
    any number of devices gives the step of the whole batch.
    """
    key = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), jax.lax.axis_index(AXIS))
    augment_key, dropout_key = jax.random.split(key)
    inputs_BT, targets_BT = batch.tokens_BT1[:, :-1], batch.tokens_BT1[:, 1:]
    seen = _look(batch, table)
    if seen.ndim == 4:
        seen = augment(augment_key, seen)
        if phase.train == "decoder":
            seen = (look or captioner.frozen_encode(state.params, state.batch_stats))(seen)
    trainable, frozen = optim.split_params(state.params, phase)
    tokens = jax.lax.psum(jnp.sum(targets_BT != 0).astype(jnp.float32), AXIS)
    rewarded = batch.reward_B is not None
    words_TBE = None  # those that are read, where they learn in place of the table of all words
    if own is None and reads_few_words(captioner, phase, inputs_BT.size * jax.lax.axis_size(AXIS)):
        words_TBE = trainable["decoder"]["word_embedding"][inputs_BT.T]

    def loss_fn(trainable, words_TBE):
        params, features_BPF, batch_stats, penalty = {**frozen, **trainable}, seen, state.batch_stats, 0.0
        if phase.train == "all":
            features_BPF, batch_stats = captioner.encode(params, batch_stats, seen, batch_norm=phase.batch_norm)
        if phase.objective == "words":
            words_BV = captioner.words(params, features_BPF)
            words_BV = jnp.repeat(words_BV, len(targets_BT) // len(words_BV), axis=0)
            logits_BTV = jnp.broadcast_to(words_BV[:, None], (*targets_BT.shape, words_BV.shape[-1]))
            objective = total = losses.cross_entropy_sum(logits_BTV, targets_BT, phase.optim.label_smoothing)
        elif rewarded:  # without dropout: what learns is what drew
            outputs_TBW, _ = captioner.outputs_and_attention(params, features_BPF, inputs_BT)
            total, objective = losses.policy_sums(
                outputs_TBW, *captioner.projection(params), targets_BT.T, batch.reward_B - batch.baseline_B)
        else:
            outputs_TBW, weights_BTP = captioner.outputs_and_attention(
                params, features_BPF, inputs_BT, key=dropout_key, train_features=phase.train == "all",
                own=own(state.step) if own else None, words_TBE=words_TBE)
            if captioner.doubly_stochastic:
                penalty = captioner.doubly_stochastic * doubly_stochastic(weights_BTP, targets_BT != 0) / tokens
            objective = total = losses.projected_sum(
                outputs_TBW, *captioner.projection(params), targets_BT.T, phase.optim.label_smoothing)
        objective = objective / tokens + penalty
        if phase.optim.encoder_l2 and phase.train == "all":  # each device adds its share of the penalty
            objective += phase.optim.encoder_l2 * optim.encoder_l2(trainable) / jax.lax.axis_size(AXIS)
        return objective, (total, batch_stats)

    # The cast makes the parameters each device's own, so that the gradient is this device's share under shard_map (whose
    # typed gradient of a replicated value would already be summed) and under pmap alike; one explicit sum follows.
    local = jax.tree.map(lambda x: jax.lax.pcast(x, AXIS, to="varying"), trainable)
    (_, (total, batch_stats)), grads = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(local, words_TBE)
    grads, read_M = _summed(*grads, inputs_BT.T)
    if phase.batch_norm == "inference":
        batch_stats = state.batch_stats
    else:
        # The mean over devices. Divided first, as part of what makes them: afterwards it would be a kernel for each on GPUs.
        batch_stats = jax.lax.psum(jax.tree.map(lambda x: x / jax.lax.axis_size(AXIS), batch_stats), AXIS)

    updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
    trainable = _applied(trainable, updates, read_M)
    new = TrainState(state.step + 1, {**frozen, **trainable}, batch_stats, opt_state, state.rng)
    parts = {f"decoder/{name}": tree for name, tree in grads["decoder"].items()}
    if "encoder" in grads:
        parts["encoder"] = grads["encoder"]
    norms = {name: optax.tree.norm(tree) for name, tree in parts.items()}
    mean_reward = jax.lax.pmean(batch.reward_B.mean(), AXIS) if rewarded else jnp.float32(0)
    return new, Metrics(jax.lax.psum(total, AXIS) / tokens, mean_reward, optax.tree.norm(grads), norms, tokens)


def reads_few_words(captioner: Captioner, phase: Phase, words: int) -> bool:
    """Whether so many words, over all devices, are few rows of a table that is read for nothing else and changed by nothing else.

    Only these rows then have a gradient, and devices give each other these instead of summing the table's.
    """
    decoder = captioner.decoder
    return phase.objective == "captions" and phase.optim.name == "sgd" and not decoder.tied and rows.pay(words, decoder.vocabulary)


def train_steps(state: TrainState, batches: Batch, table: Table | None, look: Callable[[Array], Array] | None = None,
                **settings) -> tuple[TrainState, Metrics]:
    """`train_step` on one batch after another in one dispatch. Arrays of `batches` are [B, K, …], metrics are [K].

    One batch needs no loop, which is more than tidy: on CPUs XLA makes convolutions' gradients ten times slower in one.
    """
    step = functools.partial(train_step, **settings)
    if batches.tokens_BT1.shape[1] == 1:
        state, metrics = step(state, jax.tree.map(lambda x: x[:, 0], batches), table, look)
        return state, jax.tree.map(lambda x: x[None], metrics)
    batches = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batches)
    return jax.lax.scan(lambda state, batch: step(state, batch, table, look), state, batches)


def draw_step(state: TrainState, batch: Batch, table: Table | None, references: reward.References,
              look: Callable[[Array], Array] | None = None, *, captioner: Captioner, phase: Phase, max_words: int,
              augment: Callable[[Array, Array], Array]) -> Batch:
    """The batch that self-critical training learns from: captions drawn for its photos, and what they earned.

    It sees the photos as the `train_step` of the same state will see them, but for batch statistics.
    """
    key = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), jax.lax.axis_index(AXIS))
    augment_key, draw_key = jax.random.split(key)
    seen = _look(batch, table)
    if seen.ndim == 4:
        seen = (look or captioner.frozen_encode(state.params, state.batch_stats))(augment(augment_key, seen))
    tokens_BT1, reward_B, baseline_B = reward.draw(
        captioner, state.params, seen, batch.photo_B, jax.random.wrap_key_data(draw_key), references, settings=phase.reward,
        max_words=max_words)
    return batch._replace(tokens_BT1=tokens_BT1, reward_B=reward_B, baseline_B=baseline_B)


def eval_step(params: PyTree, look: Callable[[Array], Array] | None, batch: Batch, table: Table | None, *, captioner: Captioner,
              crop: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Summed cross-entropy in nats and number of tokens over all devices; perplexity is exp of their ratio. `look` sees photos, as
    `Captioner.folded` gives it; features need none."""
    seen = _look(batch, table)
    features_BPF = seen if seen.ndim == 3 else look(crop(seen))
    outputs_TBW, _ = captioner.outputs_and_attention(params, features_BPF, batch.tokens_BT1[:, :-1])
    targets_TB = batch.tokens_BT1[:, 1:].T
    total = losses.projected_sum(outputs_TBW, *captioner.projection(params), targets_TB)
    return jax.lax.psum((total, jnp.sum(targets_TB != 0).astype(jnp.float32)), AXIS)


def _summed(grads: PyTree, words_TBE: Array | None, inputs_TB: Array) -> tuple[PyTree, Array | None]:
    """Gradients summed over devices; with `words_TBE`, the gradient of the words that were read, they stand where the table's would,
    and which rows of it they are comes along."""
    if words_TBE is None:
        return jax.lax.psum(grads, AXIS), None
    words_NE, read_N = words_TBE.reshape(inputs_TB.size, -1), inputs_TB.reshape(-1)
    words_ME, read_M = jax.lax.all_gather((words_NE, read_N), AXIS, tiled=True, to="invarying")
    words_ME = rows.summed(words_ME, read_M, len(grads["decoder"]["word_embedding"]))
    return _with_words(jax.lax.psum(_with_words(grads, None), AXIS), words_ME), read_M


def _applied(trainable: PyTree, updates: PyTree, read_M: Array | None) -> PyTree:
    """`trainable` with the updates added, those of words to the rows `read_M` of their table, if only these have been read."""
    if read_M is None:
        return optax.apply_updates(trainable, updates)
    table_VE = trainable["decoder"]["word_embedding"].at[read_M].add(updates["decoder"]["word_embedding"])
    return _with_words(optax.apply_updates(_with_words(trainable, None), _with_words(updates, None)), table_VE)


def _with_words(params: PyTree, words: Array | None) -> PyTree:
    """`params`, or a gradient or change of them, with something else in place of the words' embedding."""
    return {**params, "decoder": {**params["decoder"], "word_embedding": words}}


def _look(batch: Batch, table: Table | None) -> Array:
    if batch.index_B is not None:
        return table[batch.index_B]
    return batch.image_BHWC if batch.image_BHWC is not None else batch.features_BPF

