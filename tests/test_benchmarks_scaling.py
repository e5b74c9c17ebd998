"""What devices exchange in a step, counted in compiled programs, and tiny runs of the command. No speed is asserted."""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from benchmarks import scaling, workload
from benchmarks.scaling import Collective, collectives
from jaxcap.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_collectives_of_a_compiled_function():
    """On four devices, each with float32 [2, 3]: 24 bytes."""

    def exchange(x):
        total, scalar = jax.lax.psum((x[0], x.sum()), "data")  # 12 + 4 bytes
        everything = jax.lax.all_gather(x, "data")  # 96 bytes in the end
        share = jax.lax.psum_scatter(everything.reshape(4, 6).astype(jnp.bfloat16), "data")  # 48 bytes in the beginning
        turned = jax.lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)])  # 24 bytes
        swapped = jax.lax.all_to_all(jnp.stack([x, 2 * x, 3 * x, 4 * x]), "data", 0, 0)  # 96 bytes
        return x * (total + scalar) + everything.sum(0) + share.astype(jnp.float32).sum() + turned + swapped.sum(0)

    mesh, cut = Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec("data")
    program = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=cut, out_specs=cut)).lower(jnp.ones((8, 3))).compile()
    found = collectives(program.as_text(), 4)
    size = {operation: sum(c.bytes for c in found if c.operation == operation) for operation in scaling.OPERATIONS}
    # The CPU's compiler may sum bfloat16 as float32.
    assert size.pop("reduce-scatter") in (48, 96)
    assert size == {"all-reduce": 16, "all-gather": 96, "collective-permute": 24, "all-to-all": 96}
    assert sum(c.arrays for c in found if c.operation == "all-reduce") == 2


def test_collectives_that_are_begun_and_awaited():
    """As GPUs and TPUs have them: with layouts, comments, nested tuples, and an end that must not count again."""
    text = """
  %all-reduce-start.1 = (f32[10,2]{1,0:T(8,128)S(1)}, /*index=1*/bf16[5]{0}) all-reduce-start(%a, %b), replica_groups={{0,1}}
  %all-reduce-done.1 = (f32[10,2]{1,0}, bf16[5]{0}) all-reduce-done(%all-reduce-start.1)
  %all-gather-start = ((f32[4]{0}, u8[2]{0}), (f32[8]{0}, u8[4]{0})) all-gather-start(%a, %b), dimensions={0}
  %reduce-scatter-start.2 = ((f32[8]{0}), f32[4]{0}) reduce-scatter-start(%a), to_apply=%add
  %collective-permute-start = (f32[3,1]{1,0}, f32[3,1]{1,0}, u32[], u32[]) collective-permute-start(%a)
  ROOT %all-to-all.3 = s32[6]{0} all-to-all(%a), dimensions={0}
  %fusion = f32[99]{0} fusion(%all-reduce-done.1), calls=%all-reduce.wrapped, metadata={op_name="all-gather(x)"}
"""
    assert collectives(text, 2) == [
        Collective("all-reduce", 2, 90), Collective("all-gather", 2, 36), Collective("reduce-scatter", 1, 32),
        Collective("collective-permute", 1, 12), Collective("all-to-all", 1, 24)]


