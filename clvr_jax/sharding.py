"""The shardings of arrays on a mesh: one table from logical axes to mesh axes, and the functions that apply it.

A mesh has four axes, each of which may have size 1:

    data      copies of the model, each with its own part of the batch; the only axis that crosses slices
    fsdp      parameters, optimizer state and the batch are sharded along it
    sequence  tokens are sharded along it; in attention, heads are instead (DeepSpeed-Ulysses, arXiv 2309.14509)
    tensor    heads and the hidden axis of each MLP are sharded along it (Megatron, arXiv 1909.08053)

Models name the logical axes of important activations (`with_logical_constraint`); those of a parameter follow from its
name, which is PyTorch's. XLA inserts the communication. Without an active `MeshLayout` no activation is constrained.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.trees import KeyPath, Leaf, Params, dotted, leaves_by_path, path_of

Tree = TypeVar("Tree")

MESH_AXES = ("data", "fsdp", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which uses the remaining devices."""

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
            raise UsageError(f"mesh: data must be a multiple of the {self.slices} slices, but data is {sizes[0]}")
        return tuple(sizes)

    def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Creates the mesh over `devices`, or all devices if None; neighbors on the torus are neighbors on the mesh."""
        is_running = devices is None
        devices = list(jax.devices() if devices is None else devices)
        if self.devices is not None and not 1 <= self.devices <= len(devices):
            raise UsageError(f"mesh: {self.devices} devices are requested, but there are {len(devices)}")
        devices = devices[: self.devices]
        without = set(range(jax.process_count() if is_running else 0)) - {device.process_index for device in devices}
        if without:
            raise UsageError(
                f"mesh: process {min(without)} has none of the {len(devices)} devices; every process needs one"
            )
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
    """The table logical axis -> mesh axes, outermost first, which determines the sharding of the complete model.

    Axes of activations: batch; tokens, between attentions; heads, inside attention; mlp_act, the hidden axis of an MLP.
    Axes of parameters: embed, the axis of a matrix that belongs to the residual stream; heads_out and mlp, its other
    axis; vocab; fused_qkv_mlp, the input axis of a matrix whose output is split (query, key, value and MLP in one),
    because shards of the output axis would not align with the split.
    """

    batch: Axes = ("data", "fsdp")
    tokens: Axes = ("sequence",)
    heads: Axes = ("tensor", "sequence")
    mlp_act: Axes = ("tensor",)
    embed: Axes = ("fsdp", "sequence")
    heads_out: Axes = ("tensor",)
    mlp: Axes = ("tensor",)
    vocab: Axes = ("tensor",)
    fused_qkv_mlp: Axes = ("fsdp", "sequence", "tensor")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            axes = getattr(self, field.name)
            if len(set(axes)) != len(axes) or not set(axes) <= set(MESH_AXES):
                raise ClvrError(f"sharding rule {field.name} = {axes}: must be distinct members of {MESH_AXES}")


# Parameter name -> logical axes of its last dimensions. The first match applies; a stack has its layers in front, which
# are never sharded, because the scan takes one layer at a time.
_PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"\.(q_proj|k_proj|v_proj|to_q|to_k|to_v|add_[qkv]_proj)\.kernel$", ("embed", "heads_out")),
    (r"\.(o_proj|to_out\.0|to_add_out|attn\.proj)\.kernel$", ("heads_out", "embed")),
    (r"\.(to_qkv_mlp_proj|linear_in|qkv)\.kernel$|modulation\w*\.linear\.kernel$", ("fused_qkv_mlp", None)),
    (r"\.(gate_proj|up_proj|linear_fc1)\.kernel$", ("embed", "mlp")),
    (r"\.(down_proj|linear_out|linear_fc2)\.kernel$", ("mlp", "embed")),
    (r"(^|\.)embed_tokens\.embedding$", ("vocab", "embed")),
    (r"(^|\.)lm_head\.kernel$", ("embed", "vocab")),
)


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """A mesh and the table of logical axes, which determine the sharding of every array."""

    mesh: Mesh
    rules: Rules = Rules()

    @property
    def platform(self) -> str:
        """The platform of the mesh, "cpu", "gpu" or "tpu", which can differ from that of this machine."""
        found: str = self.mesh.devices.flat[0].platform
        return found

    @property
    def batch_shards(self) -> int:
        """Number of shards of a batch."""
        return math.prod(self.mesh.shape[axis] for axis in self.rules.batch)

    def spec(self, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
        """Returns the partition of an array.

        Args:
          axes: logical axis of each dimension, None for a dimension that is not sharded.
          shape: of the array; mesh axes whose product does not divide a dimension are not used, from the last one on.
        Raises: ClvrError if two dimensions use the same mesh axis.
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
        """Returns the sharding of an array, from the same arguments as `spec`."""
        return NamedSharding(self.mesh, self.spec(axes, shape))

    @property
    def replicated(self) -> NamedSharding:
        """The sharding that stores the complete array on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def parameters(self, params: Params) -> PyTree:
        """Returns the shardings of a tree of parameters, or of a tree with the same names: EMA, gradients, deltas."""

        def place(path: KeyPath, leaf: Leaf) -> NamedSharding:
            return self.sharding(parameter_axes(dotted(path_of(path)), leaf.shape), leaf.shape)

        return jax.tree_util.tree_map_with_path(place, params)

    def optimizer_state(self, opt_state: PyTree, params: Params) -> PyTree:
        """Returns the shardings of an optimizer's state; arrays with a parameter's name and shape have its sharding."""
        known = {
            path: (leaf.shape, self.sharding(parameter_axes(dotted(path), leaf.shape), leaf.shape))
            for path, leaf in leaves_by_path(params).items()
        }

        def place(keys: KeyPath, leaf: Leaf) -> NamedSharding:
            path = path_of(keys)
            ends = (path[begin:] for begin in range(len(path)))
            shape, sharding = next((known[end] for end in ends if end in known), ((), self.replicated))
            return sharding if shape == leaf.shape else self.replicated

        return jax.tree_util.tree_map_with_path(place, opt_state)

    def batch(self, batch: PyTree, *, leading: int = 0) -> PyTree:
        """Returns the shardings of a batch, which is sharded along its first axis after `leading` others."""
        axes = [None] * leading + ["batch"] + [None] * 8
        return jax.tree.map(lambda leaf: self.sharding(axes[: leaf.ndim], leaf.shape), batch)

    @contextlib.contextmanager
    def active(self) -> Iterator["MeshLayout"]:
        """Activates this layout for all programs that are traced inside the context."""
        token = _ACTIVE.set(self)
        try:
            with jax.set_mesh(self.mesh):
                yield self
        finally:
            _ACTIVE.reset(token)


_ACTIVE: ContextVar[MeshLayout | None] = ContextVar("layout", default=None)


def active_layout() -> MeshLayout | None:
    """Returns the layout for which programs are currently traced; None if there is none."""
    return _ACTIVE.get()


@contextlib.contextmanager
def without_layout() -> Iterator[None]:
    """Deactivates the layout inside the context: programs run in this process alone and wait for no other process."""
    token = _ACTIVE.set(None)
    try:
        with jax.set_mesh(None):
            yield
    finally:
        _ACTIVE.reset(token)


def with_logical_constraint(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an activation by the logical names of its axes, one per axis.

    Without an active layout, or on one device, `x` is returned unchanged.
    """
    layout = _ACTIVE.get()
    if layout is None or layout.mesh.size == 1:
        return x
    out: jax.Array = jax.lax.with_sharding_constraint(x, layout.spec(axes, x.shape))
    return out


