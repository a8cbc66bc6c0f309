"""Eight virtual devices for every test, so that meshes are real; what names no device runs on the first."""

import os
import tempfile
from pathlib import Path

import pytest

from clvr_jax.training.distributed import virtual_devices

# A program for a TPU may be compiled, but none is here to be looked for.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Most of the time goes into compiling small programs, which run once or twice.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.update(virtual_devices(8))
# Many files, both workers and the commands in subprocesses compile the same programs.
PROGRAMS = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"clvr-jax-test-programs-{os.getuid()}")
)

OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
"""Options of the compiler for a program that runs often."""


def pytest_configure(config: pytest.Config) -> None:
    """Turns on the cache of compiled programs that all tests share."""
    import jax

    jax.config.update("jax_compilation_cache_dir", PROGRAMS)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
