"""One model <-> one folder of a diffusers or transformers checkpoint."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from clvr_jax.convert.rules import Table, state_from_torch, state_to_torch
from clvr_jax.convert.tensors import DIFFUSERS_NAME, read_tensors, write_tensors
from flax import nnx
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
) -> Model:
    """Reads a model from its folder.

    Args:
      folder: holds config.json and safetensors (one file or shards).
      make: config.json as a mapping -> the module; called abstractly, so nothing is initialised.
      table: the architecture's conversion table.
      dtype: floating-point parameters are cast to it.
    Raises: ClvrError for missing or damaged files, keys or shapes that do not match.
    """
    if not folder.is_dir():
        raise ClvrError(f"{folder}: no such folder")
    config = read_json(folder / "config.json")
    abstract = nnx.eval_shape(lambda: make(config))
    graphdef, state = nnx.split(abstract)
    tensors = read_tensors(folder)
    loaded = state_from_torch(tensors, state, table, where=str(folder))

    def cast(leaf: np.ndarray) -> jax.Array:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(leaf, dtype if floating else jnp.int32)

    # Running statistics stay in float32: they are data about the latents, not weights.
    values = jax.tree.map(cast, loaded)
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(values))
    return nnx.merge(graphdef, state)


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
