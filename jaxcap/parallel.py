"""The only file that knows devices: mesh, placement, and the two ways to wrap a per-device function.

`shard_map` (the default) and `pmap` run the same function with the same collectives over the axis "data" and give the same
numbers. Several hosts join through `jax.distributed`, which `initialize` calls when its environment asks for it; they must see one
run directory, and have the data set each for itself or together.
"""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcap import memory, progress
from jaxcap.errors import UserError
from jaxcap.step import AXIS

PyTree = Any
REPLICATED, SHARDED = PartitionSpec(), PartitionSpec(AXIS)
RELIEVE_S, HOLES_S = 1.0, 5.0
LONG_S, PAUSE_S = 0.5, 0.005


def initialize() -> None:
    """What a command does before it touches a device.

    Keeps compiled programs, and joins the other hosts of a run when JAX_COORDINATOR_ADDRESS is set (also JAX_NUM_PROCESSES,
    JAX_PROCESS_ID). Host memory that a step frees is kept for the next one, unless JAXCAP_KEEP_MEMORY is 0.
    """
    if os.environ.get("JAXCAP_KEEP_MEMORY") != "0":
        memory.keep()
    _watch_compiling()
    keep_programs()
    if os.environ.get("JAX_COORDINATOR_ADDRESS") and not jax.distributed.is_initialized():
        jax.distributed.initialize(
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]) if "JAX_NUM_PROCESSES" in os.environ else None,
            process_id=int(os.environ["JAX_PROCESS_ID"]) if "JAX_PROCESS_ID" in os.environ else None)
        progress.silent = not first()


def keep_programs() -> None:
    """Has JAX keep compiled programs in ~/.cache/jaxcap/compiled, unless it keeps them elsewhere (JAX_COMPILATION_CACHE_DIR)."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/jaxcap/compiled").expanduser()))


@functools.cache
def _watch_compiling() -> None:
    """Keeps what compiling takes out of the speeds that are shown, and where memory is kept, has `memory.relieve` close the holes that a
    CPU's program leaves which took longer than HOLES_S."""

    def compiled(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            progress.aside(seconds)
            if memory.kept and seconds > HOLES_S and jax.default_backend() == "cpu":
                memory.holes.set()

    jax.monitoring.register_event_duration_secs_listener(compiled)


def one_host() -> None:
    """Raises `UserError` in a process that has joined others, for a command that is of no use to several."""
    if jax.process_count() > 1:
        raise UserError(f"this is one of {jax.process_count()} processes that JAX_COORDINATOR_ADDRESS has joined, but only training knows "
                        "several; unset it: one process drives all devices of its host")


def first() -> bool:
    """Whether this process is the first of a run's, the one that writes its files and speaks."""
    return jax.process_index() == 0


def largest(number: int) -> int:
    """The largest of the numbers that the processes of a run give; waits for all of them."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Ends once all processes of a run are here. Raises `UserError` in each of them where the block did in any.

    In the block none may wait for the others: one that failed would not come.
    """
    failed = None
    try:
        yield
    except UserError as error:
        failed = error
    if largest(int(failed is not None)):
        raise failed or UserError("another process of this run cannot begin; its own message says why")


def same(text: str) -> str:
    """The first process's text, of at most 4,000 bytes; waits for all processes."""
    if jax.process_count() == 1:
        return text
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(text.encode().ljust(4000, b"\0"), np.uint8))
    return bytes(told).rstrip(b"\0").decode()


