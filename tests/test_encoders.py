"""What every encoder's spec says, its options, and the bricks that it is built of. Parity is in test_encoder_parity.py."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from benchmarks.peers.jaxcap_side import TINY
from jaxcap import encoders, memory
from jaxcap.encoders import dense, densenet, inception, inception_resnet_v2, inception_v2, layers, shifted, winograd
from jaxcap.encoders.efficientnet_lite import EfficientNetLite
from jaxcap.encoders.layers import BatchNorm, ConvBN
from jaxcap.errors import UserError

PUBLISHED = [name for name in encoders.names() if name != "small_cnn"]


def shapes(spec: encoders.EncoderSpec, side: int = 0, **options) -> dict:
    """The shapes of an encoder's variables, without computing anything."""
    image = jnp.zeros((1, side or spec.image_size, side or spec.image_size, 3))
    return dict(jax.eval_shape(spec.module(**options).init, jax.random.key(0), image))


# --- what a spec says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_figures_of_the_spec_are_those_of_the_network(name, monkeypatch):
    spec = encoders.get(name)
    variables = shapes(spec)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == spec.parameters
    macs, convolve = [], layers.convolve

    def counted(x_BHWC, kernel, *options):
        y_BHWC = convolve(x_BHWC, kernel, *options)
        macs.append(np.prod(y_BHWC.shape[1:3]) * kernel.size)
        return y_BHWC

    for module in (layers, inception, densenet):
        monkeypatch.setattr(module, "convolve", counted)
    image_BHWC = jnp.zeros((1, spec.image_size, spec.image_size, 3))
    features = jax.eval_shape(spec.module().apply, variables, image_BHWC)
    assert sum(macs) / 1e9 == pytest.approx(spec.gmacs, rel=2e-3)
    side = {299: 8, 224: 7, 240: 8, 260: 9, 280: 9, 300: 10}[spec.image_size]
    assert features.shape == (1, side, side, spec.features)


def test_the_table_in_the_docs_says_what_the_specs_say():
    rows = (Path(__file__).parents[1] / "docs" / "ENCODERS.md").read_text("utf-8").splitlines()
    table = {cells[0]: cells[1:] for row in rows if (cells := [cell.strip() for cell in row.strip("| ").split("|")])[0] in PUBLISHED}
    assert list(table) == PUBLISHED
    for name, (parameters, gflop, size, grid, top1, top5, *_) in table.items():
        spec = encoders.get(name)
        assert (parameters, gflop, size) == (f"{spec.parameters:,}", f"{2 * spec.gmacs:.2f}", str(spec.image_size))
        assert (grid.split(" × ")[-1], top1, top5) == (str(spec.features), str(spec.top1), str(spec.top5 or "–"))


def test_bfloat16_is_the_arithmetic_and_not_the_parameters():
    for name in PUBLISHED:
        spec = encoders.get(name)
        shape = shapes(spec, 96, dtype=jnp.bfloat16)
        assert {leaf.dtype for leaf in jax.tree.leaves(shape)} == {np.dtype(np.float32)}
        apply = functools.partial(spec.module(dtype=jnp.bfloat16).apply, batch_norm="batch", mutable=["batch_stats"])
        jaxpr, (features, updated) = jax.make_jaxpr(apply, return_shape=True)(shape, jnp.zeros((1, 96, 96, 3)))
        assert features.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {np.dtype(np.float32)}
        convolutions = [line for line in str(jaxpr).splitlines() if "= conv_general_dilated" in line]
        assert convolutions and all(":bf16[" in line for line in convolutions)


EVERY_STEP = (*inception_v2.STEPS[:5], *inception_resnet_v2.STEPS[7:9], *inception_resnet_v2.STEPS[18:20],
              inception_v2.STEPS[-1], inception_resnet_v2.STEPS[-1]._replace(features=64))


@pytest.mark.parametrize(("module", "blocks"), [
    (functools.partial(inception.Inception, EVERY_STEP), 5), (densenet.DenseNet, 8),
    (functools.partial(EfficientNetLite, 1.0, 0.3), 8)], ids=["inception", "densenet", "efficientnet_lite"])
