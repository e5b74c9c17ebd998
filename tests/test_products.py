"""Products with factors rounded to bfloat16, as CPUs take them under dtype="bfloat16"."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import workload
from benchmarks.workload import KINDS
from jaxcap import captioner as captioners
from jaxcap import config as configs
from jaxcap import inference, products
from jaxcap.encoders import dense, few
from jaxcap.parallel import Parallel

needs_instructions = pytest.mark.skipif(jax.default_backend() != "cpu" or not products.instructions(),
                                        reason="about CPUs with bfloat16 instructions")
ATTENTION = {"decoder.image": "attention", "decoder.attention.size": 8}


def near_bfloat16(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


@needs_instructions
@pytest.mark.parametrize("leading", [(5,), (3, 4), (2, 3, 2), (1, 5), (5, 1, 1)])
def test_a_float32_array_and_a_bfloat16_kernel_are_multiplied_as_rounded_numbers(leading):
    random = np.random.default_rng(0)
    x, d_y = (jnp.asarray(random.standard_normal((*leading, n), np.float32)) for n in (7, 6))
    kernel_IJ = jnp.asarray(random.standard_normal((7, 6), np.float32)).astype(jnp.bfloat16)
    y, pull = jax.vjp(products.matmul, x, kernel_IJ)
    d_x, d_kernel_IJ = pull(d_y)
    assert y.dtype == d_x.dtype == jnp.float32 and d_kernel_IJ.dtype == jnp.bfloat16
    exact, pull = jax.vjp(jnp.matmul, near_bfloat16(x), kernel_IJ.astype(jnp.float32))
    exact_d_x, exact_d_kernel_IJ = pull(near_bfloat16(d_y))
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_x, exact_d_x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(products.into_kernel(x, d_y, kernel_IJ), exact_d_kernel_IJ, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_kernel_IJ.astype(jnp.float32), exact_d_kernel_IJ, rtol=5e-3, atol=1e-3)
    assert not np.allclose(y, x @ kernel_IJ.astype(jnp.float32), rtol=1e-5, atol=1e-5)  # x is rounded, too


@needs_instructions
def test_a_large_and_thin_map_is_transposed_by_a_product(monkeypatch):
    random = np.random.default_rng(0)
    x, d_y = (jnp.asarray(random.standard_normal((2, 3, 5, n), np.float32)) for n in (7, 6))
    kernel_IJ = jnp.zeros((7, 6), jnp.bfloat16)

    def products_in(x):
        return jax.jit(products.into_kernel).lower(x, d_y, kernel_IJ).as_text().count("stablehlo.dot_general")

    small, found = products_in(x), products.into_kernel(x, d_y, kernel_IJ)
    monkeypatch.setattr(products, "LARGE", x.size)
    jax.clear_caches()
    assert (small, products_in(x)) == (1, 2)
    np.testing.assert_allclose(products.into_kernel(x, d_y, kernel_IJ), found, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(products.transposed(x.astype(jnp.bfloat16)), np.moveaxis(near_bfloat16(x), -1, 0).reshape(7, -1))
    monkeypatch.setattr(products, "THIN", 6)
    jax.clear_caches()
    assert products_in(x) == 1


@needs_instructions
@pytest.mark.parametrize(("side", "kernel_size", "channels", "stride", "near"), [
    (9, (3, 3), 96, 1, 1e-5), (9, (3, 3), 64, 1, 1e-5), (9, (5, 5), 48, 1, 1e-5), (9, (3, 3), 32, 1, 1e-5), (9, (1, 7), 64, 1, 1e-5),
    (9, (3, 3), 64, 2, 1e-5), (23, (3, 3), 64, 1, 5e-3), (56, (3, 3), 64, 1, 5e-3)],
    ids=["taps", "rows", "rows of few channels", "rows of fewer", "a row of taps", "columns", "Winograd", "Winograd on a large map"])
def test_a_convolution_by_a_bfloat16_kernel_is_one_of_rounded_numbers(side, kernel_size, channels, stride, near):
    """near: of Winograd's, which rounds what it has transformed, in its own way."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((2, side, side + 1, channels), np.float32))
    kernel = jnp.asarray(random.standard_normal((*kernel_size, channels, 64), np.float32) / 24).astype(jnp.bfloat16)

    def ordinary(x, kernel):
        return dense.ordinary(x, kernel, stride, "SAME")

    y, pull = jax.vjp(lambda x, k: dense.convolve(x, k, stride, "SAME"), x, kernel)
    exact, exact_pull = jax.vjp(ordinary, near_bfloat16(x), kernel.astype(jnp.float32))
    dy = jnp.sin(9 * exact)
    dx, dkernel = pull(dy)
    exact_dx, exact_dkernel = exact_pull(near_bfloat16(dy))
    assert y.dtype == dx.dtype == jnp.float32 and dkernel.dtype == jnp.bfloat16

    def apart(one, other):
        return np.linalg.norm(one - other) / np.linalg.norm(other)

    assert apart(y, exact) < near and apart(y, ordinary(x, kernel.astype(jnp.float32))) > 1e-3
    assert apart(dx, exact_dx) < (1e-5 if stride == 1 and near < 1e-3 else 5e-3)  # others are not rounded, or in another way
    assert apart(np.float32(dkernel), exact_dkernel) < 5e-3