def with_shardings(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns the shapes and dtypes of a tree of arrays or shapes with a sharding for each."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def replicate(params: Params) -> Params:
    """Replicates parameters on every device from this point of a program on; without a layout, returns them unchanged.

    For small models, such as the autoencoder, sharded matrix products would cost more than a copy of the weights.
    """
    layout = _ACTIVE.get()
    if layout is None or layout.mesh.size == 1:
        return params
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, layout.replicated), params)


def process_allgather(tree: Tree) -> Tree:
    """Returns a tree whose arrays are complete in every process: arrays that span processes become NumPy arrays.

    Every process must call it.
    """
    found: Tree = jax.tree.map(
        lambda leaf: leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True), tree
    )
    return found


def parameter_axes(name: str, shape: Sequence[int]) -> tuple[str | None, ...]:
    """Returns the logical axes of a parameter: those of its name, or its larger axis if it is a matrix of another name.

    Vectors are small and are replicated: gathering them would cost more than their memory. The scales of quantized
    weights (`models.common.quantization`) are sharded as the axis of the weights that they belong to.
    """
    if found := re.search(r"\.(kernel|embedding)_scale$", name):
        known = next((axes for pattern, axes in _PARAMETERS if re.search(pattern, name.removesuffix("_scale"))), None)
        own = None if known is None else known[1 if found[1] == "kernel" else 0]
        return (*[None] * (len(shape) - 1), own)
    known = next((axes for pattern, axes in _PARAMETERS if re.search(pattern, name)), None)
    if known is not None and len(shape) - len(known) in (0, 1):
        return (*[None] * (len(shape) - len(known)), *known)
    axes: list[str | None] = [None] * len(shape)
    if len(shape) > 1:
        # Only the last two axes: the axes before them are layers, or the window of a convolution.
        axes[max(range(len(shape) - 2, len(shape)), key=lambda axis: shape[axis])] = "embed"
    return tuple(axes)