def test_remat_and_bfloat16_change_the_gradient_by_rounding_only(module, blocks, monkeypatch):
    monkeypatch.setattr(densenet, "_LAYERS", (2, 2, 2, 2))  # a small network of every kind of block
    image_BHWC = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 64, 64, 3)), jnp.float32)
    variables = jax.jit(module().init)(jax.random.key(0), image_BHWC)

    def gradient(params, **options):
        def loss(params):
            features_BHWF = module(**options).apply({**variables, "params": params}, image_BHWC)
            pooled_BF = features_BHWF.astype(jnp.float32).mean((1, 2))
            return jnp.sum(pooled_BF * jnp.cos(jnp.arange(pooled_BF.size).reshape(pooled_BF.shape)))

        return jax.grad(loss)(params)

    params = variables["params"]
    plain, remat, half = (jax.jit(functools.partial(gradient, **options))(params)
                          for options in ({}, {"remat": True}, {"dtype": jnp.bfloat16}))
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, remat) == jax.tree.map(jnp.shape, half)
    flat, again, rounded = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (plain, remat, half))
    np.testing.assert_allclose(again, flat, rtol=1e-3, atol=1e-4 * np.abs(flat).max())
    cosine = flat @ rounded / np.linalg.norm(flat) / np.linalg.norm(rounded)
    assert cosine > 0.95 and 0.9 < np.linalg.norm(rounded) / np.linalg.norm(flat) < 1.1
    jaxpr = jax.make_jaxpr(functools.partial(gradient, remat=True))(params)
    assert sum(equation.primitive.name in ("checkpoint", "remat2") for equation in jaxpr.eqns) == blocks


@pytest.mark.parametrize("module", [functools.partial(inception.Inception, EVERY_STEP), encoders.get("small_cnn").module,
                                    functools.partial(EfficientNetLite, 1.0, 0.3)], ids=["inception", "small_cnn", "efficientnet_lite"])
def test_one_draw_begins_a_network_as_its_module_does(module):
    key, size = jax.random.key(0), 64
    drawn = jax.jit(functools.partial(encoders.init, module(), size=size))(key)
    expected = jax.jit(module().init)(key, jnp.zeros((1, size, size, 3)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    filters = []
    for (path, found), leaf in zip(jax.tree_util.tree_leaves_with_path(drawn), jax.tree.leaves(expected)):
        if leaf.ndim == 1:
            np.testing.assert_array_equal(found, leaf, err_msg=str(path))
        else:  # the deviation of n numbers is 1/√2n from its own, and nothing lies beyond two
            assert abs(np.log(found.std() / leaf.std())) < 5 / np.sqrt(found.size), path
            assert np.abs(found).max() < 2.3 * np.sqrt(2 / np.prod(found.shape[:-1])) and abs(found.mean()) < 5 * found.std() / np.sqrt(found.size)
            filters.append(found.ravel()[:9] / found.std())
    assert len(np.unique(np.stack(filters).round(3), axis=0)) == len(filters)  # none is cut out twice


def test_batch_norm_s_written_out_gradient_is_the_automatic_one():
    random = np.random.default_rng(0)
    y_BHWC, w_BHWC = (jnp.asarray(random.standard_normal((3, 4, 5, 6)), jnp.float32) for _ in range(2))
    gamma, bias = (jnp.asarray(random.standard_normal(6), jnp.float32) for _ in range(2))

    def objective(moments, affine, y_BHWC, gamma, bias):
        mean, squares = moments(y_BHWC)
        scale = gamma * lax.rsqrt(squares - mean**2 + 1e-3)
        return jnp.sum(nn.relu(affine(y_BHWC, scale, bias - mean * scale)) * w_BHWC)

    plain = (lambda y: (y.mean((0, 1, 2)), jnp.square(y).mean((0, 1, 2))), lambda y, scale, offset: y * scale + offset)
    found, expected = (jax.grad(functools.partial(objective, *pair), (0, 1, 2))(y_BHWC, gamma, bias)
                       for pair in ((layers._moments, layers._affine), plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)
    at_once = layers._at_once(y_BHWC, w_BHWC)  # NVIDIA cards' form
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), at_once, (y_BHWC.sum((0, 1, 2)), w_BHWC.sum((0, 1, 2))))


@pytest.mark.parametrize(("name", "module"), [
    ("efficientnet_lite0", functools.partial(EfficientNetLite, 1.0, 0.3)), ("densenet121", densenet.DenseNet),
    ("inception_resnet_v2", functools.partial(inception.Inception, EVERY_STEP))])
def test_a_folded_network_learns_as_the_plain_one(name, module, monkeypatch):
    """In float64, and so to the digit, for every parameter; DenseNet has batch norms without a convolution."""
    monkeypatch.setattr(densenet, "_LAYERS", (2, 2, 2, 2))
    with jax.enable_x64():
        spec = dataclasses.replace(encoders.get(name), module=module)
        random = np.random.default_rng(0)
        image_BHWC = jnp.asarray(random.uniform(-1, 1, (2, 96, 96, 3)))
        variables = jax.device_get(jax.jit(spec.module(dtype=jnp.float64).init)(jax.random.key(0), image_BHWC))
        variables = jax.tree.map(lambda leaf: (leaf + random.uniform(0, 0.5, leaf.shape)).astype(np.float64), variables)

        def gradient(apply):
            return jax.jit(jax.grad(lambda params: jnp.square(apply(params)).mean()))(variables["params"])

        stats = variables["batch_stats"]
        plain = gradient(lambda params: spec.module(dtype=jnp.float64).apply({"params": params, "batch_stats": stats}, image_BHWC))
        folded = gradient(lambda params: encoders.fold(spec, {"params": params, "batch_stats": stats}, jnp.float64)(image_BHWC))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-9 * np.abs(a).max()), plain, folded)


