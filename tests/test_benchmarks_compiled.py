"""What is read out of compiled programs, of devices that are here and, where XLA's compiler for them is installed, that are not."""

import json
from importlib import util

import jax
import jax.numpy as jnp
import pytest

from benchmarks import absent, compiled, step_time
from benchmarks.program import Program
from benchmarks.projection import RECORDS
from jaxcap.errors import UserError

pytestmark = pytest.mark.usefixtures("compiled_as_for_users")

# As XLA prints a program for a GPU, shortened: a loop of three rounds around a product that reads a slice and updates in place,
# a convolution of 2 × 8 × 8 × 16 by 3 × 3 to 32 channels, and its two gradients by cuDNN.
GPU = '''\
HloModule jit_step, is_scheduled=true

%fused_dot (parameter_0: bf16[3,4,8], parameter_1: bf16[8,16], parameter_2: s32[]) -> f32[4,16] {
  %parameter_0 = bf16[3,4,8]{2,1,0} parameter(0)
  %parameter_2 = s32[] parameter(2)
  %slice = bf16[1,4,8]{2,1,0} dynamic-slice(%parameter_0, %parameter_2, %parameter_2, %parameter_2), dynamic_slice_sizes={1,4,8}
  %flat = bf16[4,8]{1,0} bitcast(%slice)
  %parameter_1 = bf16[8,16]{1,0} parameter(1)
  ROOT %dot = f32[4,16]{1,0} dot(%flat, %parameter_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_update (stack: f32[3,4,16], row: f32[4,16], i: s32[]) -> f32[3,4,16] {
  %stack = f32[3,4,16]{2,1,0} parameter(0)
  %row = f32[4,16]{1,0} parameter(1)
  %one = f32[1,4,16]{2,1,0} bitcast(%row)
  %i = s32[] parameter(2)
  ROOT %update = f32[3,4,16]{2,1,0} dynamic-update-slice(%stack, %one, %i, %i, %i)
}

%fused_scatter (table: f32[100,16], places: s32[4], rows: f32[4,16]) -> f32[100,16] {
  %table = f32[100,16]{1,0} parameter(0)
  %places = s32[4]{0} parameter(1)
  %rows = f32[4,16]{1,0} parameter(2)
  ROOT %scatter = f32[100,16]{1,0} scatter(%table, %places, %rows), update_window_dims={1}, inserted_window_dims={0}, to_apply=%fused_next
}

%body (carry: (s32[], f32[3,4,16], bf16[3,4,8], bf16[8,16])) -> (s32[], f32[3,4,16], bf16[3,4,8], bf16[8,16]) {
  %carry = (s32[], f32[3,4,16]{2,1,0}, bf16[3,4,8]{2,1,0}, bf16[8,16]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%carry), index=0
  %stacked = f32[3,4,16]{2,1,0} get-tuple-element(%carry), index=1
  %x = bf16[3,4,8]{2,1,0} get-tuple-element(%carry), index=2
  %kernel = bf16[8,16]{1,0} get-tuple-element(%carry), index=3
  %product = f32[4,16]{1,0} fusion(%x, %kernel, %at), kind=kCustom, calls=%fused_dot, metadata={op_name="jit(step)/while/body/dot_general" stack_frame_id=1}
  %stored = f32[3,4,16]{2,1,0} fusion(%stacked, %product, %at), kind=kLoop, calls=%fused_update
  %next = s32[] fusion(%at), kind=kLoop, calls=%fused_next
  ROOT %carried = (s32[], f32[3,4,16]{2,1,0}, bf16[3,4,8]{2,1,0}, bf16[8,16]{1,0}) tuple(%next, %stored, %x, %kernel)
}

%fused_next (j: s32[]) -> s32[] {
  %j = s32[] parameter(0)
  %unit = s32[] constant(1)
  ROOT %added = s32[] add(%j, %unit)
}

%condition (carried.1: (s32[], f32[3,4,16], bf16[3,4,8], bf16[8,16])) -> pred[] {
  %carried.1 = (s32[], f32[3,4,16]{2,1,0}, bf16[3,4,8]{2,1,0}, bf16[8,16]{1,0}) parameter(0)
  %limit = s32[] constant(3)
  %counter = s32[] get-tuple-element(%carried.1), index=0
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}

ENTRY %main (photo: bf16[2,8,8,16], filter: bf16[32,3,3,16], start: (s32[], f32[3,4,16], bf16[3,4,8], bf16[8,16])) -> f32[3,4,16] {
  %photo = bf16[2,8,8,16]{3,2,1,0} parameter(0)
  %filter = bf16[32,3,3,16]{3,2,1,0} parameter(1)
  %cudnn-conv.1 = (bf16[2,8,8,32]{3,2,1,0}, u8[0]{0}) custom-call(%photo, %filter), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %y = bf16[2,8,8,32]{3,2,1,0} get-tuple-element(%cudnn-conv.1), index=0
  %cudnn-conv-bw-filter.1 = (bf16[32,3,3,16]{3,2,1,0}, u8[0]{0}) custom-call(%photo, %y), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %cudnn-conv-bw-input.1 = (bf16[2,8,8,16]{3,2,1,0}, u8[0]{0}) custom-call(%y, %filter), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %start = (s32[], f32[3,4,16]{2,1,0}, bf16[3,4,8]{2,1,0}, bf16[8,16]{1,0}) parameter(2)
  %copy.1 = bf16[2,8,8,16]{3,2,1,0} copy(%photo)
  %words = f32[100,16]{1,0} parameter(3)
  %read = s32[4]{0} parameter(4)
  %change = f32[4,16]{1,0} parameter(5)
  %learned = f32[100,16]{1,0} fusion(%words, %read, %change), kind=kCustom, calls=%fused_scatter
  %all-reduce.1 = bf16[2,8,8,32]{3,2,1,0} all-reduce(%y), replica_groups={}
  %loop = (s32[], f32[3,4,16]{2,1,0}, bf16[3,4,8]{2,1,0}, bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %result = f32[3,4,16]{2,1,0} get-tuple-element(%loop), index=1
}
'''


