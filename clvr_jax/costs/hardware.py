"""The chips a plan is made for: their arithmetic, memory and links, and the names of the topologies they come in.

Sources: Google Cloud's pages on TPU v5e, v5p and v6e for peak arithmetic, memory bandwidth, the interconnect (both
directions, all ports: 400, 1200 and 800 GB/s a chip over 4, 6 and 4 ports) and the data-center network (6.4 Tbit/s a
v5e pod, 50 Gbit/s a v5p chip, 25.6 Tbit/s a v6e pod); NVIDIA's data sheet of the H100 SXM5, dense bfloat16, with one
400 Gbit/s adapter for each GPU of a DGX. TPU memory is what libtpu's compiler lets a program use, as its
out-of-memory message says: a little less than the data sheets' 16, 95 and 32 GB, which it partly keeps for itself.
"""

import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from clvr_jax.errors import ClvrError, UsageError

GIB = 2**30

# libtpu looks for a TPU, its host and its neighbors, and locks it, unless these variables say that there is none.
_COMPILER_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Chip:
    """One accelerator, which is one JAX device.

    name: as topologies begin. peak_flops: bfloat16 FLOP/s, dense. hbm_bytes: memory a program may use.
    hbm_bandwidth: bytes/s. link_bandwidth: bytes/s in one direction of one link (of a GPU: into its switch).
    network_bandwidth: bytes/s of one chip to chips that no link reaches.
    torus_axes: dimensions of the torus its links make, two links each; 0 if a switch joins `node` chips.
    ring_side: a side of this many chips, or a multiple, closes into a ring; shorter sides are lines.
    """

    name: str
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    torus_axes: int = 0
    ring_side: int = 1
    node: int = 1


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 15.75 * GIB, 819e9, 50e9, 3.125e9, torus_axes=2, ring_side=16),
        Chip("v5p", 459e12, 95.73 * GIB, 2765e9, 100e9, 6.25e9, torus_axes=3, ring_side=4),
        Chip("v6e", 918e12, 31.24 * GIB, 1638e9, 100e9, 12.5e9, torus_axes=2, ring_side=16),
        Chip("h100", 989e12, 80e9, 3350e9, 450e9, 50e9, node=8),
    )
}

# Slices by the number in their name. That of v5p counts TensorCores, two to a chip: v5p-8 is 4 chips, v5p-128 is 64.
_SQUARES: dict[int, tuple[int, ...]] = {
    1: (1, 1),
    4: (2, 2),
    8: (2, 4),
    16: (4, 4),
    32: (4, 8),
    64: (8, 8),
    128: (8, 16),
    256: (16, 16),
}
_CUBES: dict[int, tuple[int, ...]] = {
    8: (2, 2, 1),
    16: (2, 2, 2),
    32: (2, 2, 4),
    64: (2, 4, 4),
    128: (4, 4, 4),
    256: (4, 4, 8),
    512: (4, 8, 8),
}
_CUBES |= {1024: (8, 8, 8), 2048: (8, 8, 16), 4096: (8, 16, 16), 8192: (16, 16, 16), 12288: (16, 16, 24)}
SLICES: dict[str, dict[int, tuple[int, ...]]] = {"v5e": _SQUARES, "v6e": _SQUARES, "v5p": _CUBES}


