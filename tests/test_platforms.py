"""The forms of an operation that programs are traced with."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from benchmarks import absent
from jaxcap import platforms
from jaxcap.parallel import Parallel

DEVICES = {"cpu": "cpu", "cuda": "NVIDIA H200", "rocm": "AMD Instinct MI300X", "tpu": "TPU v5 lite"}


def doubled(x, traced):
    """Twice x; `traced` is told the forms that are looked at."""

    def form(name):
        return lambda x: traced.append(name) or 2 * x

    return platforms.dependent(x, cpu=form("cpu"), cuda=form("cuda"), default=form("default"))


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_what_is_wrapped_for_devices_is_traced_in_their_form_alone(mode):
    traced = []
    wrapped = Parallel(mode).wrap(lambda x: jax.jit(jax.grad(lambda x: doubled(x, traced).sum()))(x), in_sharded=(True,), out_sharded=True)
    assert wrapped(jnp.arange(8.0)).tolist() == [2.0] * 8
    assert set(traced) == {{"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend(), "default")}


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("present", [True, False])
def test_every_platform_gets_its_form(platform, present):
    """A card that is there says "gpu", one that programs are compiled for without it "cuda"."""
    traced = []
    device = AbstractDevice(DEVICES[platform], None, "gpu" if present and platform in ("cuda", "rocm") else platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        jax.eval_shape(lambda x: doubled(x, traced), jnp.float32(1))
    assert traced == [platform if platform in ("cpu", "cuda") else "default"]


def test_where_no_devices_are_known_all_forms_are_there():
    traced = []
    for wrapped in (jax.jit, lambda f: absent.anywhere(2).wrap(f, in_sharded=(False,))):
        wrapped(lambda x: doubled(x, traced)).trace(jnp.float32(1)).lower(lowering_platforms=("cuda",))
        assert set(traced) == {"cpu", "cuda", "default"}
        traced.clear()
    assert jax.jit(lambda x: doubled(x, traced))(jnp.float32(1)) == 2
