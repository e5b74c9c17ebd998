"""Masked sums over tokens: cross-entropy, which im2txt divides by their number, and the policy gradient of rewarded captions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcap import products
from jaxcap.vocab import BOS, EOS, PAD, UNK

FORBIDDEN = (PAD, BOS, UNK)  # never drawn
CHUNK = 1024  # tokens whose logits exist at once


def cross_entropy_sum(logits: Array, targets: Array, label_smoothing: float = 0.0) -> Array:
    """Sum of the cross-entropy in nats over the tokens that are not padding: logits [..., V], targets [...].

    Label smoothing spreads that share of the target evenly over the vocabulary.
    """
    return _cross_entropy(label_smoothing, logits, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(label_smoothing, logits, targets):
    return _entropy_forward(label_smoothing, logits, targets)[0]


def _entropy_forward(label_smoothing, logits, targets):
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    if label_smoothing:
        target = (1 - label_smoothing) * target + label_smoothing * logits.mean(axis=-1)
    total = jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum((total - target) * (targets != PAD)), (logits, total, targets)


def _entropy_backward(label_smoothing, saved, d_sum):
    logits, total, targets = saved
    return _d_logits(label_smoothing, logits, total, targets) * d_sum, None


_cross_entropy.defvjp(_entropy_forward, _entropy_backward)


def _d_logits(label_smoothing, logits, total, targets):
    """The gradient by the logits: softmax less what is wanted. total: the logarithm of the sum of the logits' exponentials.

    It is written out because that of an index is a scatter, which no other pass over the logits can be part of.
    """
    vocabulary = logits.shape[-1]
    wanted = jnp.where(jnp.arange(vocabulary) == targets[..., None], 1 - label_smoothing, 0.0) + label_smoothing / vocabulary
    return (jnp.exp(logits - total[..., None]) - wanted) * (targets != PAD)[..., None]


def projected_sum(outputs_TBW: Array, kernel_WV: Array, bias_V: Array, targets_TB: Array, label_smoothing: float = 0.0) -> Array:
    """`cross_entropy_sum` of the logits `outputs @ kernel + bias`, float32.

    Of more than `CHUNK` tokens the logits never exist as a whole: they are made a chunk at a time, and where a gradient is
    asked for, its products are taken while the chunk is there instead of making or keeping it for a backward pass.
    """
    outputs_NW, targets_N = outputs_TBW.reshape(-1, outputs_TBW.shape[-1]), targets_TB.reshape(-1)
    tokens = len(targets_N)
    chunks, size = chunked(tokens)
    if chunks == 1:
        return cross_entropy_sum(_logits(outputs_NW, kernel_WV, bias_V), targets_N, label_smoothing)
    padding = chunks * size - tokens
    outputs_CSW = jnp.pad(outputs_NW, ((0, padding), (0, 0))).reshape(chunks, size, -1)
    targets_CS = jnp.pad(targets_N, (0, padding), constant_values=PAD).reshape(chunks, size)
    return _chunked(label_smoothing, outputs_CSW, kernel_WV, bias_V, targets_CS)


def chunked(tokens: int) -> tuple[int, int]:
    """Into how many chunks so many tokens fall, and how many tokens one holds."""
    chunks = -(-tokens // CHUNK)
    return chunks, -(-tokens // chunks)


def _logits(outputs: Array, kernel_WV: Array, bias_V: Array) -> Array:
    return (products.summed(outputs, kernel_WV) + bias_V).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(label_smoothing, outputs_CSW, kernel_WV, bias_V, targets_CS):
    def body(total, chunk):
        outputs_SW, targets_S = chunk
        return total + cross_entropy_sum(_logits(outputs_SW, kernel_WV, bias_V), targets_S, label_smoothing), None

    return jax.lax.scan(body, _zeros((), outputs_CSW), (outputs_CSW, targets_CS))[0]


def _forward(label_smoothing, outputs_CSW, kernel_WV, bias_V, targets_CS):
    def body(carry, chunk):
        total, d_kernel_WV, d_bias_V = carry
        outputs_SW, targets_S = chunk
        logits_SV = _logits(outputs_SW, kernel_WV, bias_V)
        nats, saved = _entropy_forward(label_smoothing, logits_SV, targets_S)
        d_logits_SV = _d_logits(label_smoothing, *saved)
        total += nats
        d_bias_V += d_logits_SV.sum(axis=0)
        d_logits_SV = d_logits_SV.astype(outputs_SW.dtype)
        d_kernel_WV += products.into_kernel(outputs_SW, d_logits_SV, kernel_WV)
        return (total, d_kernel_WV, d_bias_V), products.back(d_logits_SV, kernel_WV)

    zeros = tuple(_zeros(shape, outputs_CSW) for shape in ((), kernel_WV.shape, bias_V.shape))
    (total, d_kernel_WV, d_bias_V), d_outputs_CSW = jax.lax.scan(body, zeros, (outputs_CSW, targets_CS))
    return total, (d_outputs_CSW, d_kernel_WV.astype(kernel_WV.dtype), d_bias_V.astype(bias_V.dtype))


def _backward(label_smoothing, gradients, d_total):
    return *(jax.tree.map(lambda x: x * d_total.astype(x.dtype), gradients)), None


_chunked.defvjp(_forward, _backward)


def _zeros(shape: tuple[int, ...], other: Array) -> Array:
    return jnp.zeros_like(other, shape=shape, dtype=jnp.float32)  # may differ between devices as `other` does


def policy_sums(logits_BTV: Array, targets_BT: Array, advantage_B: Array) -> tuple[Array, Array]:
    """`(cross-entropy, objective)` of captions that were drawn, both summed over their tokens.

    The gradient of the objective, −Σ advantage · log p, is that of the expected reward turned round (Williams 1992; Rennie et
    al. 2017, eq. 7). p is the probability among the words that may be drawn.
    """
    logits_BTV = jnp.where(np.isin(np.arange(logits_BTV.shape[-1]), FORBIDDEN), -jnp.inf, logits_BTV)
    mask_BT = targets_BT != PAD
    target_BT = jnp.take_along_axis(logits_BTV, jnp.where(mask_BT, targets_BT, EOS)[..., None], axis=-1)[..., 0]
    nats_BT = (jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT) * mask_BT
    return jnp.sum(nats_BT), jnp.sum(nats_BT * jax.lax.stop_gradient(advantage_B)[:, None])
