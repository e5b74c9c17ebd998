"""Reads and writes `.safetensors` files."""

import contextlib
import os
from pathlib import Path

import ml_dtypes  # noqa: F401  gives NumPy the bfloat16 that files may hold
import numpy as np
import safetensors
import safetensors.numpy

from jaxcap.errors import UserError, free_or


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Every tensor in `path`. Raises `UserError` if the file is damaged."""
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes `tensors`; the file is complete or absent. Raises `UserError` if that is not possible."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(safetensors.numpy.save(tensors, metadata))  # save_file makes it unreadable for other users
        os.replace(part, path)
    except (OSError, safetensors.SafetensorError) as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; "
                        f"{free_or('name another directory in $JAXCAP_WEIGHTS', error)}") from error
