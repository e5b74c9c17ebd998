"""LSTM and GRU cells, and the scan over time that both share.

A cell is a pure function of two sums, what the input says and what the previous hidden state says; all matrix products are
outside it. That keeps everything but the recurrence out of the scan, and gives any cell the same short backward pass.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxcap import products


class LSTMState(NamedTuple):
    cell_BD: Array
    hidden_BD: Array


class GRUState(NamedTuple):
    hidden_BD: Array


class Cell(NamedTuple):
    """gates: how many sums of D units it reads. step: (from input [B, gates·D], from hidden [B, gates·D], state) → state."""

    gates: int
    start: Callable[[Array], NamedTuple]  # zeros [B, D] → the zero state
    step: Callable[[Array, Array, NamedTuple], NamedTuple]


def lstm_step(x_BG: Array, h_BG: Array, state: LSTMState, *, forget_bias: float = 1.0, output_tanh: bool = True) -> LSTMState:
    """c' = σ(f + bias)·c + σ(i)·tanh(j), h' = σ(o)·tanh(c'); gates in im2txt's order i, j, f, o.

    Without `output_tanh`, h' = σ(o)·c', as eq. 8 of Show and Tell has it (Vinyals et al. 2014, arXiv 1411.4555).
    """
    i, j, f, o = jnp.split(x_BG + h_BG, 4, axis=-1)
    cell_BD = jax.nn.sigmoid(f + forget_bias) * state.cell_BD + jax.nn.sigmoid(i) * jnp.tanh(j)
    return LSTMState(cell_BD, jax.nn.sigmoid(o) * (jnp.tanh(cell_BD) if output_tanh else cell_BD))


def gru_step(x_BG: Array, h_BG: Array, state: GRUState) -> GRUState:
    """h' = z·h + (1 − z)·tanh(x_n + r·h_n) with gates in the order z, r, n (Cho et al. 2014, arXiv 1406.1078; the reset gate
    multiplies after the matrix product, as in cuDNN and Keras)."""
    x_z, x_r, x_n = jnp.split(x_BG, 3, axis=-1)
    h_z, h_r, h_n = jnp.split(h_BG, 3, axis=-1)
    update_BD = jax.nn.sigmoid(x_z + h_z)
    new_BD = jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n)
    return GRUState(update_BD * state.hidden_BD + (1 - update_BD) * new_BD)


def get(name: str, forget_bias: float = 1.0, output_tanh: bool = True) -> Cell:
    """The cell called "lstm" or "gru"; the options are the LSTM's."""
    if name == "gru":
        return Cell(3, GRUState, gru_step)
    return Cell(4, lambda zeros_BD: LSTMState(zeros_BD, zeros_BD), _lstm(forget_bias, output_tanh))


@functools.cache
def _lstm(forget_bias: float, output_tanh: bool) -> Callable:
    # One object for one setting, so that a compiled scan is found again.
    return functools.partial(lstm_step, forget_bias=forget_bias, output_tanh=output_tanh)


def from_hidden(hidden_BD: Array, kernel_DG: Array, bias_G: Array | None) -> Array:
    """The hidden state's part of the gates."""
    h_BG = products.matmul(hidden_BD, kernel_DG)
    return h_BG if bias_G is None else h_BG + bias_G


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def at_every_word(x_BW: Array, words: int) -> Array:
    """`x_BW` for each of so many words, [T, B, W].

    Its gradient is added up word by word: XLA's sum over few rows of many numbers takes a CPU thirty times as long.
    """
    return jnp.broadcast_to(x_BW, (words, *x_BW.shape))


def _added(words, _, d_TBW):
    return sum(d_BW.astype(jnp.float32) for d_BW in d_TBW).astype(d_TBW.dtype),


at_every_word.defvjp(lambda x_BW, words: (at_every_word(x_BW, words), None), _added)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def scan(step: Callable, x_TBG: Array, kernel_DG: Array, bias_G: Array | None, start: NamedTuple, unroll: int = 1) -> Array:
    """Hidden states [T, B, D] of a cell's `step` over `x_TBG`, the input's part of the gates, already projected.

    The hidden state's part is `hidden @ kernel_DG + bias_G` (None: no bias). In the program `unroll` time steps follow one
    another in each round of its loop, forward and back; 0: all of them, and there is no loop. The gradient is written out,
    because automatic differentiation would add a [D, G] weight gradient to an accumulator at every time step; here it is one
    matrix product after the scan.
    """
    return _run(step, x_TBG, kernel_DG, bias_G, start, unroll)[0].hidden_BD


def _run(step, x_TBG, kernel_DG, bias_G, start, unroll):
    """The states after every time step, and the hidden state's part of the gates, both with a leading axis T."""

    def body(state, x_BG):
        h_BG = from_hidden(state.hidden_BD, kernel_DG, bias_G)
        state = step(x_BG, h_BG, state)
        if unroll != 1:  # else the way back would begin each state again at the first
            state = jax.lax.optimization_barrier(state)
        return state, (state, h_BG)

    return jax.lax.scan(body, start, x_TBG, unroll=unroll or True)[1]


def _forward(step, x_TBG, kernel_DG, bias_G, start, unroll):
    states, h_TBG = _run(step, x_TBG, kernel_DG, bias_G, start, unroll)
    return states.hidden_BD, (states, x_TBG, h_TBG, kernel_DG, bias_G, start)


def _backward(step, unroll, saved, d_hidden_TBD):
    states, x_TBG, h_TBG, kernel_DG, bias_G, start = saved
    before = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), start, states)

    def body(d_state, xs):
        d_output_BD, x_BG, h_BG, state = xs
        d_state = d_state._replace(hidden_BD=d_state.hidden_BD + d_output_BD)
        _, pull = jax.vjp(step, x_BG, h_BG, state)
        d_x_BG, d_h_BG, d_state = pull(d_state)
        return d_state._replace(hidden_BD=d_state.hidden_BD + products.back(d_h_BG, kernel_DG)), (d_x_BG, d_h_BG)

    zeros = jax.tree.map(lambda x: zeros_like(x, d_hidden_TBD), start)
    d_start, (d_x_TBG, d_h_TBG) = jax.lax.scan(body, zeros, (d_hidden_TBD, x_TBG, h_TBG, before), reverse=True,
                                                  unroll=unroll or True)
    d_kernel_DG = products.into_kernel(before.hidden_BD, d_h_TBG, kernel_DG).astype(kernel_DG.dtype)
    return d_x_TBG, d_kernel_DG, None if bias_G is None else d_h_TBG.sum((0, 1)), d_start


def zeros_like(x: Array, other: Array) -> Array:
    """Zeros in the shape of `x` that may start a scan over values which differ between devices as `other` does."""
    return jnp.zeros_like(other, shape=x.shape, dtype=x.dtype)


scan.defvjp(_forward, _backward)
