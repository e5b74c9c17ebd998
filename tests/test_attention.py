"""The gradient of soft attention is written out; here it is held to the automatic one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcap.decoders import attention, cells
from jaxcap.decoders.attention import Context, Weights

B, K, T, P, F, A, D = 2, 2, 3, 5, 4, 6, 8


def autodiff(cell, weights, context, start, x_TBG, kept_TBP):
    """`attention.scan` without its own gradient."""

    def body(state, xs):
        state, seen_BF, weights_BP = attention.step(cell, weights, context, state, *xs)
        return state, (state.hidden_BD, seen_BF, weights_BP)

    return jax.lax.scan(body, start, (x_TBG, kept_TBP))[1]


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("options", [True, False], ids=["gate, biases, dropout", "plain"])
@pytest.mark.parametrize("unroll", [1, 2, 0])
def test_the_written_out_gradient_is_the_automatic_one(name, options, unroll):
    cell, random = cells.get(name), np.random.default_rng(0)
    G = cell.gates * D

    def draw(*shape):
        return jnp.asarray(0.5 * random.standard_normal(shape, np.float32))

    gate = (draw(D, 1), draw(1)) if options else ()
    weights = Weights(draw(D, A), draw(A), draw(F, G), draw(D, G), draw(G) if options else None, *gate)
    N = K * B  # captions of a photo stand side by side
    start = cell.start(draw(N, D))
    kept_TBP = jnp.asarray(random.integers(0, 2, (T, N, P)) * 2.0, jnp.float32) if options else None
    inputs = weights, Context(draw(B, P, F), draw(B, P, A)), start, draw(T, N, G)
    asked = draw(T, N, D), draw(T, N, F), draw(T, N, P)  # every output counts, so that no part of the gradient is zero

    def gradient(scan, *unroll):
        def objective(inputs):
            outputs = scan(cell.step, *inputs, kept_TBP, *unroll)
            return sum(jnp.sum(weight * output) for weight, output in zip(asked, outputs, strict=True))

        return jax.jit(jax.value_and_grad(objective))(inputs)

    (value, grads), (expected, expected_grads) = gradient(attention.scan, unroll), gradient(autodiff)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), grads, expected_grads)
    assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(expected_grads))
