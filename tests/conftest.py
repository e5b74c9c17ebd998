"""Fixtures of the whole suite. Eight virtual CPU devices exist before JAX starts."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # tests compile far longer than they compute; their programs' too
os.environ.setdefault("JAXCAP_KEEP_MEMORY", "0")  # four processes of many small programs; speed is nothing to them

import jax  # noqa: E402
import pytest  # noqa: E402

_SHARED = Path(os.environ.get("JAXCAP_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Compiled code of a finished file goes: a thousand tests would keep gigabytes of it, and every new compilation pays."""
    yield
    jax.clear_caches()


@pytest.fixture
def shared():
    """`shared("flickr8k", "README.md")` is a development file; the test skips where it is not there."""

    def locate(*parts: str) -> Path:
        path = _SHARED.joinpath(*parts)
        if not path.exists():
            pytest.skip(f"development file {'/'.join(parts)} is not here")
        return path

    return locate
