"""Masked sums over tokens: cross-entropy, which im2txt divides by their number, and the policy gradient of rewarded captions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcap import products
from jaxcap.vocab import BOS, PAD, UNK

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
    nats, total = _nats(label_smoothing, logits, targets)
    return jnp.sum(nats), (logits, total, targets)


def _entropy_backward(label_smoothing, saved, d_sum):
    logits, total, targets = saved
    return _d_logits(label_smoothing, logits, total, targets, targets != PAD) * d_sum, None


_cross_entropy.defvjp(_entropy_forward, _entropy_backward)


def _nats(label_smoothing, logits, targets):
    """Every token's cross-entropy, and the logarithm of the sum of its logits' exponentials."""
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    if label_smoothing:
        target = (1 - label_smoothing) * target + label_smoothing * logits.mean(axis=-1)
    total = jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(targets != PAD, total - target, 0.0), total


def _d_logits(label_smoothing, logits, total, targets, weights):
    """The gradient of the weighted cross-entropy by the logits: softmax less what is wanted. total: as `_nats` gives it.

    It is written out because that of an index is a scatter, which no other pass over the logits can be part of.
    """
    vocabulary = logits.shape[-1]
    wanted = jnp.where(jnp.arange(vocabulary) == targets[..., None], 1 - label_smoothing, 0.0) + label_smoothing / vocabulary
    return (jnp.exp(logits - total[..., None]) - wanted) * weights[..., None]


def projected_sum(outputs_TBW: Array, kernel_WV: Array, bias_V: Array, targets_TB: Array, label_smoothing: float = 0.0) -> Array:
    """`cross_entropy_sum` of the logits `outputs @ kernel + bias`, float32.

    Of more than `CHUNK` tokens the logits never exist as a whole: they are made a chunk at a time, and where a gradient is
    asked for, its products are taken while the chunk is there instead of making or keeping it for a backward pass.
    """
    outputs_NW, targets_N = outputs_TBW.reshape(-1, outputs_TBW.shape[-1]), targets_TB.reshape(-1)
    if len(targets_N) <= CHUNK:
        return cross_entropy_sum(_logits(outputs_NW, kernel_WV, bias_V), targets_N, label_smoothing)
    outputs_CSW, targets_CS = _in_chunks(outputs_NW, targets_N)
    return _chunked(label_smoothing, outputs_CSW, kernel_WV, bias_V, targets_CS, targets_CS != PAD, None)[1]


def policy_sums(outputs_TBW: Array, kernel_WV: Array, bias_V: Array, targets_TB: Array, advantage_B: Array) -> tuple[Array, Array]:
    """`(cross-entropy, objective)` of captions that were drawn, both summed over their tokens; logits as of `projected_sum`.

    The gradient of the objective, −Σ advantage · log p, is that of the expected reward turned round (Williams 1992; Rennie et
    al. 2017, eq. 7). p is the probability among the words that may be drawn.

    Drawn captions differ in length: padding, which is more than half of what a batch has room for, is put last and never projected.
    """
    weights_TB = jnp.where(targets_TB != PAD, advantage_B, 0.0)
    order_N = jnp.argsort(targets_TB.reshape(-1) == PAD, stable=True)
    outputs_NW = outputs_TBW.reshape(-1, outputs_TBW.shape[-1]).at[order_N].get(unique_indices=True)
    outputs_CSW, targets_CS, weights_CS = _in_chunks(outputs_NW, *(x_TB.reshape(-1)[order_N] for x_TB in (targets_TB, weights_TB)))
    bias_V = jnp.where(np.isin(np.arange(len(bias_V)), FORBIDDEN), -jnp.inf, bias_V)
    filled = jnp.sum(jnp.any(targets_CS != PAD, axis=1))
    return _chunked(0.0, outputs_CSW, kernel_WV, bias_V, targets_CS, jax.lax.stop_gradient(weights_CS), filled)


def _in_chunks(*arrays: Array) -> tuple[Array, ...]:
    """Arrays of tokens [N, …] as [C, S, …], filled up with zeros, which as targets are PAD."""
    chunks = -(-len(arrays[0]) // CHUNK)
    size = -(-len(arrays[0]) // chunks)

    def cut(x: Array) -> Array:
        return jnp.pad(x, ((0, chunks * size - len(x)), *[(0, 0)] * (x.ndim - 1))).reshape(chunks, size, *x.shape[1:])

    return tuple(map(cut, arrays))


def _logits(outputs: Array, kernel_WV: Array, bias_V: Array) -> Array:
    return (products.summed(outputs, kernel_WV) + bias_V).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(label_smoothing, outputs_CSW, kernel_WV, bias_V, targets_CS, weights_CS, filled):
    """`(cross-entropy, the same with a weight a token)`, summed over the first `filled` chunks (None: all). Only the second has a
    gradient."""

    def body(sums, chunk):
        outputs_SW, targets_S, weights_S = chunk
        nats_S, _ = _nats(label_smoothing, _logits(outputs_SW, kernel_WV, bias_V), targets_S)
        return (sums[0] + jnp.sum(nats_S), sums[1] + jnp.sum(nats_S * weights_S)), None

    return _scan(body, (_zeros((), outputs_CSW),) * 2, (outputs_CSW, targets_CS, weights_CS), filled)[0]


def _forward(label_smoothing, outputs_CSW, kernel_WV, bias_V, targets_CS, weights_CS, filled):
    def body(carry, chunk):
        (nats, weighted), d_kernel_WV, d_bias_V = carry
        outputs_SW, targets_S, weights_S = chunk
        logits_SV = _logits(outputs_SW, kernel_WV, bias_V)
        nats_S, total_S = _nats(label_smoothing, logits_SV, targets_S)
        d_logits_SV = _d_logits(label_smoothing, logits_SV, total_S, targets_S, weights_S)
        sums = nats + jnp.sum(nats_S), weighted + jnp.sum(nats_S * weights_S)
        d_bias_V += d_logits_SV.sum(axis=0)
        d_logits_SV = d_logits_SV.astype(outputs_SW.dtype)
        d_kernel_WV += products.into_kernel(outputs_SW, d_logits_SV, kernel_WV)
        return (sums, d_kernel_WV, d_bias_V), products.back(d_logits_SV, kernel_WV)

    zero, *zeros = (_zeros(shape, outputs_CSW) for shape in ((), kernel_WV.shape, bias_V.shape))
    (sums, d_kernel_WV, d_bias_V), d_outputs_CSW = _scan(
        body, ((zero, zero), *zeros), (outputs_CSW, targets_CS, weights_CS), filled)
    return sums, (d_outputs_CSW, d_kernel_WV.astype(kernel_WV.dtype), d_bias_V.astype(bias_V.dtype))


def _backward(label_smoothing, gradients, d_sums):
    return *(jax.tree.map(lambda x: x * d_sums[1].astype(x.dtype), gradients)), None, None, None


_chunked.defvjp(_forward, _backward)


def _scan(body, carry, xs, count):
    """`jax.lax.scan`; over the first `count` of `xs` alone, if that is not None, with zeros where there is no result."""
    if count is None:
        return jax.lax.scan(body, carry, xs)
    shapes = jax.eval_shape(body, carry, jax.tree.map(lambda x: x[0], xs))[1]
    ys = jax.tree.map(lambda y: jnp.zeros_like(xs[0], shape=(len(xs[0]), *y.shape), dtype=y.dtype), shapes)

    def one(i, loop):
        carry, y = body(loop[0], jax.tree.map(lambda x: x[i], xs))
        return carry, jax.tree.map(lambda ys, y: ys.at[i].set(y), loop[1], y)

    return jax.lax.fori_loop(0, count, one, (carry, ys))


def _zeros(shape: tuple[int, ...], other: Array) -> Array:
    return jnp.zeros_like(other, shape=shape, dtype=jnp.float32)  # may differ between devices as `other` does