def test_preprocessing_is_the_published_one():
    black_to_white = jnp.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(encoders.get("inception_v3").preprocess(black_to_white), [-1, 0, 1])
    np.testing.assert_allclose(encoders.get("efficientnet_lite0").preprocess(black_to_white),
                               [-127 / 128, 0.5 / 128, 1], atol=1e-6)
    for name in ("inception_v1", "googlenet", "inception_v2", "inception_v3_torchvision", "inception_resnet_v2"):
        assert encoders.get(name).preprocess is encoders.get("inception_v3").preprocess
    gray_HWC = jnp.full((1, 1, 3), 0.5)  # torchvision: (x − [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(encoders.get("densenet121").preprocess(gray_HWC).ravel(), [0.0655, 0.1964, 0.4178], atol=1e-4)


def test_an_unknown_encoder_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'inception_v3'"):
        encoders.get("inceptionv3")


@pytest.mark.parametrize(("name", "smallest"), [("inception_v3", 75), ("inception_resnet_v2", 75), ("densenet121", 29),
                                                ("googlenet", 15), ("inception_v1", 1), ("efficientnet_lite4", 1)])
def test_a_photo_that_is_too_small_is_refused_and_no_other(name, smallest):
    spec = encoders.get(name)
    features = jax.eval_shape(spec.module().apply, shapes(spec), jnp.zeros((1, smallest, smallest, 3)))
    assert features.shape == (1, 1, 1, spec.features)
    if smallest > 1:
        with pytest.raises(UserError, match=f"at least {smallest} × {smallest} pixels; these are {smallest - 1} × {smallest}"):
            jax.eval_shape(spec.module().apply, shapes(spec), jnp.zeros((1, smallest - 1, smallest, 3)))


# --- bricks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "stride", "padding"), [
    ((3, 3), 1, "SAME"), ((3, 3), 2, "SAME"), ((5, 5), 2, "SAME"), ((5, 5), 1, "VALID"), ((3, 5), 2, "VALID")])
