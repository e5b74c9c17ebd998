"""Soft attention over the positions of a spatial map (Bahdanau et al. 2014, arXiv 1409.0473; Xu et al. 2015, arXiv 1502.03044).

`step` is one word of a decoder whose first layer attends, `scan` all words of a caption with its gradient written out.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcap import products
from jaxcap.decoders import cells

PyTree = Any


class Context(NamedTuple):
    """What a decoder looks at, the same for every word of a photo: values [B, P, F] and their keys [B, P, A]."""

    values_BPF: Array
    keys_BPA: Array


class Weights(NamedTuple):
    """What an attending layer multiplies with. None leaves a gate or a bias out.

    query_DA, energy_A: as in `attend`. gate_D1, gate_bias_1: of β = σ(w·h + b), which scales what is seen (Xu et al. 2015,
    section 4.2.1). seen_FG, hidden_DG, hidden_bias_G: the parts of the cell's gates that what is seen and the hidden state give.
    """

    query_DA: Array
    energy_A: Array
    seen_FG: Array
    hidden_DG: Array
    hidden_bias_G: Array | None = None
    gate_D1: Array | None = None
    gate_bias_1: Array | None = None


class _Products(NamedTuple):
    """What the hidden state alone says in a step: the products that a backward pass wants as one, after its scan."""

    query_NA: Array
    gate_N1: Array | None
    h_NG: Array


def attend(context: Context, query_NA: Array, energy_A: Array, kept_NP: Array | None = None) -> tuple[Array, Array]:
    """What N queries see, [N, F], and how much they attend to every position, [N, P] with rows that sum to one.

    e = energy · tanh(keys + query), α = softmax(e), z = Σ α·values. N is a multiple of B: the queries of a photo stand side by
    side. `kept_NP` multiplies α (dropout).
    """
    batch, positions, size = context.keys_BPA.shape
    query_BKA = query_NA.reshape(batch, -1, 1, size)
    energies_BKP = jnp.tanh(context.keys_BPA[:, None] + query_BKA) @ energy_A
    weights_BKP = jax.nn.softmax(energies_BKP.astype(jnp.float32)).astype(context.values_BPF.dtype)
    weights_NP = weights_BKP.reshape(-1, positions)
    used_BKP = weights_BKP if kept_NP is None else (weights_NP * kept_NP).reshape(batch, -1, positions)
    seen_BKF = jnp.einsum("bkp,bpf->bkf", used_BKP, context.values_BPF)
    return seen_BKF.reshape(-1, seen_BKF.shape[-1]), weights_NP


def step(cell: Callable, weights: Weights, context: Context, state: PyTree, x_NG: Array,
         kept_NP: Array | None = None) -> tuple[PyTree, Array, Array]:
    """The layer's next state, what it saw [N, F] and the attention weights [N, P].

    `cell` is a `cells.Cell.step`; `x_NG` is the word's part of its gates.
    """
    return _step(cell, weights, context, state, x_NG, kept_NP)[:3]


def _step(cell, weights, context, state, x_NG, kept_NP):
    said = _say(weights, state)
    seen_NF, weights_NP = _look(context, weights.energy_A, said, kept_NP)
    return cell(x_NG + products.matmul(seen_NF, weights.seen_FG), said.h_NG, state), seen_NF, weights_NP, said


def _say(weights: Weights, state: PyTree) -> _Products:
    gate_N1 = None if weights.gate_D1 is None else products.matmul(state.hidden_BD, weights.gate_D1) + weights.gate_bias_1
    return _Products(products.matmul(state.hidden_BD, weights.query_DA), gate_N1,
                     cells.from_hidden(state.hidden_BD, weights.hidden_DG, weights.hidden_bias_G))


def _look(context: Context, energy_A: Array, said: _Products, kept_NP: Array | None) -> tuple[Array, Array]:
    seen_NF, weights_NP = attend(context, said.query_NA, energy_A, kept_NP)
    return seen_NF if said.gate_N1 is None else jax.nn.sigmoid(said.gate_N1) * seen_NF, weights_NP


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def scan(cell: Callable, weights: Weights, context: Context, start: PyTree, x_TBG: Array,
         kept_TBP: Array | None, unroll: int = 1) -> tuple[Array, Array, Array]:
    """Hidden states [T, N, D], what was seen [T, N, F] and attention weights [T, N, P] of `step` over `x_TBG`.

    As in `cells.scan`, which says what `unroll` is, the gradient is written out: those of matrices and of the map are one product
    each after the scan instead of an accumulator of their size at every word. Nothing of size T·B·P·A is kept: it is computed again.
    """
    states, seen_TBF, weights_TBP, _ = _run(cell, weights, context, start, x_TBG, kept_TBP, unroll)
    return states.hidden_BD, seen_TBF, weights_TBP


def _run(cell, weights, context, start, x_TBG, kept_TBP, unroll):
    def body(state, xs):
        state, *rest = _step(cell, weights, context, state, *xs)
        return state, (state, *rest)

    return jax.lax.scan(body, start, (x_TBG, kept_TBP), unroll=unroll or True)[1]


def _forward(cell, weights, context, start, x_TBG, kept_TBP, unroll):
    states, seen_TBF, weights_TBP, said_T = _run(cell, weights, context, start, x_TBG, kept_TBP, unroll)
    saved = states, seen_TBF, weights_TBP, said_T, weights, context, start, x_TBG, kept_TBP
    return (states.hidden_BD, seen_TBF, weights_TBP), saved


def _backward(cell, unroll, saved, d_outputs):
    states, seen_TBF, weights_TBP, said_T, weights, context, start, x_TBG, kept_TBP = saved
    before = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), start, states)
    sums_TBG = x_TBG + products.matmul(seen_TBF, weights.seen_FG)

    def body(carry, xs):
        d_state, d_keys_BPA, d_energy_A = carry
        (d_hidden_BD, d_seen_BF, d_weights_BP), sum_BG, said, state, kept_BP = xs
        d_state = d_state._replace(hidden_BD=d_state.hidden_BD + d_hidden_BD)
        _, pull = jax.vjp(cell, sum_BG, said.h_NG, state)
        d_x_BG, d_h_BG, d_state = pull(d_state)
        d_seen_BF += products.back(d_x_BG, weights.seen_FG)
        _, pull = jax.vjp(lambda keys_BPA, energy_A, said: _look(Context(context.values_BPF, keys_BPA), energy_A, said, kept_BP),
                          context.keys_BPA, weights.energy_A, said)
        d_keys, d_energy, d_said = pull((d_seen_BF, d_weights_BP))
        d_said = d_said._replace(h_NG=d_h_BG)
        d_hidden_BD = d_state.hidden_BD + products.back(d_h_BG, weights.hidden_DG)
        d_hidden_BD += products.back(d_said.query_NA, weights.query_DA)
        if weights.gate_D1 is not None:
            d_hidden_BD += products.back(d_said.gate_N1, weights.gate_D1)
        return (d_state._replace(hidden_BD=d_hidden_BD), d_keys_BPA + d_keys, d_energy_A + d_energy), (d_x_BG, d_seen_BF, d_said)

    zeros = jax.tree.map(lambda x: cells.zeros_like(x, d_outputs[0]), (start, context.keys_BPA, weights.energy_A))
    (d_start, d_keys_BPA, d_energy_A), (d_x_TBG, d_seen_TBF, d_said) = jax.lax.scan(
        body, zeros, (d_outputs, sums_TBG, said_T, before, kept_TBP), reverse=True, unroll=unroll or True)

    d_values_TBF = d_seen_TBF if weights.gate_D1 is None else jax.nn.sigmoid(said_T.gate_N1) * d_seen_TBF
    used_TBP = weights_TBP if kept_TBP is None else weights_TBP * kept_TBP
    words, batch = len(x_TBG), len(context.values_BPF)
    d_values_BPF = jnp.einsum("tbkp,tbkf->bpf", *(x.reshape(words, batch, -1, x.shape[2]) for x in (used_TBP, d_values_TBF)))
    d_weights = Weights(
        query_DA=_product(before.hidden_BD, d_said.query_NA, weights.query_DA), energy_A=d_energy_A,
        seen_FG=_product(seen_TBF, d_x_TBG, weights.seen_FG),
        hidden_DG=_product(before.hidden_BD, d_said.h_NG, weights.hidden_DG),
        hidden_bias_G=None if weights.hidden_bias_G is None else d_said.h_NG.sum((0, 1)),
        gate_D1=None if weights.gate_D1 is None else _product(before.hidden_BD, d_said.gate_N1, weights.gate_D1),
        gate_bias_1=None if weights.gate_D1 is None else d_said.gate_N1.sum((0, 1)))
    return d_weights, Context(d_values_BPF, d_keys_BPA), d_start, d_x_TBG, None


def _product(one_TBI: Array, other_TBJ: Array, kernel_IJ: Array) -> Array:
    return products.into_kernel(one_TBI, other_TBJ, kernel_IJ).astype(kernel_IJ.dtype)


scan.defvjp(_forward, _backward)


def doubly_stochastic(weights_BTP: Array, mask_BT: Array) -> Array:
    """Σ over photos and positions of (1 − Σ_t α)²: every position should be looked at once in a caption (Xu et al. 2015, eq. 14)."""
    looked_BP = jnp.sum(weights_BTP.astype(jnp.float32) * mask_BT[:, :, None], axis=1)
    return jnp.sum(jnp.square(1.0 - looked_BP))
