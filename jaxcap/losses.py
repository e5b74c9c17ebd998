"""Masked cross-entropy per token, as im2txt: Σ mask · cross-entropy / Σ mask."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxcap.vocab import PAD


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