def test_depthwise_and_its_gradients_equal_the_ordinary_convolution(kernel, stride, padding):
    random = np.random.default_rng(0)
    x_BHWC = jnp.asarray(random.normal(size=(2, 9, 8, 5)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(*kernel, 1, 5)), jnp.float32)

    def ordinary(x_BHWC, kernel):
        return lax.conv_general_dilated(x_BHWC, kernel, (stride, stride), padding,
                                        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=5)

    ours, our_gradient = jax.vjp(lambda x, k: layers.convolve(x, k, stride, padding), x_BHWC, kernel)
    theirs, their_gradient = jax.vjp(ordinary, x_BHWC, kernel)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for one, other in zip(our_gradient(jnp.sin(ours)), their_gradient(jnp.sin(ours)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


def ordinary(x_BHWC, kernel, padding, stride=1):
    return lax.conv_general_dilated(x_BHWC, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 0), (1, 3))])
@pytest.mark.parametrize("size", [(7, 8), (8, 7), (3, 4)])
def test_winograds_convolution_equals_the_ordinary_one(size, padding):
    """In float64, and so to the digit: odd and even sides, and tiles that reach beyond the edge."""
    random = np.random.default_rng(0)
    with jax.enable_x64():
        x_BHWC, kernel = jnp.asarray(random.normal(size=(2, *size, 5))), jnp.asarray(random.normal(size=(3, 3, 5, 4)))
        np.testing.assert_allclose(winograd.convolve(x_BHWC, kernel, padding), ordinary(x_BHWC, kernel, padding), atol=1e-12)


