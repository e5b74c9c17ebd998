"""Forms of one operation, of which every platform gets its own."""

from collections.abc import Callable
from typing import Any

import jax

PyTree = Any


def dependent(*operands: Any, default: Callable[..., PyTree], **forms: Callable[..., PyTree]) -> PyTree:
    """`forms["cpu"]`, `["cuda"]`, `["rocm"]` or `["tpu"]` of the operands, or `default`, as `jax.lax.platform_dependent` gives it.

    That traces all forms, and their gradients, since a program may go to several platforms. What is traced for the devices of a mesh,
    as all that `Parallel.wrap` compiles, goes to theirs: only that form is traced.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.lax.platform_dependent(*operands, default=default, **forms)
    platform = device.platform
    if platform == "gpu":  # as JAX calls a device, whoever made it
        platform = "rocm" if device.device_kind.startswith("AMD") else "cuda"
    return forms.get(platform, default)(*operands)
