"""Fixtures of the whole suite. Eight virtual CPU devices exist before JAX starts."""

import os
import tempfile
from importlib import metadata
from pathlib import Path

# Before 0.11 jaxlib has the former generator of code too, which takes half as long to compile.
_EMITTERS, _OLDER = "xla_cpu_use_fusion_emitters", metadata.version("jaxlib").startswith("0.10.")
_flags = ["--xla_force_host_platform_device_count=8", *([f"--{_EMITTERS}=false"] if _OLDER else [])]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_flags])
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # tests compile far longer than they compute; their programs' too
os.environ.setdefault("JAXCAP_KEEP_MEMORY", "0")  # four processes of many small programs; speed is nothing to them
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # all processes of a run share what the first one makes and removes
    _programs = tempfile.TemporaryDirectory(prefix="jaxcap-tests-")
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": _programs.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}

import jax  # noqa: E402
import pytest  # noqa: E402

_SHARED = Path(os.environ.get("JAXCAP_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Compiled code of a finished file goes: a thousand tests would keep gigabytes of it, and every new compilation pays."""
    yield
    jax.clear_caches()


@pytest.fixture
def compiled_as_for_users(monkeypatch):
    """The usual generator of code after all, for tests that read a program, or that set a step beside another one to the digit: with
    the former the two round differently, and a small network under batch statistics makes much of it."""
    if _OLDER:
        from jax._src import compiler  # of one release; nothing public turns a flag for pmap

        options = compiler.get_compile_options
        monkeypatch.setattr(compiler, "get_compile_options", lambda *arguments, env_options_overrides=None, **more: options(
            *arguments, env_options_overrides={**(env_options_overrides or {}), _EMITTERS: True}, **more))


@pytest.fixture
def shared():
    """`shared("flickr8k", "README.md")` is a development file; the test skips where it is not there."""

    def locate(*parts: str) -> Path:
        path = _SHARED.joinpath(*parts)
        if not path.exists():
            pytest.skip(f"development file {'/'.join(parts)} is not here")
        return path

    return locate