@pytest.mark.parametrize("padding", ["SAME", ((2, 1), (0, 1))])
@pytest.mark.parametrize("batch, room, dtype, pieces", [
    (4, 2048, jnp.bfloat16, [2]),  # two photos each
    (3, 2048, jnp.bfloat16, [3]),  # two would not be equal parts
    (2, 512, jnp.bfloat16, [4]),  # four rows of one photo: of seven the last four begin within the first
    (1, 384, jnp.bfloat16, [2]),  # three rows: made even
    (2, 2048, jnp.bfloat16, []),
    (4, 300, jnp.bfloat16, []),  # the kernels are as many numbers
    (4, 2048, jnp.float32, []),
])
def test_winograds_convolution_goes_through_the_caches_piece_by_piece(monkeypatch, batch, room, dtype, pieces, padding):
    """A photo's row has 128 numbers of products. Of these numbers all sums and products are exact in bfloat16."""
    monkeypatch.setattr(memory, "cores", lambda: 2)
    monkeypatch.setattr(winograd, "PIECE", 4 * room // 2)
    random = np.random.default_rng(0)
    x_BHWC = jnp.asarray(random.integers(-3, 4, (batch, 7, 8 if padding == "SAME" else 9, 5)), jnp.float32)
    kernel = jnp.asarray(4 * random.integers(-3, 4, (3, 3, 5, 4)), jnp.float32)
    convolve = functools.partial(winograd.convolve, padding=padding)
    lengths = re.findall(r"\blength=(\d+)", str(jax.make_jaxpr(convolve)(x_BHWC, kernel.astype(dtype))))
    assert [int(length) for length in lengths] == pieces
    np.testing.assert_array_equal(jax.jit(convolve)(x_BHWC, kernel.astype(dtype)), ordinary(x_BHWC, kernel, padding))


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 0), (1, 2))])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel_size", "out"), [((3, 3), 4), ((3, 3), 32), ((1, 7), 4), ((5, 3), 4), ((4, 4), 4), ((1, 1), 32)])
def test_convolutions_on_cpus_and_their_gradients_equal_the_ordinary_ones(kernel_size, out, stride, padding):
    """In float64; every form, and paddings that reach less far than the kernel."""
    padding = padding if min(kernel_size) > 2 else ((0, 0), (0, 0)) if padding != "SAME" else padding
    random = np.random.default_rng(0)
    with jax.enable_x64():
        x_BHWC, kernel = jnp.asarray(random.normal(size=(2, 8, 9, 4))), jnp.asarray(random.normal(size=(*kernel_size, 4, out)))
        ours, our_gradient = jax.vjp(lambda x, k: dense.convolve(x, k, stride, padding), x_BHWC, kernel)
        theirs, their_gradient = jax.vjp(lambda x, k: ordinary(x, k, padding, stride), x_BHWC, kernel)
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
        for one, other in zip(our_gradient(jnp.sin(ours)), their_gradient(jnp.sin(ours)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-12)


def test_a_1x1_convolution_on_cpus_and_its_gradients_equal_the_ordinary_ones():
    random = np.random.default_rng(0)
    with jax.enable_x64():
        x_BHWC, kernel = jnp.asarray(random.normal(size=(2, 8, 9, 4))), jnp.asarray(random.normal(size=(1, 1, 4, 6)))
        ours, our_gradient = jax.vjp(lambda x, k: dense.pointwise(x, k[0, 0]), x_BHWC, kernel)
        theirs, their_gradient = jax.vjp(lambda x, k: ordinary(x, k, "SAME", 1), x_BHWC, kernel)
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
        for one, other in zip(our_gradient(jnp.sin(ours)), their_gradient(jnp.sin(ours)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-12)


def convolutions(x, kernel, stride=1, padding="SAME", platform="cpu"):
    """How many of XLA's own convolutions a program has that convolves so."""
    traced = jax.jit(lambda x, k: layers.convolve(x, k, stride, padding)).trace(x, kernel)
    return traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution")


@pytest.mark.parametrize(("size", "kernel", "stride", "dtype", "on_cpu"), [
    (17, (1, 7, 160, 160), 1, jnp.float32, 1),
    (17, (1, 7, 160, 160), 1, jnp.bfloat16, 0),  # the kernel alone in bfloat16: a product with all taps
    (17, (3, 3, 160, 160), 1, jnp.bfloat16, 0),
    (17, (3, 3, 160, 160), 1, jnp.float32, 1),
    (35, (3, 3, 160, 160), 1, jnp.float32, 0),  # Winograd's
    (17, (3, 3, 20, 160), 1, jnp.bfloat16, 1),
    (17, (3, 3, 32, 160), 1, jnp.bfloat16, 0),  # a product of rows
    (17, (5, 5, 32, 160), 1, jnp.bfloat16, 0),
    (17, (5, 5, 32, 16), 1, jnp.bfloat16, 1),
    (60, (5, 5, 64, 32), 1, jnp.bfloat16, 1),  # a large map
    (35, (3, 3, 64, 32), 2, jnp.float32, 0),  # a product of columns
    (35, (3, 3, 3, 32), 2, jnp.float32, 0),
    (35, (3, 3, 24, 48), 2, jnp.float32, 1),
    (35, (3, 3, 64, 24), 2, jnp.float32, 1),
    (35, (7, 7, 3, 64), 2, jnp.float32, 1),
])
def test_the_form_of_a_convolution_on_a_cpu(size, kernel, stride, dtype, on_cpu):
    x, kernel = jnp.zeros((1, size, size, kernel[2])), jnp.zeros(kernel, dtype)
    assert convolutions(x, kernel, stride) == on_cpu
    assert convolutions(x, kernel, stride, platform="cuda") == convolutions(x, kernel, stride, platform="tpu") == 1


def gradients(size, kernel, stride, platform):
    """A program of a convolution's gradients, as text."""
    compute = jax.jit(jax.grad(lambda x, k: jnp.sin(layers.convolve(x, k, stride)).sum(), argnums=(0, 1)))
    return compute.trace(jnp.zeros((1, size, size, kernel[2])), jnp.zeros(kernel)).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("size", "kernel", "stride", "on_cpu", "products"), [
    (8, (3, 3, 64, 16), 1, 2, 9),  # convolutions forward and for the gradient of the input; products of the kernel's gradient, one a tap
    (8, (3, 3, 16, 64), 1, 2, 1 + 3),  # one a row, and one that transposes
    (60, (3, 3, 8, 64), 1, 2, 1 + 3),
    (60, (3, 3, 128, 128), 1, 0, 9 + 16 + 16),  # Winograd's, forward and back
    (35, (3, 3, 64, 96), 1, 0, 1 + 3 + 16 + 16),
    (35, (3, 3, 32, 96), 1, 2, 1 + 3),
    (35, (5, 5, 48, 64), 1, 2, 1 + 5),
    (17, (1, 7, 64, 64), 1, 2, 7),
    (32, (3, 3, 12, 24), 2, 2, 1),
    (32, (7, 7, 3, 64), 2, 2, 49),
])
def test_the_gradient_of_a_kernel_is_products_on_a_cpu(size, kernel, stride, on_cpu, products):
    program = gradients(size, kernel, stride, "cpu")
    assert (program.count("stablehlo.convolution"), program.count("stablehlo.dot_general")) == (on_cpu, products)
    for platform in ("cuda", "tpu"):
        assert gradients(size, kernel, stride, platform).count("stablehlo.convolution") == 3


@pytest.mark.parametrize(("kernel", "stride"), [((1, 1, 64, 48), 1), ((3, 3, 12, 24), 2)])
def test_products_for_the_gradient_of_a_kernel_sum_over_one_axis(kernel, stride):
    """Over batch, rows and columns as they stand the same product takes up to 1.6 times as long on a CPU."""
    axes = re.findall(r"stablehlo.dot_general.*contracting_dims = \[(.*?)\]", gradients(8, kernel, stride, "cpu"))
    assert axes and not any("," in found for found in axes)


def test_winograds_convolution_is_used_on_cpus_where_it_pays_and_is_as_exact_as_float32_allows():
    random = np.random.default_rng(0)
    x_BHWC, kernel = random.normal(size=(1, 60, 57, 64)), random.normal(size=(3, 3, 64, 32))
    with jax.enable_x64():
        exact = np.asarray(ordinary(jnp.asarray(x_BHWC), jnp.asarray(kernel), "VALID"))
    x_BHWC, kernel = jnp.float32(x_BHWC), jnp.float32(kernel)
    compute = jax.jit(lambda x, k: layers.convolve(x, k, 1, "VALID"))
    error, plain_error = (np.abs(np.asarray(y) - exact).max() for y in (compute(x_BHWC, kernel), ordinary(x_BHWC, kernel, "VALID")))
    assert error < 4 * plain_error + 1e-6 * np.abs(exact).max()

    count = functools.partial(convolutions, padding="VALID")
    assert count(x_BHWC, kernel) == 0
    assert count(x_BHWC, kernel, platform="cuda") == count(x_BHWC, kernel, platform="tpu") == 1
    assert count(x_BHWC[:, :40], kernel) == 1 and count(x_BHWC[:, :40], jnp.zeros((3, 3, 64, 64))) == 0  # small maps: many channels
    assert count(jnp.zeros((3, 16, 16, 64)), jnp.zeros((3, 3, 64, 64))) == 1  # few pixels
    assert count(x_BHWC[..., :3], kernel[:, :, :3]) == 1  # the colours of a photo
    assert count(x_BHWC, jnp.zeros((5, 5, 64, 32))) == 1
    assert count(x_BHWC.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)) == 1


