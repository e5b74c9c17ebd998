"""Accelerators that are not here, but that XLA compiles for all the same: it needs their compilers, not them."""

import os
from dataclasses import dataclass
from importlib import util

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType

from jaxcap.errors import UserError
from jaxcap.parallel import Parallel
from jaxcap.step import AXIS

CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


@dataclass(frozen=True)
class Gpu:
    """What XLA asks about an NVIDIA card, by its datasheet and CUDA's tables of its compute capability.

    gb: its memory. gb_per_s: of that. shared_kb: of shared memory on a multiprocessor, of which a block may have one less.
    """

    kind: str
    capability: int
    multiprocessors: int
    lanes: int
    ghz: float
    gb: int
    gb_per_s: int
    l2_mb: int
    shared_kb: int

    def description(self) -> str:
        """The same as XLA's GpuTargetConfigProto."""
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_block_optin: {(self.shared_kb - 1) << 10}
              shared_memory_per_core: {self.shared_kb << 10}
              core_count: {self.multiprocessors} fpus_per_core: {self.lanes} clock_rate_ghz: {self.ghz}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {self.gb_per_s * 10**9} device_memory_size: {self.gb * 10**9} l2_cache_size: {self.l2_mb << 20}
              cuda_compute_capability {{ major: {self.capability // 10} minor: {self.capability % 10} }}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
            }}
            platform_name: "CUDA" device_description_str: "{self.kind}"
            dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 9 }}"""


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 80, 108, 64, 1.41, 85, 2039, 40, 164),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 90, 132, 128, 1.98, 85, 3350, 50, 228),
    "h200": Gpu("NVIDIA H200", 90, 132, 128, 1.98, 151, 4800, 50, 228),
}
HERE = "cpu"


def devices(name: str, count: int) -> list[jax.Device]:
    """`count` devices to compile for: a card of `GPUS`, a TPU's topology such as "v5e:2x2", or this machine's CPUs.

    Raises `UserError` where XLA's compiler for it is not installed, or it has fewer.
    """
    if name == HERE:
        found = jax.devices(HERE)
    else:
        found = _gpus(GPUS[name], count) if name in GPUS else _tpus(name)
    if len(found) < count:
        raise UserError(f"{name} has {len(found)} device{'s' * (len(found) != 1)}, so programs for {count} cannot be made for it")
    return found[:count]


def anywhere(count: int) -> Parallel:
    """`count` devices of no platform: what is wrapped for them can be traced and lowered for any, but not run."""
    parallel = Parallel("shard_map", jax.devices()[:1])
    parallel.mesh = AbstractMesh((count,), (AXIS,), axis_types=(AxisType.Auto,))
    return parallel


def _gpus(gpu: Gpu, count: int) -> list[jax.Device]:
    if not any(_installed(plugin) for plugin in CUDA_PLUGINS):
        raise UserError("compiling for a GPU needs JAX's CUDA plugin, though no GPU: pip install 'jaxcap[cuda]'")
    return topologies.get_topology_desc("gpu", "cuda", topology=f"1x1x{count}", target_config=gpu.description()).devices


def _tpus(topology: str) -> list[jax.Device]:
    if not _installed("libtpu"):
        raise UserError(f"--device {topology}: neither a card of {', '.join(GPUS)} nor {HERE}; a TPU's topology needs libtpu, though no TPU: "
                        "pip install 'jaxcap[tpu]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # it would ask Google's cloud which TPU this machine has
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        return topologies.get_topology_desc(topology, "tpu").devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--device {topology}: neither a card of {', '.join(GPUS)} nor {HERE}, and libtpu knows no such TPU "
                        f"({str(error).splitlines()[0][:120]}); say for example v5e:2x2") from error


def _installed(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is not there
        return False
