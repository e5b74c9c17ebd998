"""The host's cores, and its memory: kept from one step to the next, as long as there is enough."""

import ctypes
import functools
import os
import sys
import threading
from pathlib import Path

kept = False  # once `keep` was called
holes = threading.Event()  # set where something large was compiled while the heap is kept
_HUGE_PAGE, _MADV_HUGEPAGE = 2 << 20, 14
_HOLE_BYTES = 8 << 10, 64 << 20  # of those to close: smaller ones are in lists of few sizes, larger ones go piece by piece


def cores() -> int:
    """Cores that the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Mallinfo(ctypes.Structure):
    """What mallinfo2(3) tells; keepcost: bytes of the heap's free top."""

    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "mallopt"):
        return None
    library.malloc.argtypes, library.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    library.free.argtypes = (ctypes.c_void_p,)
    library.sbrk.argtypes, library.sbrk.restype = (ctypes.c_ssize_t,), ctypes.c_void_p
    library.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    if hasattr(library, "mallinfo2"):  # glibc from 2.33 on
        library.mallinfo2.restype = _Mallinfo
    return library


def keep() -> None:
    """Has glibc keep what is freed; to be called before JAX starts its threads. Other C libraries are left alone.

    A step on a CPU takes its memory from it and gives it back at its end, and glibc by itself hands large pieces back to the
    kernel, so that every step pays anew for zeroed pages: a third of its time and more (benchmarks/RECORDS.md). The price is
    that the process stays as large as it ever was, and that holes between the pieces make it larger: see `relieve`.
    """
    global kept
    kept = True
    if _library():
        # M_MMAP_MAX 0: the heap serves large pieces too. M_TRIM_THRESHOLD -1: its top is never handed back. M_ARENA_MAX 1:
        # all threads share it, for heaps of other threads are small.
        for setting, value in ((-4, 0), (-1, -1), (-8, 1)):
            _library().mallopt(setting, value)
        _ask_for_huge_pages()


def _ask_for_huge_pages() -> None:
    """Has the heap made of pages of 2 MiB where the kernel waits to be asked for them, as Ubuntu's does: the large maps of a step lie on
    hundreds of thousands of 4 KiB, more than a core finds quickly.

    Only of addresses that the heap has can be asked, so it takes as many as `relieve` lets the process hold; memory comes when it is used.
    """
    library, size = _library(), allowed() // 2
    if _waits_to_be_asked() and (piece := library.malloc(size)):
        start = -(-piece // _HUGE_PAGE) * _HUGE_PAGE
        library.madvise(start, piece + size - start, _MADV_HUGEPAGE)
        library.free(piece)


@functools.cache
def _waits_to_be_asked() -> bool:
    """Whether the kernel gives huge pages to those that ask, and does not count addresses as memory."""
    try:
        return ("[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
                and Path("/proc/sys/vm/overcommit_memory").read_text().strip() != "2")
    except OSError:
        return False


def relieve() -> None:
    """Closes `holes`, if there are; hands back what is free once the process holds more than half of the memory that it may have."""
    if holes.is_set():
        holes.clear()
        _close_holes()
    if _library() and resident() > allowed() / 2:
        _library().malloc_trim(0)
        _ask_for_huge_pages()


def _close_holes() -> None:
    """Hands back the pages of all that is free in the heap and takes its holes, but the small ones, out of use.

    Compiling a large program leaves tens of thousands, of as many sizes, in lists that glibc walks for every large piece: in a joint
    step of Inception V3 that is a tenth of the time, and the memory of a step no longer fits where that of the last one was. What is
    lost are addresses, not memory.
    """
    library = _library()
    if not hasattr(library, "mallinfo2"):
        return
    library.malloc_trim(0)
    top, size = library.sbrk(0) - library.mallinfo2().keepcost, _HOLE_BYTES[1]
    while size >= _HOLE_BYTES[0]:
        while 0 < (piece := library.malloc(size) or 0) < top:
            pass  # it stays taken
        library.free(piece)  # it was no hole, but of the top
        size = 3 * size // 4
    _ask_for_huge_pages()


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
