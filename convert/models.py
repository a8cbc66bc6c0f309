"""Loading and saving of one model in a directory of a diffusers or transformers checkpoint."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from clvr_jax.convert.architectures import Architecture
from clvr_jax.convert.lora import Adapter, adapters_by_path, delta_slice
from clvr_jax.convert.orbax_tree import PARAMS, check_tree, is_tree, nested
from clvr_jax.convert.rules import Entry, check_dtypes, check_keys, leaves_of, state_to_torch
from clvr_jax.convert.tensors import FLOATS, StoredTensor, stored_tensors, write_tensors
from clvr_jax.errors import ClvrError
from clvr_jax.files import located, read_json, replacing
from clvr_jax.models.adapters import kernel_delta
from clvr_jax.sharding import active_layout
from clvr_jax.trees import Tree


def load_model(
    directory: Path,
    architecture: Architecture,
    dtype: DTypeLike = jnp.float32,
    shardings: Any = None,
    variant: str | None = None,
    loras: Sequence[tuple[Tree, float]] = (),
) -> Any:
    """Loads a model one leaf at a time; reads only this process's shards of a sharded leaf.

    Args:
      directory: contains config.json and either safetensors (one file or shards) or `params/`, which
        `clvr convert --to jax` writes.
      architecture: of the model.
      dtype: of the computation; floating-point parameters are cast to it.
      shardings: NNX state of `jax.sharding.Sharding`, as the model's; None: as the active layout has it, or all on the
        default device if there is none.
      variant: see `model_file`.
      loras: LoRA trees of this model and their weights, which are added to the parameters before they are placed.
    Returns: the NNX module.
    Raises: ClvrError for missing or damaged files, or keys or shapes that do not match.
    """
    if not directory.is_dir():
        raise ClvrError(f"{directory}: no such directory")
    config = read_json(directory / "config.json")
    with located(directory):
        graphdef, state = architecture.split(config, dtype)
        plan = architecture.entries(config)
    if shardings is None and (layout := active_layout()) is not None:
        shardings = layout.parameters(state)
    device = SingleDeviceSharding(jax.devices()[0])
    placed = leaves_of(shardings) if shardings is not None else dict.fromkeys((entry.path for entry in plan), device)
    adapters = adapters_by_path(loras)
    if is_tree(directory / PARAMS):
        loaded = _restore(directory / PARAMS, plan, dtype, placed)
        # Orbax places what it reads. One kernel after the other, so that two copies of one are the most there is.
        for path, own in adapters.items():
            loaded[path] = jax.device_put(_with_loras(loaded[path], *zip(*own, strict=True)), placed[path])
    else:
        stored = architecture.canonicalize_keys(
            stored_tensors(directory, variant), architecture.config_from_dict(config)
        )
        check_keys(plan, {key: tensor.shape for key, tensor in stored.items()}, str(directory))
        check_dtypes(plan, {key: tensor.dtype for key, tensor in stored.items()}, str(directory))
        loaded = {
            entry.path: _leaf(entry, stored, dtype, placed[entry.path], adapters.get(entry.path, ())) for entry in plan
        }
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.from_flat_state(loaded.items())))
    return nnx.merge(graphdef, state)


def _target(entry: Entry, dtype: DTypeLike) -> np.dtype:
    return np.dtype(dtype) if jnp.issubdtype(entry.dtype, jnp.floating) else np.dtype(np.int32)


def _leaf(
    entry: Entry,
    stored: Mapping[str, StoredTensor],
    dtype: DTypeLike,
    sharding: Sharding,
    adapters: Sequence[tuple[Adapter, float]],
) -> jax.Array:
    target = _target(entry, dtype)

    @functools.cache  # devices with the same shard share one read
    def read(ranges: tuple[tuple[int | None, int | None], ...]) -> np.ndarray:
        index = tuple(slice(*ends) for ends in ranges)
        if adapters:
            return _adapted_part(entry, stored, index, target, adapters)
        return read_part(entry, stored, index).astype(target, order="C", copy=False)

    return jax.make_array_from_callback(
        entry.shape, sharding, lambda index: read(tuple((part.start, part.stop) for part in index or ()))
    )


def read_part(entry: Entry, stored: Mapping[str, StoredTensor], index: tuple[slice, ...]) -> np.ndarray:
    """Reads one device's shard of a leaf, in the file's dtype; no other tensors, rows or columns are read.

    Args:
      entry: the leaf.
      stored: key -> location of its tensors.
      index: of the leaf, one slice per leading axis.
    """
    layers, own = (entry.keys[index[0]], index[1:]) if entry.stacked and index else (entry.keys, index)
    parts = [entry.transform.from_torch(stored[key].open())[own] for key in layers]
    return np.stack(parts) if entry.stacked else np.asarray(parts[0])


def _adapted_part(
    entry: Entry,
    stored: Mapping[str, StoredTensor],
    index: tuple[slice, ...],
    target: np.dtype,
    adapters: Sequence[tuple[Adapter, float]],
) -> np.ndarray:
    """As `read_part`, with the LoRAs of the leaf added in float32, one layer of a stack after the other."""
    layers: Sequence[int | None] = [None]
    own = index
    if entry.stacked:
        layers, own = range(len(entry.keys))[index[0] if index else slice(None)], index[1:]
    parts = []
    for layer in layers:
        kernel = entry.transform.from_torch(stored[entry.keys[layer or 0]].open())
        delta = delta_slice(adapters, layer, own, functools.partial(kernel.astype, np.float32))
        parts.append((kernel[own].astype(np.float32) + delta).astype(target, order="C"))
    return np.stack(parts) if entry.stacked else parts[0]


@jax.jit
def _with_loras(leaf: jax.Array, adapters: tuple[Adapter, ...], weights: tuple[float, ...]) -> jax.Array:
    delta = sum(weight * kernel_delta(own, leaf) for own, weight in zip(adapters, weights, strict=True))
    return (leaf.astype(jnp.float32) + delta).astype(leaf.dtype)


def _restore(
    directory: Path, plan: list[Entry], dtype: DTypeLike, placed: Mapping[Any, Sharding]
) -> dict[Any, jax.Array]:
    check_dtypes(plan, check_tree(directory, plan), str(directory))
    # Through names: Orbax has its own idea of the numbered members of a list.
    wanted = nested(
        {
            entry.path: jax.ShapeDtypeStruct(entry.shape, _target(entry, dtype), sharding=placed[entry.path])
            for entry in plan
        }
    )
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
    target = FLOATS[dtype]
    held = state_to_torch(model, architecture.key_mapping(model.config))
    whole: Mapping[str, np.ndarray | StoredTensor]
    whole = held if rest is None else {key: held.get(key, stored) for key, stored in rest.items()}
    opened = ((key, tensor.open() if isinstance(tensor, StoredTensor) else tensor) for key, tensor in whole.items())
    tensors = {
        key: tensor.astype(target, copy=False) if jnp.issubdtype(tensor.dtype, jnp.floating) else tensor
        for key, tensor in opened
    }
    with replacing(directory) as temporary:
        (temporary / "config.json").write_text(json.dumps(architecture.config_to_dict(model.config), indent=2) + "\n")
        write_tensors(temporary, tensors, architecture.file_name)