@dataclass(frozen=True)
class Topology:
    """Chips of one kind and how they are laid out: the sides of a torus, or their number in one tuple entry."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """`v6e:16x16`, the name that `jax.experimental.topologies` takes for a TPU."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """Number of chips, each of which is one JAX device."""
        return math.prod(self.shape)

    def closes(self, axis: int) -> bool:
        """Whether the chips along an axis form a ring; in three dimensions all axes do, from 4 x 4 x 4, or none."""
        sides = self.shape if len(self.shape) == 3 else self.shape[axis : axis + 1]
        return all(side % self.chip.ring_side == 0 for side in sides)


def parse_topology(name: str) -> Topology:
    """Reads the name of a topology.

    Args:
      name: `v5e:4x4`, `v6e:16x16`, `v5p:4x4x8`, `h100:8`, `cpu:8`; or Google Cloud's `v5e-256`, `v6e-256`, `v5p-128`,
        whose number counts chips on v5e and v6e, but TensorCores on v5p, two to a chip: v5p-128 has 64 chips.
    Returns: the chip and its layout. `cpu` is this machine, measured now and shared by that many virtual devices.
    Raises: UsageError that lists what there is.
    """
    match = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+)*)|-(\d+))", name.strip().lower())
    kind, sides, count = match.groups() if match else ("", None, None)
    slices = SLICES.get(kind, {})
    shape = tuple(map(int, sides.split("x"))) if sides else slices.get(int(count or 0), ())
    axes = CHIPS[kind].torus_axes or 1 if kind in CHIPS else 1
    if kind not in (*CHIPS, "cpu") or len(shape) != axes or 0 in shape:
        aliases = "; ".join(f"{kind}-{{{','.join(map(str, slices))}}}" for kind, slices in SLICES.items())
        raise UsageError(
            f"topology {name!r}: there are v5e:AxB, v6e:AxB, v5p:AxBxC, h100:N, cpu:N, and by Google Cloud's names "
            f"{aliases} (v5p counts TensorCores, two to a chip)"
        )
    return Topology(measured_cpu(shape[0]) if kind == "cpu" else CHIPS[kind], shape)


def planning_devices(topology: Topology) -> list[Any]:
    """Devices that programs can be compiled for but not run on; only those of `cpu` can also run them.

    Those of TPUs come from libtpu's compiler. For other chips virtual CPU devices stand in: the collectives are those
    that the CPU's compiler puts in, the memory is what it needs.

    Returns: as many JAX devices as the topology has chips.
    Raises: ClvrError if libtpu is not installed, does not know the topology, or there are too few virtual devices.
    """
    if not topology.chip.torus_axes:
        devices = jax.devices("cpu")
        if len(devices) < topology.devices:
            raise ClvrError(
                f"{topology.name}: this process has {len(devices)} CPU devices; set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.devices} before it starts"
            )
        return devices[: topology.devices]
    if importlib.util.find_spec("libtpu") is None:
        raise ClvrError(f"{topology.name}: compiling for TPUs needs libtpu; `pip install libtpu`, no TPU is needed")
    added = {name: value for name, value in _COMPILER_ONLY.items() if name not in os.environ}
    os.environ.update(added)
    try:
        return topologies.get_topology_desc(topology.name, "tpu").devices
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ClvrError(f"{topology.name}: libtpu does not compile for it: {reason}") from error
    finally:
        for name in added:  # processes that are started from here are no TPU hosts
            del os.environ[name]


@dataclass(frozen=True)
class Links:
    """What joins the chips of one group.

    bandwidth: bytes/s that one chip sends while it receives as many. hops: links that a byte passes on its way to a
    chip of the group in the mean, which is what an all-to-all pays for.
    """

    bandwidth: float
    hops: float


def links(topology: Topology, mesh: Mesh, axes: Sequence[str]) -> Links:
    """What joins the chips along some axes of a mesh.

    On a torus every side that the mesh axes run along adds a link, and one more if they close its ring. On GPUs it is
    the switch inside a node and the network beyond; between slices of TPUs it is the network.

    Args:
      topology: where the mesh lives.
      mesh: its devices; those without coordinates are taken to fill the torus in row-major order.
      axes: names of the mesh axes that communicate together.
    Raises: ClvrError if there is one chip along them, which has nobody to talk to.
    """
    chip = topology.chip
    index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    positions = np.arange(mesh.size).reshape(mesh.devices.shape)[index].ravel()
    devices = mesh.devices.ravel()[positions]
    count = len(devices)
    if count == 1:
        raise ClvrError(f"mesh {dict(mesh.shape)}: one device along {tuple(axes)}, so no links")
    switched = (count - 1) / count
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return Links(chip.network_bandwidth, switched)
    if not chip.torus_axes:
        inside = len(set(positions // chip.node)) == 1
        return Links(chip.link_bandwidth if inside else chip.network_bandwidth, switched)
    coordinates = np.array(
        [getattr(d, "coords", np.unravel_index(p, topology.shape)) for d, p in zip(devices, positions, strict=True)]
    )
    number, hops = 0, 0.0
    for axis, side in enumerate(topology.shape):
        length = len(set(coordinates[:, axis]))
        number += (length > 1) + (length == side > 1 and topology.closes(axis))
        # A quarter of the way round is the mean distance on a ring; on a line it makes up for its loaded middle.
        hops += length / 4 if length > 1 else 0.0
    return Links(number * chip.link_bandwidth, hops)


@functools.cache
def measured_cpu(devices: int = 1) -> Chip:
    """This machine as `devices` equal chips: float32 matrix products, copies and physical memory, measured in a second.

    Virtual devices exchange data by copying it, so that links are as fast as half the memory: it is read and written.
    """
    side, megabytes = 1024, 128
    matrix = jax.device_put(np.ones((side, side), np.float32), jax.devices("cpu")[0])
    multiply = jax.jit(jnp.matmul)
    flops = 2 * side**3 / _fastest(lambda: multiply(matrix, matrix).block_until_ready())
    block = np.ones(megabytes << 20, np.uint8)
    moved = 2 * block.nbytes / _fastest(block.copy)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    share = moved / devices
    return Chip("cpu", flops / devices, memory / devices, share, share / 2, share / 2, node=devices)


def _fastest(run: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of some runs, after one that warms up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
