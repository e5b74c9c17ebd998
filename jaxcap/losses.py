"""Masked sums over tokens: cross-entropy, which im2txt divides by their number, and the policy gradient of rewarded captions."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxcap.vocab import BOS, EOS, PAD, UNK

FORBIDDEN = (PAD, BOS, UNK)  # never drawn


def cross_entropy_sums(logits_BTV: Array, targets_BT: Array, label_smoothing: float = 0.0) -> tuple[Array, Array]:
    """Sum of the cross-entropy in nats over the tokens that are not padding, and their number (both float32 scalars).

    Label smoothing spreads that share of the target evenly over the vocabulary.
    """
    mask_BT = (targets_BT != PAD).astype(jnp.float32)
    log_norm_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    if label_smoothing:
        target_BT = (1 - label_smoothing) * target_BT + label_smoothing * logits_BTV.mean(axis=-1)
    return jnp.sum((log_norm_BT - target_BT) * mask_BT), jnp.sum(mask_BT)


def policy_sums(logits_BTV: Array, targets_BT: Array, advantage_B: Array) -> tuple[Array, Array]:
    """`(cross-entropy, objective)` of captions that were drawn, both summed over their tokens.

    The gradient of the objective, −Σ advantage · log p, is that of the expected reward turned round (Williams 1992; Rennie et
    al. 2017, eq. 7). p is the probability among the words that may be drawn.
    """
    logits_BTV = logits_BTV.at[..., jnp.array(FORBIDDEN)].set(-jnp.inf)
    mask_BT = targets_BT != PAD
    target_BT = jnp.take_along_axis(logits_BTV, jnp.where(mask_BT, targets_BT, EOS)[..., None], axis=-1)[..., 0]
    nats_BT = (jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT) * mask_BT
    return jnp.sum(nats_BT), jnp.sum(nats_BT * jax.lax.stop_gradient(advantage_B)[:, None])
