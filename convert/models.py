"""One model <-> one folder of a diffusers or transformers checkpoint."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from clvr_jax.convert.families import Family
from clvr_jax.convert.lora import pairs_by_path, part_of_change
from clvr_jax.convert.orbax_tree import PARAMS, check_tree, is_tree, nested
from clvr_jax.convert.rules import Entry, check_dtypes, check_keys, leaves_of, state_to_torch
from clvr_jax.convert.tensors import FLOATS, Stored, stored_tensors, write_tensors
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from clvr_jax.errors import ClvrError
from clvr_jax.files import located, read_json, replacing
from clvr_jax.models.lora import LoRAPair
from clvr_jax.sharding import active_layout
from clvr_jax.trees import Tree


def load_model(
    folder: Path,
    family: Family,
    dtype: DTypeLike = jnp.float32,
    shardings: Any = None,
    variant: str | None = None,
    loras: Sequence[tuple[Tree, float]] = (),
) -> Any:
    """Reads a model from its folder, one leaf at a time; of a sharded leaf, the bytes of this process's shards only.

    The folder is PyTorch's, or one that `clvr convert --to jax` made of it.

    Args:
      folder: holds config.json, and safetensors (one file or shards) or `params/`.
      family: the architecture.
      dtype: of the computation; floating-point parameters are cast to it.
      shardings: NNX state of `jax.sharding.Sharding`, as the model's; None: as the active layout has it, or all on the
        default device if there is none.
      variant: see `model_file`.
      loras: LoRA trees of this model and their weights, which are added to the parameters before they are placed.
    Returns: the NNX module.
    Raises: ClvrError for missing or damaged files, keys or shapes that do not match.
    """
    if not folder.is_dir():
        raise ClvrError(f"{folder}: no such folder")
    config = read_json(folder / "config.json")
    with located(folder):
        graphdef, state = family.split(config, dtype)
        plan = family.entries(config)
    if shardings is None and (layout := active_layout()) is not None:
        shardings = layout.parameters(state)
    device = SingleDeviceSharding(jax.devices()[0])
    placed = leaves_of(shardings) if shardings is not None else dict.fromkeys((entry.path for entry in plan), device)
    pairs = pairs_by_path(loras)
    if is_tree(folder / PARAMS):
        loaded = _restore(folder / PARAMS, plan, dtype, placed)
        # Orbax places what it reads. One kernel after the other, so that two copies of one are the most there is.
        for path, own in pairs.items():
            loaded[path] = jax.device_put(_with_loras(loaded[path], *zip(*own, strict=True)), placed[path])
    else:
        stored = family.published(stored_tensors(folder, variant), family.config_from_dict(config))
        check_keys(plan, {key: tensor.shape for key, tensor in stored.items()}, str(folder))
        check_dtypes(plan, {key: tensor.dtype for key, tensor in stored.items()}, str(folder))
        loaded = {
            entry.path: _leaf(entry, stored, dtype, placed[entry.path], pairs.get(entry.path, ())) for entry in plan
        }
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.from_flat_state(loaded.items())))
    return nnx.merge(graphdef, state)


def _target(entry: Entry, dtype: DTypeLike) -> np.dtype:
    return np.dtype(dtype) if jnp.issubdtype(entry.dtype, jnp.floating) else np.dtype(np.int32)


def _leaf(
    entry: Entry,
    stored: Mapping[str, Stored],
    dtype: DTypeLike,
    sharding: Sharding,
    pairs: Sequence[tuple[LoRAPair, float]],
) -> jax.Array:
    target = _target(entry, dtype)

    @functools.cache  # devices that hold the same part share one reading of it
    def read(ranges: tuple[tuple[int | None, int | None], ...]) -> np.ndarray:
        index = tuple(slice(*ends) for ends in ranges)
        if pairs:
            return _adapted_part(entry, stored, index, target, pairs)
        return read_part(entry, stored, index).astype(target, order="C", copy=False)

    return jax.make_array_from_callback(
        entry.shape, sharding, lambda index: read(tuple((part.start, part.stop) for part in index or ()))
    )


def read_part(entry: Entry, stored: Mapping[str, Stored], index: tuple[slice, ...]) -> np.ndarray:
    """The part of a leaf that one device holds, in the file's dtype; no other tensors, rows or columns are touched.

    Args:
      entry: the leaf.
      stored: where its tensors lie.
      index: of the leaf, one slice for each leading axis.
    """
    layers, own = (entry.keys[index[0]], index[1:]) if entry.stacked and index else (entry.keys, index)
    parts = [entry.layout.from_torch(stored[key].open())[own] for key in layers]
    return np.stack(parts) if entry.stacked else np.asarray(parts[0])


def _adapted_part(
    entry: Entry,
    stored: Mapping[str, Stored],
    index: tuple[slice, ...],
    target: np.dtype,
    pairs: Sequence[tuple[LoRAPair, float]],
) -> np.ndarray:
    """As `read_part`, with the LoRAs of the leaf added in float32, one layer of a stack after the other."""
    layers: Sequence[int | None] = [None]
    own = index
    if entry.stacked:
        layers, own = range(len(entry.keys))[index[0] if index else slice(None)], index[1:]
    parts = []
    for layer in layers:
        values = entry.layout.from_torch(stored[entry.keys[layer or 0]].open())[own].astype(np.float32)
        parts.append((values + part_of_change(pairs, layer, own)).astype(target, order="C"))
    return np.stack(parts) if entry.stacked else parts[0]


@jax.jit
def _with_loras(leaf: jax.Array, pairs: tuple[LoRAPair, ...], weights: tuple[float, ...]) -> jax.Array:
    change = sum(weight * pair.product() for pair, weight in zip(pairs, weights, strict=True))
    return (leaf.astype(jnp.float32) + change).astype(leaf.dtype)


def _restore(folder: Path, plan: list[Entry], dtype: DTypeLike, placed: Mapping[Any, Sharding]) -> dict[Any, jax.Array]:
    check_dtypes(plan, check_tree(folder, plan), str(folder))
    # Through names: Orbax has its own idea of the numbered members of a list.
    wanted = nested(
        {
            entry.path: jax.ShapeDtypeStruct(entry.shape, _target(entry, dtype), sharding=placed[entry.path])
            for entry in plan
        }
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder.absolute(), wanted)
    return {entry.path: functools.reduce(lambda tree, name: tree[str(name)], entry.path, restored) for entry in plan}


def save_model(
    folder: Path, model: Any, family: Family, dtype: str = "float32", rest: Mapping[str, Stored] | None = None
) -> None:
    """Writes a model to a folder that PyTorch loads; the folder appears only when it is complete.

    Args:
      folder: replaced if it exists.
      model: the module; its `config` becomes config.json.
      family: its architecture.
      dtype: "float32", "float16" or "bfloat16", of floating-point parameters.
      rest: all tensors of the files that the model was read from, if it holds only a part of them: what it lacks is
        copied, and their order is kept.
    """
    target = FLOATS[dtype]
    held = state_to_torch(model, family.table(model.config))
    whole: Mapping[str, np.ndarray | Stored]
    whole = held if rest is None else {key: held.get(key, stored) for key, stored in rest.items()}
    opened = ((key, tensor.open() if isinstance(tensor, Stored) else tensor) for key, tensor in whole.items())
    tensors = {
        key: tensor.astype(target, copy=False) if jnp.issubdtype(tensor.dtype, jnp.floating) else tensor
        for key, tensor in opened
    }
    with replacing(folder) as temporary:
        (temporary / "config.json").write_text(json.dumps(family.config_to_dict(model.config), indent=2) + "\n")
        write_tensors(temporary, tensors, family.file_name)
