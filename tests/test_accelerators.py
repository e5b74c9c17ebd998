"""What GPUs and TPUs would be given to compile, read without one: every step lowers for them, in the arithmetic that was asked for.

Layers and pools have forms of their own on CPUs; that both forms give the same numbers is held in test_encoders.py.
"""

import dataclasses
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import absent, workload
from benchmarks.workload import CACHED_8, FIVE, KINDS, Settings
from jaxcap import config as configs
from jaxcap import inference

ALL = {**KINDS, CACHED_8.name: CACHED_8, **FIVE}
_HEAVY = re.compile(r"stablehlo\.(dot_general|convolution).*: \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\) -> ")


def factors(hlo: str) -> Iterator[tuple[str, str, str]]:
    """Every matrix product and convolution of a program: its operation and the types of its two factors."""
    return (match.groups() for match in _HEAVY.finditer(hlo))


def of_float32(hlo: str) -> bool:
    """Whether some product over the vocabulary's 60 words is summed in float32."""
    return bool(re.search(r"stablehlo\.dot_general.* -> tensor<(?:\d+x)+60xf32>", hlo))


def settings(dtype: str, **changes) -> Settings:
    of = workload.settings(tiny=True, dtype=dtype)
    small = {"encoder.name": "efficientnet_lite0", "encoder.size": 32, "data.size": 36}
    return dataclasses.replace(of, config=configs.change(of.config, small | changes))


@pytest.fixture
def model():
    made = {}

    def of(settings: Settings) -> tuple:
        if settings not in made:
            made[settings] = workload.model(settings, platform="gpu")
        return made[settings]

    return of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ALL)
def test_every_step_lowers_for_gpus_and_tpus_with_no_product_in_another_arithmetic(model, kind, dtype):
    of = settings(dtype)
    step = workload.Step(ALL[kind], of, *model(of), 8, devices=jax.devices()[:2])
    short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    for platform in ("cuda", "tpu"):
        hlo = step.lower(platform).as_text()
        found = list(factors(hlo))
        assert {factor for _, *types in found for factor in types} == {short}
        assert of_float32(hlo)  # the logits, whatever their factors are
        convolutions = sum(operation == "convolution" for operation, *_ in found)
        # Lite0 has 49: 1×1 and depthwise ones too, which CPUs compute otherwise. Learning takes two more for each, but one for
        # the first, whose input is the photo.
        assert convolutions == {"joint": 3 * 49 - 1, "joint_5": 3 * 49 - 1}.get(kind, 0 if ALL[kind].cached else 49)


@pytest.mark.parametrize("changes", [{}, {"decoder.image": "attention", "decoder.name": "gru", "decoder.deep_output": True}])
@pytest.mark.parametrize("search", [{"search.beam": 3}, {"search.beam": 4, "search.sample": True, "search.nucleus": 0.9},
                                    {"search.beam": 4, "search.groups": 2, "search.no_repeat_ngram": 2}])
def test_every_search_lowers_for_gpus_and_tpus_with_no_product_in_another_arithmetic(model, changes, search):
    of = settings("bfloat16", **changes)
    captioner, params, batch_stats = model(of)
    asked = configs.change(of.config, search).search
    decode = jax.jit(inference.decoder(captioner, asked, configs.encoder_size(of.config), absent.anywhere(2)))
    traced = decode.trace(params, inference.look(captioner, params, batch_stats), jnp.zeros((4, 36, 36, 3), jnp.uint8))
    for platform in ("cuda", "tpu"):
        hlo = traced.lower(lowering_platforms=(platform,)).as_text()
        found = list(factors(hlo))
        assert {factor for _, *types in found for factor in types} == {"bf16"}
        assert of_float32(hlo)  # rounded logits would tie
        assert sum(operation == "convolution" for operation, *_ in found) == 49


def test_accelerators_run_the_recurrence_without_a_loop(model):
    """A loop's round is some six kernels, of which four only count and store."""
    for changes in ({}, {"decoder.image": "attention"}, {"decoder.name": "gru", "decoder.layers": 2}):
        of = settings("bfloat16", **changes)
        assert "stablehlo.while" not in step_of("cached", of, model).lower("cuda").as_text()
        of = settings("bfloat16", **changes, **{"decoder.unroll": 1})
        assert step_of("cached", of, model).lower("cuda").as_text().count("stablehlo.while") == 2 * of.config.decoder.layers


def test_the_loss_scatters_nothing(model):
    hlo = step_of("cached", settings("bfloat16"), model).lower("cuda").as_text()
    assert re.findall(r"stablehlo.scatter.*?-> tensor<(\w+)>", hlo, re.DOTALL) == ["60x16xf32"]  # the gradient of the word embeddings


def test_max_pools_have_a_gradient_that_scatters_nothing_on_nvidia_cards(model):
    of = settings("bfloat16", **{"encoder.name": "inception_v1", "encoder.size": 64, "data.size": 68})
    joint = step_of("joint", of, model)
    assert "select_and_scatter" not in joint.lower("cuda").as_text()
    assert joint.lower("tpu").as_text().count("stablehlo.select_and_scatter") == 13  # which TPUs have a routine for


def test_batch_statistics_and_their_gradient_are_two_sums_at_once_on_nvidia_cards(model):
    joint = step_of("joint", settings("bfloat16"), model)
    of_two = re.compile(r"stablehlo.reduce\(%\S+ init: %\S+\), \(%\S+ init: %\S+\) across dimensions = \[0, 1, 2\]")
    assert len(of_two.findall(joint.lower("cuda").as_text())) == 2 * 49  # as Lite0 has layers, forward and back
    assert not of_two.findall(joint.lower("tpu").as_text())


def test_a_frozen_encoder_is_given_folded_with_its_filters_in_the_order_that_cudnn_reads(model):
    of = settings("bfloat16")
    captioner, params, batch_stats = model(of)
    look = inference.look(captioner, params, batch_stats)
    decode = jax.jit(inference.decoder(captioner, of.config.search, configs.encoder_size(of.config), absent.anywhere(1)))
    frozen = step_of("frozen", of, model)
    given = decode.trace(params, look, jnp.zeros((4, 36, 36, 3), jnp.uint8)).lower(lowering_platforms=("cuda",))
    for lowered in (frozen.lower("cuda"), step_of("eval", of, model).lower("cuda"), given):
        assert "rsqrt" not in lowered.as_text()  # what folding begins with
    assert "rsqrt" in captioner.folded.trace(params, batch_stats).lower(lowering_platforms=("cuda",)).as_text()
    for leaves in map(jax.tree.leaves, (frozen._look, look)):
        shapes = {tuple(leaf.shape) for leaf in leaves if leaf.ndim == 4}
        assert (32, 3, 3, 3) in shapes and (3, 3, 3, 32) not in shapes
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    image_BHWC = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    found = captioner.frozen_encode(params, batch_stats)(image_BHWC)
    expected = dataclasses.replace(captioner, platform="tpu").frozen_encode(params, batch_stats)(image_BHWC)
    np.testing.assert_array_equal(found, expected)


def step_of(kind: str, of: Settings, model) -> workload.Step:
    return workload.Step(ALL[kind], of, *model(of), 8, devices=jax.devices()[:1])
