"""The chips that programs are planned for: compute, memory and interconnect; and the names of topologies.

Sources: Google Cloud's pages on TPU v5e, v5p and v6e for peak FLOP/s, memory bandwidth, the interconnect (both
directions, all ports: 400, 1200 and 800 GB/s a chip over 4, 6 and 4 ports) and the data-center network (6.4 Tbit/s a
v5e pod, 50 Gbit/s a v5p chip, 25.6 Tbit/s a v6e pod); NVIDIA's data sheet of the H100 SXM5, dense bfloat16, with one
400 Gbit/s adapter for each GPU of a DGX. TPU memory is what libtpu's compiler allows a program, according to its
out-of-memory message: a little less than the 16, 95 and 32 GB of the data sheets, of which a part is reserved.
"""

import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from clvr_jax.errors import ClvrError, UsageError

GIB = 2**30

# Without these variables, libtpu would search for a TPU, its host and its neighbors, and lock the TPU.
_COMPILER_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Chip:
    """One accelerator, which is one JAX device.

    name: first part of the names of topologies. peak_flops: dense bfloat16 FLOP/s. hbm_bytes: memory that a program may
    use. hbm_bandwidth: bytes/s. link_bandwidth: bytes/s in one direction of one link (of a GPU: to its switch).
    network_bandwidth: bytes/s of one chip to chips without a link. torus_axes: dimensions of the torus of links, two
    links each; 0 if a switch connects `node` chips. ring_side: a torus side is a ring if its length is a multiple of
    this number of chips; other sides are lines.
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

# Slices by the number in their name, which for v5p is that of TensorCores, two a chip: v5p-128 has 64 chips.
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
    """Chips of one kind and their arrangement: the sides of a torus, or the number of chips as the only entry."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name, such as `v6e:16x16`; for a TPU it is that of `jax.experimental.topologies`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """Number of chips, each of which is one JAX device."""
        return math.prod(self.shape)

    def closes(self, axis: int) -> bool:
        """Returns whether the chips along an axis form a ring; in 3D all axes do, from 4 x 4 x 4, or none."""
        sides = self.shape if len(self.shape) == 3 else self.shape[axis : axis + 1]
        return all(side % self.chip.ring_side == 0 for side in sides)


def parse_topology(name: str) -> Topology:
    """Reads the name of a topology.

    Args:
      name: `v5e:4x4`, `v6e:16x16`, `v5p:4x4x8`, `h100:8`, `cpu:8`; or Google Cloud's `v5e-256`, `v6e-256`, `v5p-128`,
        whose number is that of chips for v5e and v6e, and of TensorCores for v5p, two a chip: v5p-128 has 64 chips.
    Returns: the topology. For `cpu`, this machine is measured and divided among the virtual devices.
    Raises: UsageError that lists the valid names.
    """
    match = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+)*)|-(\d+))", name.strip().lower())
    kind, sides, count = match.groups() if match else ("", None, None)
    slices = SLICES.get(kind, {})
    shape = tuple(map(int, sides.split("x"))) if sides else slices.get(int(count or 0), ())
    axes = CHIPS[kind].torus_axes or 1 if kind in CHIPS else 1
    if kind not in (*CHIPS, "cpu") or len(shape) != axes or 0 in shape:
        aliases = "; ".join(f"{kind}-{{{','.join(map(str, slices))}}}" for kind, slices in SLICES.items())
        raise UsageError(
            f"topology {name!r}: it must be v5e:AxB, v6e:AxB, v5p:AxBxC, h100:N, cpu:N, or one of Google Cloud's names "
            f"{aliases} (the number of v5p is that of TensorCores, two a chip)"
        )
    return Topology(measured_cpu(shape[0]) if kind == "cpu" else CHIPS[kind], shape)


def planning_devices(topology: Topology) -> list[jax.Device]:
    """Returns devices that programs can be compiled for; only those of `cpu` can run them as well.

    TPU devices are those of libtpu's compiler. Other chips are represented by virtual CPU devices, with the collectives
    and the memory of the CPU compiler's programs.

    Returns: one JAX device for each chip of the topology.
    Raises: ClvrError if libtpu is not installed or does not support the topology, or if there are too few virtual
      devices.
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
        for name in added:  # child processes must not inherit them
            del os.environ[name]


@dataclass(frozen=True)
class Links:
    """The interconnect of a group of chips.

    bandwidth: bytes/s that one chip sends while it receives the same amount. hops: mean number of links between two
    chips of the group, which determines the time of an all-to-all.
    """

    bandwidth: float
    hops: float


def links(topology: Topology, mesh: Mesh, axes: Sequence[str]) -> Links:
    """Returns the interconnect of the chips along some axes of a mesh.

    On a torus, every side that the mesh axes use adds a link, and another one if they use the complete ring. GPUs use
    the switch inside a node and the network between nodes; TPU slices are connected by the network.

    Args:
      topology: of the mesh.
      mesh: its devices; those without coordinates are assumed to fill the torus in row-major order.
      axes: names of the mesh axes that communicate together.
    Raises: ClvrError if there is only one chip along the axes.
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
        # The mean distance on a ring is a quarter of its length; for a line, this accounts for its busy middle links.
        hops += length / 4 if length > 1 else 0.0
    return Links(number * chip.link_bandwidth, hops)


@functools.cache
def measured_cpu(devices: int = 1) -> Chip:
    """Measures this machine and returns one of `devices` equal chips: float32 matrix products, copies, and memory.

    Virtual devices communicate by copies, which read and write memory, so that a link has half the memory bandwidth.
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
    """Returns the seconds of the fastest of several runs after a warm-up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