def test_a_program_s_kernels_are_counted_with_what_they_move_and_compute():
    kernels = {kernel.name: kernel for kernel in Program(GPU).kernels}
    assert {name: (kernel.kind, kernel.times) for name, kernel in kernels.items()} == {
        "cudnn-conv.1": ("convolution", 1), "cudnn-conv-bw-filter.1": ("convolution", 1), "cudnn-conv-bw-input.1": ("convolution", 1),
        "copy.1": ("copy", 1), "all-reduce.1": ("exchange", 1), "product": ("product", 3), "stored": ("other", 3), "next": ("other", 3),
        "learned": ("other", 1)}
    assert kernels["product"].scope == "while/body/dot_general"
    assert kernels["product"].flop == 2 * 4 * 8 * 16
    assert kernels["product"].bytes == 2 * 4 * 8 + 2 * 8 * 16 + 4 * 4 * 16 + 4  # of the stack only the slice, and the counter
    assert kernels["stored"].bytes == 2 * 4 * 4 * 16 + 4  # the row is read and written, the stack is left alone
    assert kernels["learned"].bytes == 4 * (4 + 3 * 4 * 16)  # rows are read, and those of the table read and written
    convolution = 2 * (2 * 8 * 8 * 32) * (3 * 3 * 16)
    assert {kernel.flop for kernel in kernels.values() if kernel.kind == "convolution"} == {convolution}
    assert kernels["cudnn-conv.1"].bytes == 2 * (2 * 8 * 8 * 16 + 32 * 3 * 3 * 16 + 2 * 8 * 8 * 32)
    assert all(kernel.cycles is None for kernel in kernels.values())


