"""Tensors in diffusers/transformers folders: one safetensors file, or shards with an index."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as _save_file

from clvr_jax.errors import ClvrError
from clvr_jax.files import read_json

DIFFUSERS_NAME = "diffusion_pytorch_model"
TRANSFORMERS_NAME = "model"


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in `folder`, one or all shards of its index."""
    for name in (DIFFUSERS_NAME, TRANSFORMERS_NAME):
        index = folder / f"{name}.safetensors.index.json"
        if index.exists():
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
            absent = [shard for shard in shards if not (folder / shard).exists()]
            if absent or not shards:
                raise ClvrError(f"{index}: names shards that are absent: {', '.join(absent) or '(none listed)'}")
            return [folder / shard for shard in shards]
        if (folder / f"{name}.safetensors").exists():
            return [folder / f"{name}.safetensors"]
    raise ClvrError(
        f"{folder}: neither {DIFFUSERS_NAME}.safetensors nor {TRANSFORMERS_NAME}.safetensors (or their index)"
    )


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of the model in `folder`: key -> array in the file's dtype.

    Raises: ClvrError for missing, truncated or foreign files and for a key that two shards hold.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in tensor_files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    if key in tensors:
                        raise ClvrError(f"{path}: {key} is in another shard too")
                    tensors[key] = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ClvrError(f"{path}: not a complete safetensors file ({error}); fetch or convert it again") from error
    return tensors


def write_tensors(folder: Path, tensors: Mapping[str, np.ndarray], name: str, shard_bytes: int = 5 * 2**30) -> None:
    """Writes tensors as `name`.safetensors, or as shards of at most `shard_bytes` with an index.

    `folder` should be a temporary one that is renamed when complete, see `replacing`.
    """
    shards: list[dict[str, np.ndarray]] = [{}]
    room = shard_bytes
    for key, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][key] = tensor
        room -= tensor.nbytes
    names = [f"{name}.safetensors"]
    if len(shards) > 1:
        names = [f"{name}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file, shard in zip(names, shards, strict=True):
        _save_file(shard, folder / file, metadata={"format": "pt"})