def test_bytes_sent_in_a_ring():
    assert Collective("all-reduce", 1, 800).sent(8) == 1400 and Collective("all-reduce", 1, 800).sent(1) == 0
    assert Collective("all-gather", 1, 800).sent(8) == Collective("reduce-scatter", 1, 800).sent(8) == 700
    assert Collective("collective-permute", 1, 800).sent(8) == 800


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run on two of the eight devices: its status, what it wrote, and the program that pmap ran."""
    path, programs, real = tmp_path_factory.mktemp("scaling") / "tiny.json", [], jax.pmap

    def spy(function, **options):
        mapped = real(function, **options)

        def call(*arguments):
            if not programs:
                programs.append(mapped.lower(*arguments).compile().as_text())
            return mapped(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "pmap", spy)
        status = scaling.main(["--tiny", "--devices", "2", "--kinds", "cached", "--per-device", "4", "--json", str(path)])
    return status, json.loads(path.read_text("utf-8")), programs


def test_a_step_exchanges_its_gradient_and_two_scalars(run):
    status, result, (program,) = run
    assert status == 0 and result["ok"] and result["virtual"]
    ours, theirs = result["results"]
    assert (ours["parallel"], theirs["parallel"]) == ("shard_map", "pmap") and ours["devices"] == theirs["devices"] == 2
    # Decoder of the miniature: 320 features, 60 words, embedding 16, LSTM 24; float32.
    size = 4 * (320 * 16 + 60 * 16 + 40 * 96 + 96 + 24 * 60 + 60) + 8
    assert ours["collectives"]["all-reduce"]["bytes"] == ours["bytes_expected"] == ours["bytes_sent_per_device"] == size
    assert ours["all_reduces_asked_for"] == 8 and ours["collectives"]["all-reduce"]["arrays"] == 8
    assert ours["collectives"]["all-reduce"]["count"] < 8
    # pmap's program, which the command cannot see, exchanges the same.
    assert sum(c.bytes for c in collectives(program, 2)) == size and theirs["collectives"] is None
    assert ours["weak"] == ours["strong"] and ours["weak"]["batch"] == 8  # of four photos a device, or of eight in all


def test_a_byte_too_many_is_wrong(run):
    result = run[1]["results"][0]
    assert scaling.as_expected(result)
    assert not scaling.as_expected(result | {"bytes_expected": result["bytes_expected"] - 1})
    assert scaling.as_expected(result | {"devices": 1, "collectives": {}})  # the compiler may see that nobody listens
    assert not scaling.as_expected(result | {"collectives": result["collectives"] | {"all-gather": {"count": 1, "bytes": 1}}})
    assert "WRONG" in scaling.rows([result | {"bytes_expected": 0}], virtual=True)[1][-2]


def test_only_real_devices_are_set_against_one():
    times = {"batch": 8, "ms": {"median": 10.0}}
    results = [{"kind": "joint", "parallel": "pmap", "devices": n, "weak": times | {"ms": {"median": weak}},
                "strong": times | {"ms": {"median": strong}}, "collectives": None}
               for n, weak, strong in ((1, 10, 10), (4, 12.5, 4))]
    assert [row[5] for row in scaling.rows(results, virtual=False)[1:]] == ["100 %", "80.0 %"]
    assert [row[8] for row in scaling.rows(results, virtual=False)[1:]] == ["1.00 ×", "2.50 ×"]
    assert [row[5] for row in scaling.rows(results, virtual=True)[1:]] == ["–", "–"]


def test_children_have_as_many_devices_as_asked_for(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    given = {"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=8", "HOME": "/x"}
    assert scaling.environment(2, given)["XLA_FLAGS"].split() == ["--xla_a=1", "--xla_force_host_platform_device_count=2"]
    arguments = argparse.Namespace(kinds=["joint"], parallel=["shard_map"], timed=[], per_device=2, batch=4, repeats=1,
                                   dtype="float32", tiny=True)
    (result,) = scaling.in_child([2], arguments)
    assert result["devices"] == 2 and result["weak"] is None and scaling.as_expected(result)
    # Besides the gradients of both halves, the encoder's statistics of batch norm are exchanged.
    of = workload.settings(tiny=True)
    assert result["bytes_expected"] == scaling.summed_bytes(of, "joint") > scaling.summed_bytes(of, "cached")


def test_rows_of_words_are_gathered_where_a_step_reads_few():
    """At 2 devices: 8 captions of 5 words, 40 rows of 16 numbers, and no sum over the table of 160."""
    of = dataclasses.replace(workload.settings(tiny=True), vocabulary=160)
    step = workload.Step(workload.KINDS["cached"], of, *workload.model(of), 8, devices=jax.devices()[:2])
    result = {"devices": 2} | scaling.exchanged(step, of, "cached", 2, batch=8)
    assert scaling.as_expected(result) and result["collectives"]["all-gather"]["bytes"] == 40 * 4 * (16 + 1)
    assert result["bytes_expected"] == scaling.summed_bytes(of, "cached") - 4 * 160 * 16
    assert scaling.expected_bytes(of, "cached", batch=16) == (scaling.summed_bytes(of, "cached"), 0)  # 80 rows are too many


def test_wrong_options_are_refused():
    with pytest.raises(UserError, match="--batch=8 cannot be divided by 3 devices"):
        scaling.main(["--tiny", "--devices", "3"])
