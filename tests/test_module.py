"""The base of modules with parameters."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxcap.module import Module


def test_an_initializer_is_asked_only_for_a_parameter_that_is_not_there():
    asked = []

    class Two(Module):
        @nn.compact
        def __call__(self):
            return sum(self.param(name, lambda key, shape: asked.append(name) or jnp.ones(shape), (3,)).sum() for name in ("one", "other"))

    variables = Two().init(jax.random.key(0))
    assert asked == ["one", "other"] and set(variables["params"]) == {"one", "other"}
    assert jax.jit(Two().apply)(variables) == 6 and asked == ["one", "other"]
    assert Two().init(jax.random.key(0))["params"]["one"].shape == (3,) and len(asked) == 4
