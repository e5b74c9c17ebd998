"""The host's cores, and its memory: kept from one step to the next, as long as there is enough."""

import ctypes
import functools
import os
import sys
from pathlib import Path


def cores() -> int:
    """Cores that the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") else None


def keep() -> None:
    """Has glibc keep what is freed; to be called before JAX starts its threads. Other C libraries are left alone.

    A step on a CPU takes its memory from it and gives it back at its end, and glibc by itself hands large pieces back to the
    kernel, so that every step pays anew for zeroed pages: a third of its time and more (benchmarks/RECORDS.md). The price is
    that the process stays as large as it ever was, and that holes between the pieces make it larger: see `relieve`.
    """
    if _library():
        # M_MMAP_MAX 0: the heap serves large pieces too. M_TRIM_THRESHOLD -1: its top is never handed back. M_ARENA_MAX 1:
        # all threads share it, for heaps of other threads are small.
        for setting, value in ((-4, 0), (-1, -1), (-8, 1)):
            _library().mallopt(setting, value)


def relieve() -> None:
    """Hands back what is free once the process holds more than half of the memory that it may have."""
    if _library() and resident() > allowed() / 2:
        _library().malloc_trim(0)


def resident() -> int:
    """Bytes of the machine's memory that the process holds (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def allowed() -> int:
    """Bytes that the process may hold: the machine's memory or, in a container, its limit."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return min(physical, int(Path(path).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return physical