@needs_instructions
def test_maps_that_caches_do_not_hold_are_not_transformed_where_products_are_of_tiles(monkeypatch):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((2, 56, 57, 64), np.float32))
    kernel = jnp.asarray(random.standard_normal((3, 3, 64, 32), np.float32) / 24).astype(jnp.bfloat16)
    exact, exact_pull = jax.vjp(lambda x: dense.ordinary(x, kernel.astype(jnp.float32), 1, "SAME"), near_bfloat16(x))
    dy = near_bfloat16(jnp.sin(9 * exact))

    def apart():
        y, pull = jax.vjp(lambda x: dense.convolve(x, kernel, 1, "SAME"), x)
        return [np.linalg.norm(one - other) / np.linalg.norm(other) for one, other in ((y, exact), (pull(dy)[0], exact_pull(dy)[0]))]

    for tiles, cache, least, most in ((True, 1 << 10, 0, 1e-5), (True, 1 << 30, 1e-4, 5e-3), (False, 1 << 10, 1e-4, 5e-3)):  # Winograd's rounds otherwise
        monkeypatch.setattr(products, "tiles", lambda: tiles)
        monkeypatch.setattr(few, "CACHE", cache)
        assert least < max(apart()) < most


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_of_one_type_it_is_the_plain_product(dtype):
    x, kernel_IJ = jnp.arange(12.0, dtype=dtype).reshape(3, 4) / 7, jnp.arange(8.0, dtype=dtype).reshape(4, 2) / 3
    np.testing.assert_array_equal(products.matmul(x, kernel_IJ), x @ kernel_IJ)
    np.testing.assert_array_equal(products.back(x[:, :2], kernel_IJ), x[:, :2] @ kernel_IJ.T)
    assert products.matmul(x, kernel_IJ).dtype == dtype and products.into_kernel(x, x, kernel_IJ).dtype == jnp.float32


def test_logits_are_summed_in_float32_where_their_factors_are_bfloat16():
    random = np.random.default_rng(0)
    x, kernel_IJ, d_y = (jnp.asarray(random.standard_normal(shape), dtype) for shape, dtype in (
        ((2, 3, 64), jnp.bfloat16), ((64, 500), jnp.bfloat16), ((2, 3, 500), jnp.float32)))
    y, pull = jax.vjp(products.summed, x, kernel_IJ)
    d_x, d_kernel_IJ = pull(d_y)
    exact, exact_pull = jax.vjp(jnp.matmul, x.astype(jnp.float32), kernel_IJ.astype(jnp.float32))
    exact_d_x, exact_d_kernel_IJ = exact_pull(near_bfloat16(d_y))
    assert y.dtype == jnp.float32 and d_x.dtype == d_kernel_IJ.dtype == jnp.bfloat16
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(d_x.astype(jnp.float32), exact_d_x, rtol=2e-2, atol=5e-2)
    np.testing.assert_allclose(d_kernel_IJ.astype(jnp.float32), exact_d_kernel_IJ, rtol=2e-2, atol=2e-2)
    assert np.abs(products.matmul(x, kernel_IJ).astype(jnp.float32) - exact).max() > 1e-2  # what rounding would have cost
    plain = jnp.ones((2, 3), jnp.float32)
    np.testing.assert_array_equal(products.summed(plain, jnp.ones((3, 4))), plain @ jnp.ones((3, 4)))


def test_only_cpus_keep_activations_in_float32_and_only_some_round_factors(monkeypatch):
    for has, kernels in ((True, jnp.bfloat16), (False, None)):
        monkeypatch.setattr(products, "instructions", lambda: has)
        assert products.dtypes("float32", "cpu") == (jnp.float32, None)
        assert products.dtypes("bfloat16", "cpu") == (jnp.float32, kernels)
    assert products.dtypes("bfloat16", "gpu") == (jnp.bfloat16, None)