def test_all_positions_of_a_window_read_one_padded_map():
    lowered = jax.jit(lambda x: shifted.sums(x)).lower(jnp.zeros((1, 8, 8, 4))).as_text()
    assert re.search(r"%(\w+) = stablehlo.optimization_barrier", lowered)
    padded = re.search(r"%(\w+) = stablehlo.optimization_barrier", lowered).group(1)
    assert lowered.count(f"stablehlo.slice %{padded} ") == 9


@pytest.mark.parametrize("length", range(3, 12))
def test_pools_equal_flax_and_pytorchs_rule(length):
    x_BHWC = jnp.asarray(np.random.default_rng(0).random((2, length, 8, 5)), jnp.float32)
    for padding in ("VALID", "SAME", ((1, 1), (1, 1))):
        np.testing.assert_array_equal(layers.max_pool(x_BHWC, padding=padding), nn.max_pool(x_BHWC, (3, 3), (2, 2), padding))
    for size in (2, 3):  # PyTorch, ceil_mode: one more window where it begins inside the image
        windows = [x_BHWC[:, i:i + size] for i in range(0, length, 2) if i == 0 or i - 2 + size < length]
        rows = jnp.stack([window.max(1) for window in windows], axis=1)
        assert layers.max_pool(x_BHWC, size, padding="CEIL").shape[1] == len(windows)
        np.testing.assert_array_equal(layers.max_pool(x_BHWC, size, padding="CEIL")[:, :, 0], rows[:, :, :size].max(2))
    for whole in (False, True):
        flax = nn.avg_pool(x_BHWC, (3, 3), padding="SAME", count_include_pad=whole)
        np.testing.assert_allclose(layers.average_pool(x_BHWC, whole), flax, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding", ["VALID", "SAME", "CEIL", ((1, 1), (1, 1))])
@pytest.mark.parametrize(("size", "stride"), [(3, 2), (2, 2), (3, 1), (5, 2)])
def test_gradients_of_pools_equal_flaxs(size, stride, padding):
    """Of equal pixels the first has it; so says flax too. A ReLU before the pool takes what pixels of 0 have."""
    random = np.random.default_rng(0)
    for shape in ((2, 9, 10, 3), (1, 12, 7, 2)):
        x_BHWC = jnp.asarray(random.integers(-2, 4, shape), jnp.float32)  # many equal
        flax_padding = tuple((0, layers._reach(n, size, stride)) for n in shape[1:3]) if padding == "CEIL" else padding
        ours, our_gradient = jax.vjp(lambda x: layers.max_pool(nn.relu(x), size, stride, padding), x_BHWC)
        theirs, their_gradient = jax.vjp(lambda x: nn.max_pool(nn.relu(x), (size, size), (stride, stride), flax_padding), x_BHWC)
        np.testing.assert_array_equal(ours, theirs)
        dy = jnp.asarray(random.normal(size=ours.shape), jnp.float32)
        np.testing.assert_allclose(our_gradient(dy)[0], their_gradient(dy)[0], atol=1e-6)
        for whole in (False, True):
            ours, our_gradient = jax.vjp(lambda x: layers.average_pool(x, whole), x_BHWC)
            _, their_gradient = jax.vjp(lambda x: nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=whole), x_BHWC)
            dy = jnp.asarray(random.normal(size=ours.shape), jnp.float32)
            np.testing.assert_allclose(our_gradient(dy)[0], their_gradient(dy)[0], atol=1e-6)


