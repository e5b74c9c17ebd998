"""What a step frees stays with the process, and only as many steps are in line as their memory allows."""

import ctypes
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxcap import memory, parallel

# Runs a program that needs 128 MiB, again and again, and prints how many pages the kernel had to bring for the last twenty times.
PAGES = """
import resource
import jax, jax.numpy as jnp
from jaxcap import parallel
parallel.initialize()
ask = jax.jit(lambda x: jnp.outer(x, x) + 1)
x = jnp.ones(5793)
for _ in range(100):  # until the holes that small pieces leave are found, which takes longer on a busy machine
    ask(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    ask(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(**environment: str) -> int:
    done = subprocess.run([sys.executable, "-c", PAGES], env={**os.environ, "JAX_PLATFORMS": "cpu", **environment}, text=True, capture_output=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_kept_for_the_next_step():
    kept, given_back = pages(JAXCAP_KEEP_MEMORY="1"), pages(JAXCAP_KEEP_MEMORY="0")
    assert given_back > 20 * 50  # pages of 2 MiB would still be 64 a call
    assert kept < given_back / 10


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_memory_is_handed_back_where_it_becomes_too_much():
    code = """
import ctypes
from jaxcap import memory
memory.keep()
pieces = [ctypes.create_string_buffer(1 << 20) for _ in range(200)]
for piece in pieces:
    ctypes.memset(piece, 1, len(piece))
last = ctypes.create_string_buffer(1 << 10)  # what is freed lies below it
del pieces, piece
print(memory.resident() >> 20)
memory.relieve()
print(memory.resident() >> 20)
memory.allowed = lambda: 100 << 20
memory.relieve()
print(memory.resident() >> 20)
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    kept, still, after = map(int, done.stdout.split())
    assert kept > 200 and still > 200 and after < 100


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library is not glibc from 2.33 on")
def test_holes_that_compiling_has_left_are_taken_out_of_use_and_their_pages_handed_back():
    code = """
import ctypes
from jaxcap import memory
memory.keep()
library = memory._library()
pieces = [library.malloc(20_000 + 64 * i) for i in range(2000)]
for i, piece in enumerate(pieces):
    ctypes.memset(piece, 7, 20_000 + 64 * i)
for piece in pieces[::2]:
    library.free(piece)

def told():
    found = library.mallinfo2()
    print(found.fordblks - found.keepcost >> 20, memory.resident() >> 20, found.arena - found.keepcost >> 20)

told()
memory.relieve()
told()
memory.holes.set()
memory.relieve()
told()
assert not memory.holes.is_set() and all(ctypes.string_at(piece, 2) == b"\\7\\7" for piece in pieces[1::2])
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    before, untold, after = ([int(number) for number in line.split()] for line in done.stdout.splitlines())
    assert before[0] > 60 and untold[0] > 60  # MiB in holes
    assert after[0] < 10 and after[1] < before[1] - 40 and after[2] < before[2] + 70  # and the heap has not grown by more than a piece


@pytest.mark.skipif(not memory._library() or not memory._waits_to_be_asked(), reason="glibc, or a kernel that waits to be asked, is not here")
def test_large_pieces_lie_on_huge_pages_also_after_memory_was_handed_back():
    code = """
import ctypes
from pathlib import Path
from jaxcap import memory

library = memory._library()

def take():
    pieces = [library.malloc(1 << 20) for _ in range(200)]
    for piece in pieces:
        ctypes.memset(piece, 1, 1 << 20)
    huge = next(line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("AnonHugePages"))
    print(int(huge.split()[1]) >> 10)
    for piece in pieces:
        library.free(piece)

before = memory.resident()
memory.keep()
print(memory.resident() - before >> 20)
take()
memory.holes.set()
memory.relieve()
take()
memory.allowed = lambda: 100 << 20
memory.relieve()
take()
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    asked, *huge = map(int, done.stdout.split())
    assert asked < 8 and min(huge[:2]) > 100 and huge[2] > 20  # MiB; to ask takes addresses alone


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="steps use the host's memory on CPUs alone")
def test_holes_are_looked_for_after_what_took_long_to_compile(monkeypatch):
    parallel._watch_compiling()
    monkeypatch.setattr(memory, "kept", True)
    memory.holes.clear()
    jax.jit(lambda x: x + 1)(1.5)
    assert not memory.holes.is_set()
    monkeypatch.setattr(parallel, "HOLES_S", 0.0)
    jax.jit(lambda x: x + 2)(1.5)
    assert memory.holes.is_set()
    memory.holes.clear()


def test_what_may_be_held_is_no_more_than_the_machine_has():
    assert 1 << 28 < memory.allowed() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1 << 20 < memory.resident() < memory.allowed()


def test_a_cpu_is_two_steps_ahead_at_most(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    devices = parallel.Parallel()
    for step in range(5):
        devices.pace(step)
    assert waited == ([None, 0, 0, 1, 1, 2, 3] if jax.default_backend() == "cpu" else [])  # the first two might have been long


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="steps line up freely on accelerators")
def test_long_steps_do_not_stand_in_line_so_that_one_gives_back_its_memory_before_the_next_asks_for_its_own(monkeypatch):
    waited, now = [], iter([10.0, 10.1, 11.0, 12.0, 12.1, 12.2])
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    monkeypatch.setattr(parallel.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(parallel.time, "sleep", lambda seconds: waited.append(f"{seconds} s"))
    devices = parallel.Parallel()
    for step in range(6):  # the third and the fourth take long
        devices.pace(step)
    assert waited[6:] == [1, 2, 3, "0.005 s", 3, 4, "0.005 s", 4]


def test_memory_is_not_looked_at_in_every_short_step(monkeypatch):
    looked, now = [], iter([10.0, 10.4, 10.9, 11.1])
    monkeypatch.setattr(memory, "relieve", lambda: looked.append(True))
    monkeypatch.setattr(parallel.time, "monotonic", lambda: next(now))
    devices, counts = parallel.Parallel(), []
    for _ in range(4):
        devices.pace(None)
        counts.append(len(looked))
    assert counts == [1, 1, 1, 2]


def test_cores_are_those_of_the_process_or_where_that_is_not_known_of_the_machine(monkeypatch):
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5})
        assert memory.cores() == 3
        monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert memory.cores() == 8
