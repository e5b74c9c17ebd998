"""The small network: sizes, places, arithmetic modes and folding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcap import encoders
from jaxcap.encoders import small_cnn

SPEC = encoders.get("small_cnn")


@pytest.fixture(scope="module")
def variables():
    variables = SPEC.module().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    statistics = jax.tree.map(lambda x: x + 0.1, variables["batch_stats"])  # as if it had been trained
    return {**variables, "batch_stats": statistics}


def images(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def test_published_figures(variables):
    assert sum(x.size for x in jax.tree.leaves(variables)) == SPEC.parameters
    shapes = jax.eval_shape(SPEC.module().apply, variables, jnp.zeros((2, 64, 64, 3)))
    assert shapes.shape == (2, 1, 1, SPEC.features)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (40, 64)])
def test_any_input_size(variables, size):
    features = SPEC.module().apply(variables, images(1, *size, 3))
    assert features.shape[-1] == SPEC.features
    assert np.isfinite(features).all()


def test_pooled_features_tell_where_something_is(variables):
    left, right = np.zeros((2, 64, 64, 3), np.float32)
    left[24:40, 4:20] = right[24:40, 44:60] = (1, -1, -1)
    blank = np.zeros((64, 64, 3), np.float32)
    features_BGGC = SPEC.module().apply(variables, np.stack([left, right, blank]))[..., :-small_cnn.CHANNELS].reshape(
        3, small_cnn.GRID, small_cnn.GRID, small_cnn.CHANNELS)
    change = np.abs(features_BGGC[:2] - features_BGGC[2]).sum((1, 3))  # by column
    assert change[0, 0] > 5 * change[0, -1]
    assert change[1, -1] > 5 * change[1, 0]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 40])
def test_places_cover_the_map_and_none_is_empty(length):
    places = [range(length)[place] for place in small_cnn._places(length)]
    assert all(places)
    assert set().union(*places) == set(range(length))


def test_folded_is_inference(variables):
    image = images(2, 64, 64, 3)
    expected = SPEC.module().apply(variables, image)
    np.testing.assert_allclose(encoders.fold(SPEC, variables)(image), expected, rtol=1e-4, atol=1e-5)


def test_batch_statistics_move_and_remat_changes_nothing(variables):
    image = images(4, 32, 32, 3)

    def loss(params, remat):
        features, new = SPEC.module(remat=remat).apply({**variables, "params": params}, image, batch_norm="batch",
                                                       mutable=["batch_stats"])
        return jnp.square(features).mean(), new["batch_stats"]

    grads, statistics = jax.grad(loss, has_aux=True)(variables["params"], False)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), statistics, variables["batch_stats"])
    assert min(jax.tree.leaves(moved)) > 0
    assert all(np.abs(g).max() > 0 for path, g in jax.tree.leaves_with_path(grads) if "kernel" in str(path))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads,
                 jax.grad(loss, has_aux=True)(variables["params"], True)[0])


def test_bfloat16_is_near_float32(variables):
    image = images(2, 64, 64, 3)
    expected = SPEC.module().apply(variables, image).mean((1, 2))
    found = SPEC.module(dtype=jnp.bfloat16).apply(variables, image).astype(jnp.float32).mean((1, 2))
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