class Parallel:
    """Places arrays on the devices of a run and wraps its functions.

    Args:
      mode: "shard_map" or "pmap".
      devices: the devices to use; all of them, over all hosts, by default.
    """

    def __init__(self, mode: str = "shard_map", devices: list | None = None):
        devices = devices or jax.devices()
        self._several = len({device.process_index for device in devices}) > 1
        if mode == "pmap" and self._several:
            raise UserError("parallel=pmap knows the devices of one host; use parallel=shard_map for several")
        self.mode = mode
        self.mesh = Mesh(np.array(devices), (AXIS,))
        self._paced: PyTree = None
        self._relieved, self._sent, self._long = -math.inf, -math.inf, True  # steps are taken to be long until they are not

    @property
    def size(self) -> int:
        """Devices over all hosts."""
        return self.mesh.size

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    def check_batch(self, batch_size: int, key: str = "batch_size") -> None:
        """Raises `UserError` where `batch_size` cannot be shared out evenly."""
        if batch_size % self.size:
            near = max(batch_size // self.size, 1) * self.size
            raise UserError(f"{key}={batch_size} cannot be divided by the {self.size} devices of this run; "
                            f"use a multiple of {self.size}, such as {key}={near}")

    def pace(self, reported: PyTree) -> None:
        """Waits, on CPUs, for the step before the one that will report `reported`, so that one runs and one waits in line.

        A CPU takes memory for every step in line, and virtual devices with many may wait for each other for ever. Where steps take
        longer than LONG_S none waits in line, and there are PAUSE_S between them: the next would ask for its memory a moment before
        this one gives back its own, and the process would grow by as much. What steps have freed on the host is handed back where it
        becomes too much or compiling has left `memory.holes`, which is looked at once in RELIEVE_S. Elsewhere steps line up freely.
        """
        if self.platform == "cpu":
            jax.block_until_ready(self._paced)
            if self._long:
                jax.block_until_ready(reported)
                time.sleep(PAUSE_S)
            self._paced = reported
        now = time.monotonic()
        self._long, self._sent = now - self._sent > LONG_S, now
        if now - self._relieved >= RELIEVE_S:  # to look takes 20 µs, a twentieth of a short step
            self._relieved = now
            memory.relieve()

    def replicate(self, tree: PyTree) -> PyTree:
        """`tree` whole on every device: what this host has, or what is whole on devices of several hosts."""
        sharding = NamedSharding(self.mesh, REPLICATED)

        def here(x):
            return x.addressable_data(0) if isinstance(x, jax.Array) and not x.is_fully_addressable else x

        if not self._several:
            return jax.device_put(jax.tree.map(here, tree), sharding)
        arrays = jax.tree.map(lambda x: np.asarray(here(x)), tree)
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), arrays)

    def shard(self, tree: PyTree) -> PyTree:
        """This host's rows of a batch, cut over the devices along the first axis."""
        sharding = NamedSharding(self.mesh, SHARDED)
        if not self._several:
            return jax.device_put(tree, sharding)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)

    def hand(self, batch: PyTree) -> PyTree:
        """This host's rows of a batch as a wrapped function takes them every step: those of the only host as they are.

        What is compiled cuts and sends them itself, in a fraction of the time that `shard` takes of the host.
        """
        return self.shard(batch) if self._several else batch

    def wrap(self, function: Callable, *, in_sharded: tuple[bool, ...], out_sharded: bool | tuple[bool, ...] = False,
             donate: tuple[int, ...] = (), typed: bool = True) -> Callable:
        """Compiles a per-device function over all devices.

        Args:
          in_sharded: for every argument, whether its first axis is cut over the devices (else it is whole on each).
          out_sharded: the same for the result, or for each item of a tuple of results.
          donate: arguments whose memory the result may take.
          typed: let shard_map check which values differ between devices, as gradients need. Functions without gradients
            and collectives turn it off, so that they may begin loops with constants.
        """
        if self.mode == "pmap":
            return self._pmap(function, in_sharded, out_sharded, donate)
        specs = tuple(SHARDED if cut else REPLICATED for cut in in_sharded)
        out = jax.tree.map(lambda cut: SHARDED if cut else REPLICATED, out_sharded)
        mapped = jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=typed)
        return jax.jit(mapped, donate_argnums=donate)

    def _pmap(self, function: Callable, in_sharded, out_sharded, donate) -> Callable:
        out_axes = jax.tree.map(lambda cut: 0 if cut else None, out_sharded)
        devices = list(self.mesh.devices.flat)
        mapped = jax.pmap(function, axis_name=AXIS, devices=devices, in_axes=tuple(0 if c else None for c in in_sharded),
                          out_axes=out_axes, donate_argnums=donate)

        def call(*arguments):
            cut = lambda x: x.reshape(len(devices), -1, *x.shape[1:])
            join = lambda x: x.reshape(-1, *x.shape[2:])
            arguments = [jax.tree.map(cut, a) if c else a for a, c in zip(arguments, in_sharded, strict=True)]
            results = mapped(*arguments)
            return jax.tree.map(lambda was_cut, part: jax.tree.map(join, part) if was_cut else part, out_sharded, results)

        return call