# As XLA hands products to cuBLAS: one by itself, and three of a batch with a workspace beside their result.
CUBLAS = '''\
HloModule jit_step, is_scheduled=true

ENTRY %main (x: bf16[4,8], kernel: bf16[16,8], stack: f8e4m3fn[3,8,4], stacked: f8e4m3fn[3,8,16]) -> f32[3,4,16] {
  %x = bf16[4,8]{1,0} parameter(0)
  %kernel = bf16[16,8]{1,0} parameter(1)
  %stack = f8e4m3fn[3,8,4]{2,1,0} parameter(2)
  %stacked = f8e4m3fn[3,8,16]{2,1,0} parameter(3)
  %gemm = bf16[4,16]{1,0} custom-call(%x, %kernel), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"epilogue":"DEFAULT"}}
  %matmul = (f32[3,4,16]{2,1,0}, s8[4194304]{0}) custom-call(%stack, %stacked), custom_call_target="__cublas$lt$matmul$f8", backend_config={"gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":{"lhs_batch_dimensions":["0"],"lhs_contracting_dimensions":["1"],"rhs_batch_dimensions":["0"],"rhs_contracting_dimensions":["1"]},"epilogue":"DEFAULT"}}
  ROOT %result = f32[3,4,16]{2,1,0} get-tuple-element(%matmul), index=0
}
'''


def test_products_that_cublas_takes_are_counted():
    assert {kernel.name: (kernel.kind, kernel.flop) for kernel in Program(CUBLAS).kernels} == {
        "gemm": ("product", 2 * 4 * 8 * 16), "matmul": ("product", 2 * 3 * 4 * 8 * 16)}


def test_where_xla_does_not_say_how_often_a_loop_turns_its_condition_does():
    silent = GPU.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
    assert silent != GPU
    assert [k.times for k in Program(silent).kernels] == [k.times for k in Program(GPU).kernels]
    endless = silent.replace("constant(3)", "parameter(1)")
    assert {k.times for k in Program(endless).kernels} == {1}


def test_cycles_that_xla_for_tpus_expects_are_read():
    tpu = GPU.replace("calls=%fused_dot", 'calls=%fused_dot, backend_config={"window_config":{"estimated_cycles":"1832"}}')
    assert [k.cycles for k in Program(tpu).kernels if k.cycles] == [1832]


def test_a_program_of_this_machine_is_read():
    def rounds(x, kernel):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ kernel), None), x, length=5)[0]

    hlo = jax.jit(rounds).lower(jnp.ones((64, 128)), jnp.ones((128, 128))).compile().as_text()
    (product,) = [kernel for kernel in Program(hlo).kernels if kernel.kind == "product"]
    assert (product.times, product.flop) == (5, 2 * 64 * 128 * 128)
    assert product.bytes == 4 * (2 * 64 * 128 + 128 * 128)


