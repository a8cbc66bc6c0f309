"""What a compiled program depends on besides its function and its arguments: versions, sources, devices, settings."""

import functools
import hashlib
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import ml_dtypes
import numpy as np
import optax
from jax.sharding import Mesh

from clvr_jax.programs.fingerprint import fingerprint
from clvr_jax.sharding import MeshLayout

FORMAT = 1
"""The number of the format of stored programs; another one is another key."""

_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_IGNORED = (
    "cache",
    "log",
    "traceback",
    "debug_info",
    "dump",
    "profile",
    "pgle",
    "persistent",
    "coordination",
    "captured",
)
"""Parts of names of JAX's settings that change no program: where it is cached, and what is said about it."""


def environment(client: Any) -> str:
    """Returns the digest of what is the same during a process, for the programs of a backend.

    It has the versions of Python, JAX, Flax and NumPy, the backend with its version and all its devices, the
    instructions and the number of this machine's processors, and the environment variables of XLA.
    """
    return fingerprint(process(), client.platform, client.platform_version, _devices(client))


@functools.cache
def process() -> str:
    """Returns the digest of what does not depend on a backend: versions, environment variables, processors."""
    versions = (
        sys.version,
        jax.__version__,
        jaxlib.__version__,
        flax.__version__,
        optax.__version__,
        np.__version__,
        ml_dtypes.__version__,
    )
    variables = tuple(os.environ.get(name, "") for name in _VARIABLES)
    return fingerprint(FORMAT, versions, variables, _processors())


@functools.cache
def sources() -> str:
    """Returns the digest of the source of this package and of `convert`, as it was when it was first asked for."""
    places = [Path(__file__).parents[1]]
    convert = importlib.util.find_spec("clvr_jax.convert")  # installed with the package, or beside it
    places += map(Path, (convert and convert.submodule_search_locations) or [])
    return fingerprint([source_digest(place) for place in places])


def _devices(client: Any) -> tuple[tuple[object, ...], ...]:
    names = ("id", "process_index", "device_kind", "coords", "core_on_chip", "slice_index")
    found = []
    for device in client.devices():
        values = [getattr(device, name, None) for name in names]
        found.append(tuple(tuple(value) if isinstance(value, list | tuple) else value for value in values))
    return tuple(found)


def _processors() -> tuple[object, ...]:
    """Returns what XLA's code for CPUs depends on: the instructions, and the number of threads that share work."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.machine(), platform.processor(), count
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    own = tuple(known.get(name, "") for name in ("model name", "flags", "Features"))
    return platform.machine(), own, count


def source_digest(package: Path) -> str:
    """Returns a digest of all Python files below a directory: of their names and contents."""
    digest = hashlib.blake2b(digest_size=32)
    for directory, children, files in os.walk(package):
        children.sort()
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(directory, name)
                content = path.read_bytes()
                digest.update(f"{path.relative_to(package)}\0{len(content)}\0".encode())
                digest.update(content)
    return digest.hexdigest()


def settings() -> tuple[object, ...]:
    """Returns the values of JAX's settings that may change a program, those of the current thread included."""
    values = jax.config.values
    return tuple(getattr(jax.config, name, None) if is_local else values[name] for name, is_local in _setting_names())


@functools.cache
def _setting_names() -> tuple[tuple[str, bool], ...]:
    """Returns the names of settings, and whether each is an attribute, which may have another value in each thread."""
    names = sorted(name for name in jax.config.values if not any(part in name for part in _IGNORED))
    return tuple((name, hasattr(jax.config, name)) for name in names)


def named_settings(values: tuple[object, ...]) -> tuple[tuple[str, str], ...]:
    """Returns the result of `settings` with the names, as text."""
    return tuple((name, repr(value)) for (name, _), value in zip(_setting_names(), values, strict=True))


def mesh_parts(mesh: Any) -> tuple[object, ...]:
    """Returns what describes a mesh: axes with sizes and types, and the devices if it has any."""
    ids = tuple(device.id for device in mesh.devices.flat) if isinstance(mesh, Mesh) else ()
    return tuple(mesh.shape.items()), tuple(map(str, mesh.axis_types or ())), ids


def layout_parts(layout: MeshLayout | None) -> tuple[object, ...]:
    """Returns what describes an active layout, which decides the constraints of a program."""
    return () if layout is None else (mesh_parts(layout.mesh), layout.rules)
