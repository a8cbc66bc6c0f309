"""Where things lie on a mesh: one table from logical axes to mesh axes, and what follows from it.

A mesh has four axes, any of which may be 1:

    data      copies of the model, each with its own part of the batch; the only axis that crosses slices
    fsdp      parameters and optimizer state are cut along it, and so is the batch
    sequence  tokens are cut along it; in attention, heads are instead (DeepSpeed-Ulysses, arXiv 2309.14509)
    tensor    heads and the wide middle of each MLP are cut along it (Megatron, arXiv 1909.08053)

Models name the axes of an activation where it matters (`constrain`); parameters are told apart by their names, which
are PyTorch's. XLA puts in the communication. Without an active `Layout` nothing here does anything.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.trees import Tree, dotted, leaves_by_path, path_of

MESH_AXES = ("data", "fsdp", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes the devices that are left."""

    data: int = 1
    """Shard the batch over this many copies of the parameters; -1 takes the devices that are left."""
    fsdp: int = -1
    """Shard the batch, the parameters and the optimizer state over this many devices; -1 takes the devices that are
    left."""
    sequence: int = 1
    """Shard the tokens over this many devices, and the heads inside attention; -1 takes the devices that are left."""
    tensor: int = 1
    """Shard the heads and the hidden axis of every MLP over this many devices; -1 takes the devices that are left."""
    slices: int = 1
    """Number of TPU slices that the data center's network connects; the size of the data axis must be a multiple of it.
    """
    devices: int | None = None
    """Use only the first so many devices; all devices are used if this is not given."""

    def __post_init__(self) -> None:
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes) or self.slices < 1:
            raise UsageError(f"mesh {dict(zip(MESH_AXES, sizes, strict=True))}: sizes are at least 1, one may be -1")

    def shape(self, devices: int) -> tuple[int, ...]:
        """Sizes in the order of `MESH_AXES`. Raises: UsageError if they do not multiply to the number of devices."""
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        known = math.prod(size for size in sizes if size != -1)
        sizes = [max(devices // known, 1) if size == -1 else size for size in sizes]
        if math.prod(sizes) != devices:
            named = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
            raise UsageError(f"mesh {named} is {math.prod(sizes)} devices, but there are {devices}")
        if sizes[0] % self.slices:
            raise UsageError(f"mesh: {self.slices} slices are copies of the model, but data is {sizes[0]}")
        return tuple(sizes)

    def make(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over `devices`, all of them if None; neighbors on the torus become neighbors on the mesh."""
        devices = list(jax.devices() if devices is None else devices)
        if self.devices is not None and not 1 <= self.devices <= len(devices):
            raise UsageError(f"mesh: {self.devices} devices are asked for, there are {len(devices)}")
        devices = devices[: self.devices]
        shape = self.shape(len(devices))
        if self.slices > 1:
            inner = (shape[0] // self.slices, *shape[1:])
            grid = mesh_utils.create_hybrid_device_mesh(inner, (self.slices, 1, 1, 1), devices)
        elif len({device.platform for device in devices} & {"tpu"}):
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        else:
            grid = np.asarray(devices).reshape(shape)
        return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """The table: logical axis -> mesh axes, outermost first. Changing it lays out the whole model anew.

    Of activations: batch; tokens, between attentions; heads, inside attention; wide, the middle of an MLP.
    Of parameters: embed, the side of a matrix that the residual stream touches; heads_out and mlp, the other side;
    vocab; joined, the input side of a matrix whose output is cut up again (query, key, value and MLP in one), where
    cutting the output would tear the parts.
    """

    batch: Axes = ("data", "fsdp")
    tokens: Axes = ("sequence",)
    heads: Axes = ("tensor", "sequence")
    wide: Axes = ("tensor",)
    embed: Axes = ("fsdp", "sequence")
    heads_out: Axes = ("tensor",)
    mlp: Axes = ("tensor",)
    vocab: Axes = ("tensor",)
    joined: Axes = ("fsdp", "sequence", "tensor")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            axes = getattr(self, field.name)
            if len(set(axes)) != len(axes) or not set(axes) <= set(MESH_AXES):
                raise ClvrError(f"sharding rule {field.name} = {axes}: must be different ones of {MESH_AXES}")


# Parameter name -> logical axes of its last dimensions. The first that matches holds; a stack has its layers in front,
# which are never cut: the scan over them takes one at a time.
_PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"\.(q_proj|k_proj|v_proj|to_q|to_k|to_v|add_[qkv]_proj)\.kernel$", ("embed", "heads_out")),
    (r"\.(o_proj|to_out\.0|to_add_out|attn\.proj)\.kernel$", ("heads_out", "embed")),
    (r"\.(to_qkv_mlp_proj|linear_in|qkv)\.kernel$|modulation\w*\.linear\.kernel$", ("joined", None)),
    (r"\.(gate_proj|up_proj|linear_fc1)\.kernel$", ("embed", "mlp")),
    (r"\.(down_proj|linear_out|linear_fc2)\.kernel$", ("mlp", "embed")),
    (r"(^|\.)embed_tokens\.embedding$", ("vocab", "embed")),
    (r"(^|\.)lm_head\.kernel$", ("embed", "vocab")),
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the table for it: gives every array its sharding."""

    mesh: Mesh
    rules: Rules = Rules()

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu", that of the mesh, which need not be this machine's."""
        return self.mesh.devices.flat[0].platform

    @property
    def batch_parts(self) -> int:
        """Number of parts that a batch is cut into."""
        return math.prod(self.mesh.shape[axis] for axis in self.rules.batch)

    def spec(self, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """Partition of an array: mesh axes that do not divide a dimension are left out, from the last one on.

        Raises: ClvrError if two dimensions ask for the same mesh axis.
        """
        parts: list[Axes | None] = []
        for name, size in zip(axes, shape, strict=True):
            mesh_axes = getattr(self.rules, name) if name else ()
            while mesh_axes and size % math.prod(self.mesh.shape[axis] for axis in mesh_axes):
                mesh_axes = mesh_axes[:-1]
            parts.append(tuple(axis for axis in mesh_axes if self.mesh.shape[axis] > 1) or None)
        used = [axis for part in parts for axis in part or ()]
        if len(set(used)) != len(used):
            raise ClvrError(f"sharding: axes {tuple(axes)} of shape {tuple(shape)} use a mesh axis twice: {parts}")
        return PartitionSpec(*parts)

    def sharding(self, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        """See `spec`."""
        return NamedSharding(self.mesh, self.spec(axes, shape))

    @property
    def replicated(self) -> NamedSharding:
        """The whole array on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def parameters(self, params: Tree) -> Tree:
        """Shardings of a tree of parameters, or of anything that has their names: averages, gradients, deltas."""

        def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            return self.sharding(parameter_axes(dotted(path_of(path)), leaf.shape), leaf.shape)

        return jax.tree_util.tree_map_with_path(place, params)

    def optimizer_state(self, opt_state: Tree, params: Tree) -> Tree:
        """Shardings of an optimizer's state: what has a parameter's name and shape lies where the parameter does."""
        known = {
            path: (leaf.shape, self.sharding(parameter_axes(dotted(path), leaf.shape), leaf.shape))
            for path, leaf in leaves_by_path(params).items()
        }

        def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
            path = path_of(keys)
            ends = (path[begin:] for begin in range(len(path)))
            shape, sharding = next((known[end] for end in ends if end in known), ((), self.replicated))
            return sharding if shape == leaf.shape else self.replicated

        return jax.tree_util.tree_map_with_path(place, opt_state)

    def batch(self, batch: Tree, *, leading: int = 0) -> Tree:
        """Shardings of a batch, which is cut along its first axis after `leading` others."""
        axes = [None] * leading + ["batch"] + [None] * 8
        return jax.tree.map(lambda leaf: self.sharding(axes[: leaf.ndim], leaf.shape), batch)

    @contextlib.contextmanager
    def active(self) -> Iterator["Layout"]:
        """While this lasts, programs are traced for this layout."""
        token = _ACTIVE.set(self)
        try:
            with jax.set_mesh(self.mesh):
                yield self
        finally:
            _ACTIVE.reset(token)


_ACTIVE: ContextVar[Layout | None] = ContextVar("layout", default=None)


def active_layout() -> Layout | None:
    """The layout that programs are traced for at this moment."""
    return _ACTIVE.get()


@contextlib.contextmanager
def without_layout() -> Iterator[None]:
    """While this lasts, programs are traced for this process alone, and wait for nobody."""
    token = _ACTIVE.set(None)
    try:
        with jax.set_mesh(None):
            yield
    finally:
        _ACTIVE.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays an activation out by the logical names of its axes, one for each; as it is without an active layout."""
    layout = _ACTIVE.get()
    if layout is None or layout.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, layout.spec(axes, x.shape))


def gathered(params: Tree) -> Tree:
    """Parameters that are whole on every device from here on, however they lie; as they are without a layout.

    For models so small that cutting their products would cost more than a copy of their weights: the autoencoder.
    """
    layout = _ACTIVE.get()
    if layout is None or layout.mesh.size == 1:
        return params
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, layout.replicated), params)


def on_every_host(tree: Any) -> Any:
    """A tree whose arrays every process holds whole: those spread over processes become NumPy's. All must call it."""
    return jax.tree.map(
        lambda leaf: leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True), tree
    )


def parameter_axes(name: str, shape: Sequence[int]) -> tuple[str | None, ...]:
    """Logical axes of a parameter: those of its name, else its largest axis is the one that is cut, if it is a matrix.

    Vectors are small and stay whole: a gather would cost more than they do.
    """
    known = next((axes for pattern, axes in _PARAMETERS if re.search(pattern, name)), None)
    if known is not None and len(shape) - len(known) in (0, 1):
        return (*[None] * (len(shape) - len(known)), *known)
    axes: list[str | None] = [None] * len(shape)
    if len(shape) > 1:
        # Of the last two: what is before them is layers, or the window of a convolution.
        axes[max(range(len(shape) - 2, len(shape)), key=lambda axis: shape[axis])] = "embed"
    return tuple(axes)
