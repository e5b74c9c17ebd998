"""What GPUs and TPUs would be given to compile, read without one: every step lowers for them, in the arithmetic that was asked for.

Layers and pools have forms of their own on CPUs; that both forms give the same numbers is held in test_encoders.py.
"""

import dataclasses
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from benchmarks import workload
from benchmarks.workload import CACHED_8, FIVE, KINDS, Settings
from jaxcap import config as configs
from jaxcap import inference
from jaxcap.parallel import Parallel

ALL = {**KINDS, CACHED_8.name: CACHED_8, **FIVE}
_HEAVY = re.compile(r"stablehlo\.(dot_general|convolution).*: \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\) -> ")


def factors(hlo: str) -> Iterator[tuple[str, str, str]]:
    """Every matrix product and convolution of a program: its operation and the types of its two factors."""
    return (match.groups() for match in _HEAVY.finditer(hlo))


def of_float32(hlo: str) -> bool:
    """Whether some product over the vocabulary's 60 words is summed in float32."""
    return bool(re.search(r"stablehlo\.dot_general.* -> tensor<(?:\d+x)+60xf32>", hlo))


@pytest.fixture
def on_gpu(monkeypatch):
    """What depends on the processor when a captioner is built, as where JAX runs on a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def settings(dtype: str, **changes) -> Settings:
    of = workload.settings(tiny=True, dtype=dtype)
    small = {"encoder.name": "efficientnet_lite0", "encoder.size": 32, "data.size": 36}
    return dataclasses.replace(of, config=configs.change(of.config, small | changes))


@pytest.fixture
def model(on_gpu):
    made = {}

    def of(settings: Settings) -> tuple:
        if settings not in made:
            made[settings] = workload.model(settings)
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
    decode = jax.jit(inference.decoder(captioner, asked, configs.encoder_size(of.config), Parallel("shard_map", jax.devices()[:2])))
    traced = decode.trace(params, batch_stats, jnp.zeros((4, 36, 36, 3), jnp.uint8))
    for platform in ("cuda", "tpu"):
        hlo = traced.lower(lowering_platforms=(platform,)).as_text()
        found = list(factors(hlo))
        assert {factor for _, *types in found for factor in types} == {"bf16"}
        assert of_float32(hlo)  # rounded logits would tie
        assert sum(operation == "convolution" for operation, *_ in found) == 49