class Tiny(nn.Module):
    """Two convolutions, one of them depthwise, and a batch norm by itself between them."""

    batch_norm: str

    @nn.compact
    def __call__(self, x_BHWC):
        x_BHWC = ConvBN(3, 8, (3, 3), 2, decay=0.9, batch_norm=self.batch_norm)(x_BHWC)
        x_BHWC = BatchNorm(8, decay=0.9, batch_norm=self.batch_norm)(x_BHWC)
        return ConvBN(8, 8, (3, 3), depthwise=True, decay=0.9, batch_norm=self.batch_norm)(x_BHWC)


def _tiny_step(batch_norm: str, averaged: bool):
    """Loss gradient and new statistics, per device and averaged over "data" if there are several."""

    def step(params, stats, image_BHWC, target_BHWC):
        if averaged:
            params, stats = lax.pcast((params, stats), "data", to="varying")

        def loss(params):
            features, updated = Tiny(batch_norm).apply({"params": params, "batch_stats": stats}, image_BHWC,
                                                       mutable=["batch_stats"])
            return jnp.square(features - target_BHWC).mean(), updated["batch_stats"]

        gradient, stats = jax.grad(loss, has_aux=True)(params)
        return lax.pmean((gradient, stats), "data") if averaged else (gradient, stats)

    return step


