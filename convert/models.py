"""Loading and saving of one model in a directory of a diffusers or transformers checkpoint."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import PyTree

from clvr_jax.checkpoint_io.orbax_tree import PARAMS, is_tree, nested
from clvr_jax.checkpoint_io.tensors import FLOATS, StoredTensor, stored_tensors, write_tensors
from clvr_jax.convert.architectures import Architecture, quantized
from clvr_jax.convert.lora.trees import Adapter, adapters_by_path
from clvr_jax.convert.rules import AS_IS, Entry, check_dtypes, check_keys, check_tree, leaves_of, state_to_torch
from clvr_jax.convert.shards import Adapters, Index, read_part, read_quantized, scale_index, scaled_axis
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import atomic_directory, located, read_json
from clvr_jax.models.common.adapters import kernel_delta
from clvr_jax.models.common.quantization import Quantization, is_quantized, scale_path
from clvr_jax.models.common.quantization import quantize as quantize_array
from clvr_jax.sharding import active_layout
from clvr_jax.trees import Params
from clvr_jax.trees import Path as TreePath

Ends = tuple[tuple[int | None, int | None], ...]
"""Start and stop of each slice of an index, which can be a key, as slices cannot."""


def load_model(
    directory: Path,
    architecture: Architecture,
    dtype: DTypeLike = jnp.float32,
    shardings: PyTree[Sharding] | None = None,
    variant: str | None = None,
    loras: Sequence[tuple[Params, float]] = (),
    quantize: Quantization | None = None,
    memory_kind: str | None = None,
) -> Any:
    """Loads a model one leaf at a time; reads only this process's shards of a sharded leaf.

    On a CPU the arrays are used as they were read: the peak of memory is the bytes of the parameters and some buffers.

    Args:
      directory: contains config.json and either safetensors (one file or shards) or `params/`, which
        `clvr convert --to jax` writes.
      architecture: of the model.
      dtype: of the computation; floating-point parameters are cast to it.
      shardings: NNX state of `jax.sharding.Sharding`, as the model's; None: as the active layout has it, or all on the
        default device if there is none.
      variant: see `model_file`.
      loras: LoRA trees of this model and their weights, which are added to the parameters before they are placed.
      quantize: "int8" quantizes the weights as they are read, see `models.common.quantization`; None does not.
      memory_kind: of the devices, where the parameters are placed: JAX's "pinned_host" keeps them in host memory; None
        is the devices' own memory.
    Returns: the NNX module.
    Raises: ClvrError for missing or damaged files, or keys or shapes that do not match.
    """
    if not directory.is_dir():
        raise ClvrError(f"{directory}: no such directory")
    config = read_json(directory / "config.json")
    with located(directory):
        graphdef, state = (quantized(architecture) if quantize else architecture).split(config, dtype)
        plan = architecture.entries(config)
    if shardings is None and (layout := active_layout()) is not None:
        shardings = layout.parameters(state)
    device = SingleDeviceSharding(jax.devices()[0])
    paths = leaves_of(state)
    placed = leaves_of(shardings) if shardings is not None else dict.fromkeys(paths, device)
    adapters = adapters_by_path(loras)
    loaded: dict[TreePath, jax.Array] = {}
    if is_tree(directory / PARAMS):
        loaded = _restore(directory / PARAMS, plan, dtype, {entry.path: placed[entry.path] for entry in plan})
        # Orbax places what it reads. One kernel after the other, so that two copies of one are the most there is.
        for path, own in adapters.items():
            loaded[path] = jax.device_put(_with_loras(loaded[path], *zip(*own, strict=True)), placed[path])
        for entry in plan:
            if (scale := scale_path(entry.path)) in paths:
                both = (placed[entry.path], placed[scale])
                loaded[entry.path], loaded[scale] = jax.device_put(_quantized(loaded.pop(entry.path), entry), both)
        if memory_kind is not None:
            for path, leaf in loaded.items():
                loaded[path] = jax.device_put(leaf, leaf.sharding.with_memory_kind(memory_kind))
    else:
        stored = architecture.canonicalize_keys(
            stored_tensors(directory, variant), architecture.config_from_dict(config)
        )
        check_keys(plan, {key: tensor.shape for key, tensor in stored.items()}, str(directory))
        check_dtypes(plan, {key: tensor.dtype for key, tensor in stored.items()}, str(directory))
        if memory_kind is not None:
            placed = {path: sharding.with_memory_kind(memory_kind) for path, sharding in placed.items()}
        for entry in plan:
            added, scale = adapters.get(entry.path, []), scale_path(entry.path)
            if scale in paths:
                arrays = _quantized_leaf(entry, stored, placed[entry.path], placed[scale], added)
                loaded[entry.path], loaded[scale] = arrays
            else:
                loaded[entry.path] = _leaf(entry, stored, dtype, placed[entry.path], added)
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.from_flat_state(loaded.items())))
    return nnx.merge(graphdef, state)


def _target(entry: Entry, dtype: DTypeLike) -> np.dtype:
    return np.dtype(dtype) if jnp.issubdtype(entry.dtype, jnp.floating) else np.dtype(np.int32)


def _leaf(
    entry: Entry, stored: Mapping[str, StoredTensor], dtype: DTypeLike, sharding: Sharding, adapters: Adapters
) -> jax.Array:
    target = _target(entry, dtype)
    return _placed(entry.shape, sharding, lambda index: read_part(entry, stored, index, target, adapters))


def _quantized_leaf(
    entry: Entry, stored: Mapping[str, StoredTensor], sharding: Sharding, scale_sharding: Sharding, adapters: Adapters
) -> tuple[jax.Array, jax.Array]:
    """Reads and quantizes a parameter: the integers and their scales."""
    parts: dict[Ends, np.ndarray] = {}
    shape = tuple(entry.shape[axis] for axis in range(len(entry.shape)) if axis != scaled_axis(entry))

    def read(index: Index) -> np.ndarray:
        values, scales = read_quantized(entry, stored, index, adapters)
        parts[_ends(scale_index(entry, index))] = scales
        return values

    def scales(index: Index) -> np.ndarray:
        found = parts.get(_ends(index))
        if found is None:  # the scales are sharded in another way
            ends: Index = (*index, *[slice(None)] * (len(shape) - len(index)))
            *outer, last = ends
            whole = (*outer, last, slice(None)) if entry.transform is AS_IS else (*outer, slice(None), last)
            _, found = read_quantized(entry, stored, whole, adapters)
        return found

    kernel = _placed(entry.shape, sharding, read)
    return kernel, _placed(shape, scale_sharding, scales)


def _placed(shape: tuple[int, ...], sharding: Sharding, read: Callable[[Index], np.ndarray]) -> jax.Array:
    found: dict[Ends, np.ndarray] = {}

    def once(index: Index | None) -> np.ndarray:  # devices with the same shard share one read
        key = _ends(index or ())
        if key not in found:
            found[key] = read(index or ())
        return found[key]

    return jax.make_array_from_callback(shape, sharding, once)


def _ends(index: Index) -> Ends:
    return tuple((part.start, part.stop) for part in index)


def _quantized(leaf: jax.Array, entry: Entry) -> tuple[jax.Array, jax.Array]:
    found: tuple[jax.Array, jax.Array] = jax.jit(quantize_array, static_argnums=1, donate_argnums=0)(
        leaf, scaled_axis(entry)
    )
    return found


@jax.jit
def _with_loras(leaf: jax.Array, adapters: tuple[Adapter, ...], weights: tuple[float, ...]) -> jax.Array:
    delta = sum(weight * kernel_delta(own, leaf) for own, weight in zip(adapters, weights, strict=True))
    return (leaf.astype(jnp.float32) + delta).astype(leaf.dtype)


def _restore(
    directory: Path, plan: list[Entry], dtype: DTypeLike, placed: Mapping[TreePath, Sharding]
) -> dict[TreePath, jax.Array]:
    check_dtypes(plan, check_tree(directory, plan), str(directory))
    # Through names: Orbax has its own idea of the numbered members of a list.
    wanted = nested(
        {
            entry.path: jax.ShapeDtypeStruct(entry.shape, _target(entry, dtype), sharding=placed[entry.path])
            for entry in plan
        }
    )
    import orbax.checkpoint as ocp  # slow to import, and only this function needs it

    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(directory.absolute(), wanted)
    return {entry.path: functools.reduce(lambda tree, name: tree[str(name)], entry.path, restored) for entry in plan}


def save_model(
    directory: Path,
    model: Any,
    architecture: Architecture,
    dtype: str = "float32",
    rest: Mapping[str, StoredTensor] | None = None,
) -> None:
    """Writes a model to a directory that PyTorch loads; the directory appears only when it is complete.

    Args:
      directory: replaced if it exists.
      model: the module; its `config` becomes config.json.
      architecture: of the model.
      dtype: "float32", "float16" or "bfloat16", of floating-point parameters.
      rest: all tensors of the files that the model was read from, if it holds only a part of them: what it lacks is
        copied, and their order is kept.
    """
    if is_quantized(model):
        raise ClvrError(f"{directory}: the model is quantized; load it without quantize to save it")
    target = FLOATS[dtype]
    held = state_to_torch(model, architecture.key_mapping(model.config))
    whole: Mapping[str, np.ndarray | StoredTensor]
    whole = held if rest is None else {key: held.get(key, stored) for key, stored in rest.items()}
    opened = ((key, tensor.open() if isinstance(tensor, StoredTensor) else tensor) for key, tensor in whole.items())
    tensors = {
        key: tensor.astype(target, copy=False) if jnp.issubdtype(tensor.dtype, jnp.floating) else tensor
        for key, tensor in opened
    }
    with atomic_directory(directory) as temporary:
        (temporary / "config.json").write_text(json.dumps(architecture.config_to_dict(model.config), indent=2) + "\n")
        write_tensors(temporary, tensors, architecture.file_name)
