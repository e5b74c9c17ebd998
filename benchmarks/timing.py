"""What the benchmarks share: timing of repeated calls, what a machine is and could do at best, tables, result files."""

import argparse
import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxcap import memory, parallel
from jaxcap.errors import UserError

REPEAT_S = 0.5  # a repeat goes on for about as long, at least one step
SLOW_STEP_S = 2.0  # from here on a step is its own warm-up, and FEWEST repeats are enough
MOST, FEWEST = 10, 5  # repeats
BUSY = 0.3  # load a core before the start from which others are at work


@dataclass(frozen=True)
class Peak:
    """The most that one device can do: dense arithmetic in TFLOP/s by dtype, memory in GB/s.

    float32 is what XLA makes of a float32 matrix product unless told otherwise: TF32 on NVIDIA cards from Ampere on, one
    bfloat16 pass on TPUs. None is not known, or nothing the device has.
    """

    float32: float | None
    bfloat16: float | None
    gb_per_s: float | None


# The makers' datasheets, by words in `jax.Device.device_kind`; the first that fits counts.
PEAKS = {
    "GH200 144G": Peak(494, 989, 4900),
    "GH200": Peak(494, 989, 4000),
    "H200 NVL": Peak(418, 835, 4800),
    "H200": Peak(494, 989, 4800),
    "H100 PCIe": Peak(378, 756, 2000),
    "H100 NVL": Peak(418, 835, 3900),
    "H100": Peak(494, 989, 3350),
    "A100-SXM4-80GB": Peak(156, 312, 2039),
    "A100 80GB PCIe": Peak(156, 312, 1935),
    "A100": Peak(156, 312, 1555),
    "L40S": Peak(183, 362, 864),
    "L40": Peak(90.5, 181, 864),
    "L4": Peak(60, 121, 300),
    "RTX 4090": Peak(82.6, 165, 1008),
    "RTX 3090 Ti": Peak(40, 80, 1008),
    "RTX 3090": Peak(35.6, 71, 936),
    "V100-PCIE": Peak(14, None, 900),
    "V100": Peak(15.7, None, 900),
    "Tesla T4": Peak(8.1, None, 320),
    "TPU v6 lite": Peak(918, 918, 1640),
    "TPU v5 lite": Peak(197, 197, 819),
    "TPU v5": Peak(459, 459, 2765),
    "TPU v4": Peak(275, 275, 1228),
}


_SMALLER = re.compile(r"Laptop|4090 D|MIG")  # other chips of those names, and slices of one


def peak(device_kind: str) -> Peak | None:
    """The device's peak, None where it is not in the table (as for CPUs)."""
    if _SMALLER.search(device_kind):
        return None
    return next((values for name, values in PEAKS.items() if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", device_kind)), None)


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call in every repeat, each the mean over `calls` calls."""

    repeats_ms: tuple[float, ...]
    calls: int

    @property
    def ms(self) -> float:
        """The median over the repeats."""
        return statistics.median(self.repeats_ms)

    @property
    def spread(self) -> str:
        return f"{short(min(self.repeats_ms))} – {short(max(self.repeats_ms))}"

    def to_dict(self) -> dict:
        return {"median": self.ms, "min": min(self.repeats_ms), "max": max(self.repeats_ms),
                "repeats": list(self.repeats_ms), "calls_per_repeat": self.calls}


def initialize() -> None:
    """`jaxcap.parallel.initialize`, but programs are compiled anew unless JAX_COMPILATION_CACHE_DIR asks for a cache."""
    parallel.initialize()
    jax.config.update("jax_enable_compilation_cache", "JAX_COMPILATION_CACHE_DIR" in os.environ)


def time_calls(call: Callable[[], Any], *, repeats: int = 0, calls: int = 0, steps: int = 1) -> Timing:
    """Times a function that is compiled already and that returns what has to be waited for.

    Every repeat dispatches `calls` calls without waiting in between, as training does, and then waits for the device. The
    first calls warm up and do not count. With 0 the numbers follow from the warm-up: MOST repeats of about REPEAT_S, or
    FEWEST of one call where a call takes longer than SLOW_STEP_S. A call takes `steps` steps: times are those of one.
    """

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            waiting = call()
        jax.block_until_ready(waiting)
        return (time.perf_counter() - start) / count

    one_s = run(1)
    if one_s < SLOW_STEP_S:
        one_s = run(2)
    calls = calls or max(round(REPEAT_S / one_s), 1)
    repeats = repeats or (MOST if one_s < SLOW_STEP_S else FEWEST)
    return Timing(tuple(1000 * run(calls) / steps for _ in range(repeats)), calls)


def machine() -> dict:
    """Everything that a number needs beside it: devices, processor, versions, commit, date, and how busy the machine is."""
    devices = jax.devices()
    return {
        "platform": devices[0].platform, "device": _processor() if devices[0].platform == "cpu" else devices[0].device_kind,
        "devices": len(devices), "processor": _processor(), "cores": memory.cores(), "load": round(os.getloadavg()[0], 1),
        "jax": jax.__version__, "python": platform.python_version(), "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(sys.orig_argv[1:]),
    }


def busy(about: dict) -> bool:
    """Whether others were at work on the machine of that description."""
    return about["load"] > BUSY * about["cores"]


def calm_torch(about: dict) -> str | None:
    """Before PyTorch is imported: where others want the cores, its threads sleep while they wait for each other. By default they
    spin, which then makes it several times slower. Returns OMP_WAIT_POLICY."""
    if busy(about):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return os.environ.get("OMP_WAIT_POLICY")


def torch_here() -> tuple[Any, Any]:
    """PyTorch, for --peer, and the device of it that JAX has here. Raises `UserError` where it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise UserError("--peer needs torch: pip install torch, or leave --peer out") from error
    return torch, torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")


def describe(about: dict) -> str:
    """A machine in a line or two."""
    name = f"{about['devices']} × {about['device']}" if about["platform"] != "cpu" else about["device"]
    line = f"{name}, {about['cores']} cores · jax {about['jax']} · {about['date']} · commit {about['commit'] or 'unknown'}"
    if busy(about):
        line += f"\nload {about['load']} on {about['cores']} cores before the start: others work here, so trust ratios only"
    return line


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first of them the heading, as lines for a terminal: first column left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])