@pytest.mark.usefixtures("compiled_as_for_users")
@needs_instructions
@pytest.mark.parametrize(("kind", "changes", "batch"), [
    ("cached", {}, 8),
    ("cached", {}, 240),  # so many tokens that logits come in chunks
    ("cached", {"decoder.layers": 2, "decoder.name": "gru", "decoder.tied": True, "decoder.embedding": 24}, 8),
    ("joint", ATTENTION | {"decoder.attention.gate": True, "decoder.attention.project": 6, "decoder.deep_output": True}, 8),
    ("joint", ATTENTION | {"decoder.name": "gru", "decoder.attention.start": "mean"}, 8),
    ("frozen", {}, 8),
])
def test_a_step_is_near_the_float32_one(kind, changes, batch):
    off = {"decoder.dropout": 0.0, "encoder.dropout": 0.0, "augment.crop": False, "augment.flip": False, "augment.color": False}
    reported, programs = {}, {}
    for dtype in ("float32", "bfloat16"):
        of = workload.settings(tiny=True, dtype=dtype)
        of = dataclasses.replace(of, config=configs.change(of.config, off | changes))
        step = workload.Step(KINDS[kind], of, *workload.model(of), batch, devices=jax.devices()[:1])
        programs[dtype] = step.lower().as_text()
        reported[dtype] = jax.device_get(step())
        assert {leaf.dtype for leaf in jax.tree.leaves(step.params)} == {np.dtype(np.float32)}
    full, rounded = reported["float32"], reported["bfloat16"]
    assert "bf16" in programs["bfloat16"] and "bf16" not in programs["float32"]
    assert 0 < abs(rounded.loss / full.loss - 1) < 1e-2
    for name, norm in full.norms.items():
        assert rounded.norms[name] == pytest.approx(norm, rel=0.05), name


@needs_instructions
@pytest.mark.parametrize("name", ["efficientnet_lite0", "inception_v3"])
def test_an_encoders_convolutions_are_rounded(name):
    config = configs.change(workload.settings(tiny=True).config, {"encoder.name": name, "encoder.size": 96, "data.size": 96})
    captioner = captioners.build(config, 20)
    params, batch_stats = jax.jit(captioner.init, static_argnums=1)(jax.random.key(0), 96)
    image_BHWC = jax.random.uniform(jax.random.key(1), (2, 96, 96, 3))
    low = dataclasses.replace(captioner, encoder_kernels=jnp.dtype(jnp.bfloat16))
    frozen = jax.eval_shape(lambda params, batch_stats: low.frozen_encode(params, batch_stats)(image_BHWC), params, batch_stats)
    assert captioners.build(configs.change(config, {"encoder.dtype": "bfloat16"}), 20).encoder_kernels == jnp.bfloat16
    for batch_norm, most in (("inference", 0.1), ("batch", np.inf)):  # the statistics of two photos enlarge every difference
        expected, found = (jax.jit(functools.partial(of.encode, batch_norm=batch_norm))(params, batch_stats, image_BHWC)[0]
                           for of in (captioner, low))
        assert found.dtype == expected.dtype == frozen.dtype == jnp.float32
        assert 1e-5 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < most


@needs_instructions
def test_kernels_are_turned_for_products_when_an_encoder_is_folded_and_not_for_every_photo():
    of = workload.settings(dtype="bfloat16", overrides=["encoder.name=inception_v3"])
    captioner = captioners.build(of.config, 20)
    folded = jax.eval_shape(captioner.folded, *captioner.shapes(96))
    program = jax.jit(lambda look, image_BHWC: look(image_BHWC)).lower(folded, jnp.zeros((1, 96, 96, 3))).compile().as_text()
    kept = [leaf.shape for leaf in jax.tree.leaves(folded) if leaf.dtype == jnp.bfloat16]
    turned = {math.prod(map(int, shape.split(","))) for shape in re.findall(r"= bf16\[([\d,]+)\]\S* (?:copy|transpose)\(", program)}
    square = ((32, 32), (32, 64), (64, 96), (80, 192), (96, 96), (288, 384))
    others = {9 * into * out for into, out in square} | {5 * 5 * 48 * 64}  # that multiply rows or columns
    assert (448, 3, 3, 384) in kept and (192, 1, 7, 192) in kept and turned <= others


def test_captions_are_searched_for():  # also where there are no such instructions
    of = workload.settings(tiny=True, dtype="bfloat16")
    captioner, params, batch_stats = workload.model(of)
    decode = inference.decoder(captioner, of.config.search, configs.encoder_size(of.config), Parallel("shard_map", jax.devices()[:1]))
    features = workload.features(np.random.default_rng(0), 4, captioner.spec.features)
    found = decode(params, None, features)
    assert np.isfinite(found.log_probs_BK).all() and found.log_probs_BK.dtype == jnp.float32
