"""What a compiled program does, read out of its text (XLA's HLO after optimization): kernels, what they move and compute."""

import collections
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from benchmarks.scaling import OPERATIONS as EXCHANGES

PRODUCTS = ("convolution", "product")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota",
         "opt-barrier", "add-dependency"}  # XLA runs nothing for these
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<operation>[\w\-]+)\((?P<operands>[^)]*)\)(?P<rest>.*)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_HEADING = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*-> .*\{$")
_TARGET = r'custom_call_target="([^"]*)"'
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")


@dataclass(frozen=True)
class Kernel:
    """One thing that a device is sent to do.

    kind: "convolution", "product", "exchange" between devices, "copy", "reduction" or "other". times: that it runs in the program.
    scope: where in the source it comes from. bytes: that it reads and writes in device memory, each time, at least. flop: of its products,
    each time; on TPUs with those that meet padding. cycles: that XLA for TPUs expects, None elsewhere.
    """

    name: str
    kind: str
    scope: str
    shape: str
    times: int
    bytes: int
    flop: int
    cycles: int | None


class _Instruction:
    def __init__(self, match: re.Match):
        self.name, self.shape, self.operation, self.rest = match["name"], match["shape"], match["operation"], match["rest"]
        self.inside = match["operands"]
        self.operands = re.findall(r"%([\w.\-]+)", self.inside)

    @cached_property
    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """Element types and sides of what it gives."""
        return [(dtype, tuple(int(side) for side in sides.split(",") if side)) for dtype, sides in _ARRAY.findall(self.shape)]

    @cached_property
    def bytes(self) -> int:
        return sum(math.prod(sides) * _size(dtype) for dtype, sides in self.arrays)

    def called(self) -> str | None:
        match = _CALLED.search(self.rest)
        return match and match[1]

    def attribute(self, pattern: str) -> str | None:
        match = re.search(pattern, self.rest)
        return match and match[1]


class Program:
    """A compiled program, from `jax.stages.Compiled.as_text()`."""

    def __init__(self, hlo: str):
        self._computations, self._entry, name = {}, None, None
        for line in hlo.splitlines():
            if heading := _HEADING.match(line):
                name = heading["name"]
                self._computations[name] = {}
                self._entry = name if heading["entry"] else self._entry
            elif name and (match := _INSTRUCTION.match(line)):
                self._computations[name][match["name"]] = _Instruction(match)

    @cached_property
    def kernels(self) -> list[Kernel]:
        return list(self._kernels(self._entry, 1))

    def _kernels(self, name: str, times: int) -> Iterator[Kernel]:
        computation = self._computations[name]
        for instruction in computation.values():
            operation = instruction.operation
            if operation == "while":
                yield from self._kernels(instruction.attribute(r"body=%?([\w.\-]+)"), times * self._rounds(instruction))
            elif operation in ("call", "async-start"):
                yield from self._kernels(instruction.called(), times)
            elif operation == "conditional":
                branch = instruction.attribute(r"branch_computations=\{%?([\w.\-]+)") or instruction.attribute(r"true_computation=%?([\w.\-]+)")
                yield from self._kernels(branch, times)
            elif operation not in _FREE and not operation.endswith("-done"):
                yield self._kernel(instruction, computation, times)

    def _rounds(self, loop: _Instruction) -> int:
        """What XLA says, or what its counter is compared with; 1 where that is not a number."""
        known = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
        condition = self._computations[loop.attribute(r"condition=%?([\w.\-]+)")].values()
        limits = [each.inside for each in condition if each.operation == "constant" and each.inside.isdigit()]
        return int(known or (limits[0] if len(limits) == 1 else 1))

    def _kernel(self, instruction: _Instruction, computation: dict, times: int) -> Kernel:
        inside = self._computations.get(instruction.called() or "", {}) if instruction.operation == "fusion" else {}
        body = [*inside.values()] or [instruction]
        known = inside or computation
        cycles = instruction.attribute(r'estimated_cycles":"(\d+)"')
        return Kernel(
            instruction.name, _kind(instruction, body), re.sub(r"^jit\(\w+\)/", "", instruction.attribute(r'op_name="([^"]*)"') or ""),
            re.sub(r"\{[^}]*\}|/\*.*?\*/", "", instruction.shape), times, self._moved(instruction, computation, inside),
            sum(_flop(each, known) for each in body), int(cycles) if cycles else None)

    def _moved(self, instruction: _Instruction, computation: dict, inside: dict) -> int:
        """Of a slice's source only the slice is read, and of what is updated in place only the update is written (a scatter reads it too)."""
        operands = [computation[name] for name in instruction.operands if name in computation]
        if not inside:
            return _written(instruction, computation) + sum(operand.bytes for operand in operands)
        needed = _needed(inside)
        read = sum(min(needed[each.name], 1.0) * each.bytes for each in inside.values() if each.operation == "parameter")
        return _written([*inside.values()][-1], inside) + round(read)


def _written(instruction: _Instruction, known: dict) -> int:
    if instruction.operation == "dynamic-update-slice":
        return known[instruction.operands[1]].bytes if instruction.operands[1] in known else 0
    if instruction.operation == "scatter" and len(instruction.operands) == 3 and instruction.operands[2] in known:
        return 2 * known[instruction.operands[2]].bytes
    if instruction.operation in ("tuple", "bitcast"):
        return sum(_written(known[name], known) for name in instruction.operands if name in known)
    return instruction.bytes


def _needed(inside: dict) -> dict[str, float]:
    """What share of every value in a fused computation its result depends on: nothing else is read, or made, of it."""
    needed = collections.Counter({[*inside][-1]: 1.0})
    for user in reversed(inside.values()):
        for position, name in enumerate(user.operands):
            if name in inside:
                share = min(needed[user.name], 1.0)
                if position == 0 and user.operation in ("slice", "dynamic-slice", "gather"):
                    share *= user.bytes / inside[name].bytes
                elif position == 0 and user.operation in ("dynamic-update-slice", "scatter"):
                    share = 0.0
                needed[name] += share
    return needed


def _kind(instruction: _Instruction, body: list[_Instruction]) -> str:
    operations = {each.operation for each in body}
    target = instruction.attribute(_TARGET) or ""
    if "convolution" in operations or target.startswith("__cudnn$conv"):
        return "convolution"
    if "dot" in operations or target.startswith(("__cublas", "__onednn$matmul", "__triton")):
        return "product"
    if instruction.operation.removesuffix("-start") in EXCHANGES:
        return "exchange"
    if operations - _FREE <= {"copy", "copy-start", "transpose", "convert"}:
        return "copy"
    return "reduction" if operations & {"reduce", "reduce-window"} else "other"


def _flop(instruction: _Instruction, known: dict) -> int:
    """Two for every multiplication of a matrix product or convolution, 0 of anything else."""
    factors = [known[name] for name in instruction.operands if name in known]
    if len(factors) < 2:
        return 0
    (_, out), (_, left), (_, right) = (each.arrays[0] if each.arrays else ("", ()) for each in (instruction, *factors[:2]))
    target = instruction.attribute(_TARGET) or ""
    if instruction.operation == "dot" or target.startswith("__cublas"):
        axes = instruction.attribute(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)') or ""
        return 2 * math.prod(out) * math.prod(left[int(axis)] for axis in re.findall(r"\d+", axes))
    labels = instruction.attribute(r"dim_labels=\w+_(\w+)->")
    if not labels:
        return 0
    shown, kernel = {"__cudnn$convBackwardFilter": (right, out), "__cudnn$convBackwardInput": (left, right)}.get(target, (out, right))
    return 2 * math.prod(shown) * math.prod(kernel) // kernel[labels.index("o")]


def _size(dtype: str) -> float:
    return 1 if dtype == "pred" else int(bits[0]) / 8 if (bits := re.search(r"\d+", dtype)) else 0