def test_the_command_reads_steps_and_sets_them_beside_earlier_ones(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    arguments = ["--device", "cpu", "--tiny", "--kinds", "cached", "--batch", "8", "--dtype", "float32"]
    assert compiled.main([*arguments, "--json", str(old), "--text", str(tmp_path / "text")]) == 0
    assert compiled.main([*arguments, "--json", str(new), "--compare", str(old), "--largest", "3", "decoder.hidden=48"]) == 0
    (before,), (after,) = (json.loads(path.read_text())["results"] for path in (old, new))
    assert before["kernels"] > 20
    assert before["gflop"] < after["gflop"]
    assert before["largest"] == sorted(before["largest"], key=lambda kernel: -kernel["mb"])
    assert Program((tmp_path / "text" / "cached-8.txt").read_text()).kernels
    said = capsys.readouterr().out
    assert "against commit" in said and said.count("beware") == 1 and "the settings differ, decoder.hidden: 24 → 48" in said
    assert f"{before['kernels']:.0f} → {after['kernels']:.0f}" in said
    assert "\ncached, batch 8\n" in said


def test_what_stays_on_the_device_is_as_large_as_asked_for_and_read_in_part(tmp_path):
    path, of = tmp_path / "steps.json", []
    for resident in ("8", "4008"):
        assert compiled.main(["--device", "cpu", "--tiny", "--kinds", "eval", "--resident", resident, "--json", str(path)]) == 0
        of += json.loads(path.read_text())["results"]
    small, large = of
    assert large["program_gib"] - small["program_gib"] == pytest.approx(4000 * 32 * 32 * 3 / 2**30)
    assert large["gb"] == pytest.approx(small["gb"], rel=1e-6)


def test_programs_that_do_not_compare_are_told_apart():
    file = json.loads((RECORDS / "2026-11-27-compiled-h200.json").read_text("utf-8"))
    assert "beware" not in compiled.comparison(file, file)
    other = file | {"device": file["device"] | {"count": 8}, "machine": file["machine"] | {"jax": "0.1"},
                    "settings": file["settings"] | {"tiny": True, "resident": 6000}}
    warnings = [line for line in compiled.comparison(file, other).splitlines() if "beware" in line]
    assert warnings == ["  beware: devices differs: 1 → 8", f"  beware: jax differs: {file['machine']['jax']} → 0.1",
                        "  beware: resident differs: the benchmark's own few → 6000", "  beware: the settings differ, tiny: False → True"]
    assert compiled.comparison(file, file | {"results": []}) == "nothing to compare: no step and batch is in both"


@pytest.mark.parametrize("module", [compiled, step_time])
def test_a_directory_that_cannot_be_written_to_is_refused_before_anything_is_compiled(module, tmp_path):
    (tmp_path / "file").write_text("")
    option = {compiled: "--text", step_time: "--profile"}[module]
    with pytest.raises(UserError, match=f"{option} .*/file/here cannot be written to: Not a directory; name another directory"):
        module.main(["--tiny", "--kinds", "cached", option, str(tmp_path / "file" / "here")])


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--device", "cpu", "--devices", "99"], "cpu has [0-9]+ devices?, so programs for 99 cannot be made"),
    (["--device", "cpu", "--devices", "2", "--batch", "8", "7"], "--batch 7 cannot be divided by 2 devices"),
    (["--compare", "nowhere.json"], "nowhere.json cannot be read"),
    (["--device", "cpu", "--compare", str(RECORDS / "2026-11-26-compiled-h200.json")], "compiled for h200, not for cpu"),
])
def test_what_cannot_be_compiled_is_said(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        compiled.main(["--tiny", *arguments])


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(absent, "_installed", lambda module: False)
    with pytest.raises(UserError, match=r"needs JAX's CUDA plugin, though no GPU: pip install 'jaxcap\[cuda\]'"):
        absent.devices("h200", 1)
    with pytest.raises(UserError, match=r"--device v5e:2x2: neither a card of .* needs libtpu, though no TPU: pip install 'jaxcap\[tpu\]'"):
        absent.devices("v5e:2x2", 1)


def compilers() -> list[str]:
    return ["v5e:2x2"] * (util.find_spec("libtpu") is not None) + ["h200"] * any(map(absent._installed, absent.CUDA_PLUGINS))


@pytest.mark.skipif(not compilers(), reason="XLA's compilers for TPUs and GPUs are not installed (pip install '.[tpu]' or '.[cuda]')")
@pytest.mark.parametrize("device", compilers())
def test_the_steps_compile_for_accelerators_that_are_not_here(device, tmp_path):
    path = tmp_path / "steps.json"
    assert compiled.main(["--device", device, "--devices", "2", "--tiny", "--kinds", "cached", "joint", "--batch", "8", "--json", str(path)]) == 0
    for result in json.loads(path.read_text())["results"]:
        assert result["by_kind"]["convolution" if result["kind"] == "joint" else "product" if device == "h200" else "convolution"] > 0
        assert result["by_kind"]["exchange"] >= 1
        assert result["at_peak_ms" if device == "h200" else "expected_ms"] > 0
    if device != "h200":
        with pytest.raises(UserError, match="--device v9z:2x2: neither a card of a100, h100, h200 nor cpu, and libtpu knows no such TPU"):
            absent.devices("v9z:2x2", 1)
