"""Which parameters train in a phase, and the optax chain that trains them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcap.config import Optim, Phase

PyTree = Any


def split_params(params: PyTree, phase: Phase) -> tuple[PyTree, PyTree]:
    """`(trainable, frozen)`: the parts of `params` that the phase trains, and the rest."""
    if phase.train == "all":
        return params, {}
    return {"decoder": params["decoder"]}, {part: tree for part, tree in params.items() if part != "decoder"}


def schedule(optim: Optim, total_steps: int, steps_per_epoch: float) -> optax.Schedule:
    """The learning rate by optimizer step of the phase; warm-up is linear from 0.

    `staircase` is im2txt's: multiplied by `decay_rate` at the end of every `decay_epochs`.
    """
    after = max(total_steps - optim.warmup_steps, 1)
    if optim.schedule == "cosine":
        main = optax.cosine_decay_schedule(optim.learning_rate, after)
    elif optim.schedule == "staircase":
        main = optax.exponential_decay(optim.learning_rate, max(round(optim.decay_epochs * steps_per_epoch), 1),
                                       optim.decay_rate, staircase=True)
    else:
        main = optax.constant_schedule(optim.learning_rate)
    if not optim.warmup_steps:
        return main
    warmup = optax.linear_schedule(0.0, optim.learning_rate, optim.warmup_steps)
    return optax.join_schedules([warmup, main], [optim.warmup_steps])


def rates(learning_rate: optax.Schedule, total_steps: int) -> np.ndarray:
    """The schedule's value at every step, on the host. Asked for while steps wait in line, a device answers after them."""
    return np.asarray(jax.jit(jax.vmap(learning_rate))(jnp.arange(total_steps)))


def own_words(phase: Phase, first_step: int, total_steps: int) -> Callable[[jax.Array], jax.Array] | None:
    """The probability, by step of the run, that the decoder reads a word of its own: scheduled sampling, None where there is none.

    It rises from 0 at the phase's first step to `sampling_share` at its last, by one of the curves of Bengio et al. 2015
    (arXiv 1506.03099, section 2.4), stretched to reach it: linear; exponential, 1 − k^i with k^total = 0.01; inverse sigmoid, a
    logistic curve centred at half time.
    """
    if phase.sampling == "none":
        return None

    def share(progress):
        if phase.sampling == "linear":
            return progress
        if phase.sampling == "exponential":
            return (1 - 0.01**progress) / 0.99
        low, high = jax.nn.sigmoid(-6.0), jax.nn.sigmoid(6.0)
        return (jax.nn.sigmoid(12 * progress - 6) - low) / (high - low)

    return lambda step: phase.sampling_share * share((step - first_step) / max(total_steps - 1, 1))


def optimizer(optim: Optim, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Clip the global norm → the rule of `optim.name` → the encoder's own scale → the learning rate."""
    rules = {"sgd": optax.identity, "momentum": lambda: optax.trace(0.9),
             "adam": optax.scale_by_adam, "adamw": optax.scale_by_adam}
    chain = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm else []
    chain.append(rules[optim.name]())
    if optim.name == "adamw" and optim.weight_decay:
        chain.append(optax.add_decayed_weights(optim.weight_decay, mask=_matrices))
    if optim.encoder_learning_rate_scale != 1:
        chain.append(optax.masked(optax.scale(optim.encoder_learning_rate_scale), _encoder_mask))
    chain.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*chain)


def encoder_l2(params: PyTree) -> jax.Array:
    """½ Σ w² over the encoder's filters and matrices, the term that im2txt's phase 2 multiplies by 4e-5 (slim's L2)."""
    return sum((0.5 * jnp.sum(jnp.square(w)) for w in jax.tree.leaves(params["encoder"]) if w.ndim > 1), jnp.float32(0))


def _matrices(params: PyTree) -> PyTree:
    return jax.tree.map(lambda w: w.ndim > 1, params)


def _encoder_mask(params: PyTree) -> PyTree:
    return {part: jax.tree.map(lambda _: part == "encoder", tree) for part, tree in params.items()}