def short(number: float | None, unit: str = "") -> str:
    """A number in three or four digits; a dash where there is none."""
    if number is None:
        return "–"
    digits = 0 if abs(number) >= 100 else 1 if abs(number) >= 10 else 2 if abs(number) >= 1 else 3
    return f"{number:,.{digits}f}{unit}"


def count(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def amount(text: str) -> float:
    """An argument that is a finite number above 0."""
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, not {text}")
    return number


# Of a result file, of its machine, and of the settings of steps: what whoever reads it relies on.
_WRITTEN = {"title", "machine", "ok", "results", "table"}
_MACHINE = {"platform", "device", "devices", "cores", "load", "jax", "date", "commit"}
_SETTINGS = {"config", "vocabulary", "tokens", "tiny"}


class ResultFile:
    """A benchmark's JSON file: `PATH.partial` while it runs, so that a run that is cut short leaves what it has.

    path: None writes nothing.
    """

    def __init__(self, path: Path | None, title: str):
        if path is not None and path.is_dir():
            raise UserError(f"--json {path} is a directory; name a file")
        make_directory("--json", path and path.parent)
        self.path, self.result = path, {"title": title, "machine": machine(), "ok": True, "results": [], "table": []}

    def save(self, rows: Sequence[Sequence[str]], *, finished: bool = False) -> None:
        self.result["table"] = [list(row) for row in rows]
        if self.path is None:
            return
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            partial.write_text(json.dumps(self.result, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
            if finished:
                os.replace(partial, self.path)
        except OSError as error:
            raise UserError(f"--json {self.path} cannot be written: {error.strerror or error}") from error


def make_directory(option: str, path: Path | None) -> None:
    """Makes the directory that an option names, if it does, for files to come. Raises `UserError` if none can be written there."""
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written to: {error.strerror or error}; name another directory") from error


def read_result(path: Path, benchmark: str = "") -> dict:
    """What a benchmark wrote with --json or, named, `benchmarks.BENCHMARK`, whose title begins with its name and which times or
    compiles steps of some settings. Raises `UserError` where it did not."""
    try:
        result = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    try:
        written = (_WRITTEN <= set(result) and _MACHINE <= set(result["machine"]) and result["title"].startswith(benchmark and f"{benchmark} ")
                   and len({len(row) for row in result["table"]}) == 1 and (not benchmark or _SETTINGS <= set(result["settings"])))
    except (AttributeError, KeyError, TypeError):
        written = False
    if not written:
        writer = f"benchmarks.{benchmark}" if benchmark else "a benchmark's"
        raise UserError(f"{path} was not written by {writer} --json")
    return result


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
