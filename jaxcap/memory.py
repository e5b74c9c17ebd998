"""The host's memory: kept from one step to the next."""

import ctypes
import sys


def keep() -> None:
    """Has the C library keep what is freed, where it is glibc; to be called before JAX starts its threads.

    A step on a CPU takes its memory from it and gives it back at its end, and glibc by itself hands large pieces back to the kernel, so
    that every step pays anew for zeroed pages: a third of its time and more (benchmarks/RECORDS.md). The price is that
    the process stays as large as it ever was, and that holes between the pieces may make it larger.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        # M_MMAP_MAX 0: the heap serves large pieces too. M_TRIM_THRESHOLD -1: its top is never handed back. M_ARENA_MAX 1:
        # all threads share it, for heaps of other threads are small.
        for setting, value in ((-4, 0), (-1, -1), (-8, 1)):
            library.mallopt(setting, value)
