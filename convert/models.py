"""One model <-> one folder of a diffusers or transformers checkpoint."""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from clvr_jax.convert.orbax_tree import PARAMS, check_tree, is_tree, nested
from clvr_jax.convert.rules import Entry, Table, check_keys, entries, leaves_of, state_to_torch
from clvr_jax.convert.tensors import DIFFUSERS_NAME, Stored, stored_tensors, write_tensors
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from clvr_jax.errors import ClvrError
from clvr_jax.files import read_json, replacing

Model = TypeVar("Model", bound=nnx.Module)

_FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def load_model(
    folder: Path,
    make: Callable[[Mapping[str, Any]], Model],
    table: Table,
    dtype: DTypeLike = jnp.float32,
    shardings: Any = None,
) -> Model:
    """Reads a model from its folder, one leaf at a time; of a sharded leaf, the bytes of this process's shards only.

    The folder is PyTorch's, or one that `clvr convert --to jax` made of it.

    Args:
      folder: holds config.json, and safetensors (one file or shards) or `params/`.
      make: config.json as a mapping -> the module; called abstractly, so nothing is initialised.
      table: the architecture's conversion table.
      dtype: floating-point parameters are cast to it.
      shardings: NNX state of `jax.sharding.Sharding`, as the model's; None puts all on the default device.
    Raises: ClvrError for missing or damaged files, keys or shapes that do not match.
    """
    if not folder.is_dir():
        raise ClvrError(f"{folder}: no such folder")
    config = read_json(folder / "config.json")
    abstract = nnx.eval_shape(lambda: make(config))
    graphdef, state = nnx.split(abstract)
    plan = entries(state, table)
    device = SingleDeviceSharding(jax.devices()[0])
    placed = leaves_of(shardings) if shardings is not None else dict.fromkeys((entry.path for entry in plan), device)
    if is_tree(folder / PARAMS):
        loaded = _restore(folder / PARAMS, plan, dtype, placed)
    else:
        stored = stored_tensors(folder)
        check_keys(plan, {key: tensor.shape for key, tensor in stored.items()}, str(folder))
        loaded = {entry.path: _leaf(entry, stored, dtype, placed[entry.path]) for entry in plan}
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.from_flat_state(loaded.items())))
    return nnx.merge(graphdef, state)


def _target(entry: Entry, dtype: DTypeLike) -> np.dtype:
    return np.dtype(dtype) if jnp.issubdtype(entry.dtype, jnp.floating) else np.dtype(np.int32)


def _leaf(entry: Entry, stored: Mapping[str, Stored], dtype: DTypeLike, sharding: Sharding) -> jax.Array:
    target = _target(entry, dtype)

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or (slice(None),) * len(entry.shape)
        layers, own = (entry.keys[index[0]], index[1:]) if entry.stacked else (entry.keys, index)
        parts = [np.array(entry.layout.from_torch(stored[key].open())[own], target, order="C") for key in layers]
        return np.stack(parts) if entry.stacked else parts[0]

    return jax.make_array_from_callback(entry.shape, sharding, read)


def _restore(folder: Path, plan: list[Entry], dtype: DTypeLike, placed: Mapping[Any, Sharding]) -> dict[Any, jax.Array]:
    check_tree(folder, plan)
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
    folder: Path,
    model: nnx.Module,
    table: Table,
    config: Mapping[str, Any],
    *,
    dtype: str = "float32",
    name: str = DIFFUSERS_NAME,
) -> None:
    """Writes a model to a folder that PyTorch loads; the folder appears only when it is complete.

    Args:
      folder: replaced if it exists.
      model: the module.
      table: the architecture's conversion table.
      config: config.json.
      dtype: "float32", "float16" or "bfloat16", of floating-point parameters.
      name: file name stem: DIFFUSERS_NAME or TRANSFORMERS_NAME.
    """
    target = _FLOATS[dtype]
    tensors = {
        key: tensor.astype(target) if np.issubdtype(tensor.dtype, np.floating) else tensor
        for key, tensor in state_to_torch(model, table).items()
    }
    with replacing(folder) as temporary:
        (temporary / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
        write_tensors(temporary, tensors, name)
