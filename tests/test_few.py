"""Frozen encoders on CPUs see few photos at a time: the same features, where no gradient goes through them, and on CPUs alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from benchmarks import workload
from benchmarks.peers.jaxcap_side import TINY
from jaxcap import encoders, memory
from jaxcap.encoders import few


@pytest.fixture(autouse=True)
def caches(monkeypatch):
    """Two cores with caches for two photos of 32 × 32 pixels."""
    monkeypatch.setattr(memory, "cores", lambda: 2)
    monkeypatch.setattr(few, "CACHE", 4 * 32 * 32 * 3)


def loops(function, *arguments) -> list[int]:
    """In how many parts each loop of a function goes through what it is given."""
    return [int(length) for length in re.findall(r"\blength=(\d+)", str(jax.make_jaxpr(function)(*arguments)))]


def folded(spec: encoders.EncoderSpec, side: int, **options) -> encoders.Folded:
    return encoders.fold(spec, encoders.init(spec.module(), jax.random.key(0), side), **options)


@pytest.mark.parametrize("name, kernels", [("efficientnet_lite0", jnp.bfloat16), ("tiny", None)])
def test_features_are_the_same_few_photos_at_a_time(name, kernels):
    spec = TINY if name == "tiny" else encoders.get(name)
    image_BHWC = jax.random.uniform(jax.random.key(1), (6, 33, 31, 3))
    whole, parts = (folded(spec, 33, kernel_dtype=kernels, few=parts) for parts in (False, True))
    assert not loops(whole, image_BHWC) and loops(parts, image_BHWC)
    see = jax.jit(lambda look, image_BHWC: look(image_BHWC))
    np.testing.assert_allclose(see(parts, image_BHWC), see(whole, image_BHWC), rtol=1e-5, atol=1e-5)


def test_the_narrower_the_maps_of_a_run_of_layers_the_more_photos_it_sees(monkeypatch):
    monkeypatch.setattr(few, "CACHE", 128 << 10)  # 65,536 numbers in all
    image_BHWC = jnp.zeros((16, 64, 64, 3))
    # The widest maps have 32² × 32 numbers, twice; 32² × 96; 16² × 144, twice; 8² × 240, twice; 4² × 480, three times; 4² × 672, three
    # times; 2² × 1,152, four times; and 2² × 1,280.
    assert loops(folded(encoders.get("efficientnet_lite0"), 64, few=True), image_BHWC) == [16 // n for n in (2, 1, 4, 8, 4, 8)]


@pytest.mark.parametrize("batch, parts", [(1, []), (2, []), (3, [3]), (4, [2]), (9, [9])])
def test_parts_of_a_batch_are_equal(batch, parts):
    assert loops(folded(TINY, 32, few=True), jnp.zeros((batch, 32, 32, 3))) == parts


def test_a_batch_that_cannot_be_cut_in_useful_parts_is_seen_as_one(monkeypatch):
    monkeypatch.setattr(few, "CACHE", 4 * 4 * 32 * 32 * 3)  # eight photos
    see = folded(TINY, 32, few=True)
    assert [loops(see, jnp.zeros((batch, 32, 32, 3))) for batch in (31, 30, 12, 10)] == [[], [5], [2], [2]]


@pytest.mark.parametrize("name, side", [("efficientnet_lite0", 60), ("efficientnet_lite3", 37)])
def test_widths_are_those_of_the_widest_maps_within_layers(name, side):
    module = encoders.get(name).module()
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, side, side + 8, 3)))
    seen = {}

    def note(next_function, args, kwargs, context):
        y = next_function(*args, **kwargs)
        if context.method_name == "__call__" and context.module.path:
            name = context.module.path[0]
            seen[name] = max(seen.get(name, 0), *(x.size for x in (args[0], y)))
        return y

    with nn.intercept_methods(note):
        jax.eval_shape(module.apply, variables, jax.ShapeDtypeStruct((1, side, side + 8, 3), jnp.float32))
    assert module.widths(side, side + 8) == list(seen.values())


def test_only_cpus_see_few_photos_at_a_time_and_only_where_no_gradient_goes_through():
    image_BHWC = jnp.zeros((4, 32, 32, 3))
    of = workload.settings(tiny=True)
    for platform, expected in (("cpu", [2]), ("gpu", []), ("tpu", [])):
        captioner, params, batch_stats = workload.model(of, platform=platform)
        assert loops(captioner.frozen_encode(params, batch_stats), image_BHWC) == expected
        assert loops(captioner.folded(params, batch_stats), image_BHWC) == expected
        assert not loops(lambda params, captioner=captioner, stats=batch_stats: captioner.encode(params, stats, image_BHWC)[0], params)


@pytest.mark.parametrize("kind", ["frozen", "eval"])
def test_steps_over_devices_see_few_photos_at_a_time(kind, monkeypatch):
    of = workload.settings(tiny=True)
    model = workload.model(of)
    losses, programs = [], []
    for cache in (few.CACHE, 1 << 30):
        monkeypatch.setattr(few, "CACHE", cache)
        jax.clear_caches()  # a network that was traced before is not traced again
        step = workload.Step(workload.KINDS[kind], of, *model, 16, devices=jax.devices()[:2])
        losses.append(step.loss(step()))
        programs.append(step.lower().as_text().count("stablehlo.while"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert programs[0] == programs[1] + 1
