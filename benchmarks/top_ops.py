"""Which operations the time of a step goes to, out of JAX's profiler."""

import collections
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks.timing import short, table as format_table

CALLS, SHOWN = 3, 20
_WRAPPERS = re.compile(r"(while|call|conditional|ThunkExecutor|end: )")  # their time is that of the operations inside


def trace(step: Callable[[], Any], directory: Path, scopes: dict[str, str], steps: int = 1) -> list[dict]:
    """Traces CALLS calls, of `steps` steps each, into `directory` (for TensorBoard or Perfetto) and returns the slowest operations, by XLA's names.

    Each is `{"op", "scope", "ms", "calls"}`, per step; on a CPU the milliseconds are added up over threads.
    """
    with jax.profiler.trace(str(directory)):
        for _ in range(CALLS):
            waiting = step()
        jax.block_until_ready(waiting)
    path = max(directory.rglob("*.xplane.pb"), key=lambda found: found.stat().st_mtime)
    ms, calls = collections.Counter(), collections.Counter()
    for name, duration_ms in _events(jax.profiler.ProfileData.from_file(str(path))):
        ms[name] += duration_ms / (CALLS * steps)
        calls[name] += 1 / (CALLS * steps)
    return [{"op": name, "scope": scopes.get(name, ""), "ms": spent, "calls": calls[name]}
            for name, spent in ms.most_common()]


def scopes(hlo: str) -> dict[str, str]:
    """Where in the source each operation of a compiled program comes from, by its name."""
    return {name: re.sub(r"^jit\(train_steps?\)/", "", scope)
            for name, scope in re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', hlo, re.MULTILINE)}


def table(ops: list[dict]) -> str:
    """The slowest operations as lines for a terminal."""
    total = sum(op["ms"] for op in ops) or 1
    lines = [["operation", "ms", "share", "calls", "from"]]
    for op in ops[:SHOWN]:
        lines.append([op["op"][:48], short(op["ms"]), f"{100 * op['ms'] / total:.1f} %", short(op["calls"]), op["scope"][-70:]])
    return format_table(lines)


def _events(profile: jax.profiler.ProfileData) -> Iterator[tuple[str, float]]:
    """Name and milliseconds of everything that XLA ran: on GPUs and TPUs the devices' lines, else the host's threads."""
    planes = [plane for plane in profile.planes if plane.name.startswith("/device:")]
    planes = [plane for plane in planes if any(True for line in plane.lines for _ in line.events)]
    for plane in planes or profile.planes:
        lines = list(plane.lines)
        if planes:  # a line of whole operations where there is one (TPU), else one a stream (GPU)
            whole = [line for line in lines if line.name == "XLA Ops"]
            lines = whole or [line for line in lines if line.name.startswith("Stream")]
        for line in lines:
            for event in line.events:
                op = dict(event.stats).get("hlo_op")
                if (op or planes) and not _WRAPPERS.match(op or event.name):
                    yield str(op or event.name), event.duration_ns / 1e6