@pytest.fixture(scope="module")
def tiny():
    random = np.random.default_rng(0)
    image_BHWC = jnp.asarray(random.normal(size=(16, 8, 8, 3)) + np.arange(16)[:, None, None, None], jnp.float32)
    target_BHWC = jnp.asarray(random.normal(size=(16, 4, 4, 8)), jnp.float32)
    variables = Tiny("inference").init(jax.random.key(0), image_BHWC)
    return variables["params"], variables["batch_stats"], image_BHWC, target_BHWC


def _over_devices(step):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole, shard = PartitionSpec(), PartitionSpec("data")
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(whole, whole, shard, shard), out_specs=whole))


def test_synchronized_statistics_are_those_of_the_whole_batch(tiny):
    whole = jax.jit(_tiny_step("batch", averaged=False))(*tiny)
    synchronized = _over_devices(_tiny_step("sync", averaged=True))(*tiny)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), synchronized, whole)
    local = _over_devices(_tiny_step("batch", averaged=True))(*tiny)
    assert not np.allclose(local[1]["ConvBN_0"]["var"], whole[1]["ConvBN_0"]["var"], rtol=0.1)


def test_running_statistics_decay_towards_the_batch(tiny):
    params, stats, image_BHWC, _ = tiny
    outputs, updated = Tiny("batch").apply({"params": params, "batch_stats": stats}, image_BHWC,
                                           mutable=["batch_stats"])
    y_BHWC = layers.convolve(image_BHWC, params["ConvBN_0"]["kernel"], 2)
    new = updated["batch_stats"]["ConvBN_0"]
    np.testing.assert_allclose(new["mean"], 0.1 * y_BHWC.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(new["var"], 0.9 + 0.1 * y_BHWC.var((0, 1, 2)), rtol=1e-4)
    frozen = Tiny("inference").apply({"params": params, "batch_stats": stats}, image_BHWC)
    assert not np.allclose(outputs, frozen, rtol=0.1)


def test_published_decays():
    """im2txt and TF-slim: 0.9997 for every Inception; EfficientNet and DenseNet: 0.99."""
    for name, decay in (("inception_v3", 0.9997), ("inception_resnet_v2", 0.9997), ("efficientnet_lite0", 0.99), ("densenet121", 0.99)):
        spec = encoders.get(name)
        seen = set()

        def note(next_fun, args, kwargs, context):
            if isinstance(context.module, ConvBN):
                seen.add(context.module.decay)
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(note):
            shapes(spec, 96)
        assert seen == {decay}


def test_kernels_that_are_computed_as_one_are_set_side_by_side_when_folded_and_not_for_every_photo():
    spec, kernels = encoders.get("inception_v3"), re.compile(r"stablehlo\.concatenate.*-> tensor<1x1x")
    variables = jax.eval_shape(functools.partial(encoders.init, spec.module(), size=75), jax.random.key(0))
    fold = jax.jit(functools.partial(encoders.fold, spec))
    folded = jax.eval_shape(fold, variables)
    see = jax.jit(lambda see, image_BHWC: see(image_BHWC))
    assert not kernels.findall(see.lower(folded, jnp.zeros((1, 139, 139, 3))).as_text())
    assert len(kernels.findall(fold.lower(variables).as_text())) == 10  # of 11 blocks; one has a single start
    assert folded.variables["joined"]["mixed0"]["kernel"].shape == (1, 1, 192, 64 + 48 + 64 + 32)


@pytest.mark.parametrize("first", [2, 3])
def test_a_folded_network_is_the_same_whichever_axis_its_kernels_are_kept_by(first):
    variables = encoders.init(TINY.module(), jax.random.key(0), 31)
    image_BHWC = jax.random.uniform(jax.random.key(1), (2, 31, 31, 3))
    given, moved = (encoders.fold(TINY, variables, first=axis) for axis in (0, first))
    assert moved.variables["joined"]["mixed0"]["kernel"].shape[0] == given.variables["joined"]["mixed0"]["kernel"].shape[first]
    np.testing.assert_array_equal(moved(image_BHWC), given(image_BHWC))
