"""Tensors in diffusers/transformers folders: one safetensors file, or shards with an index."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as _save_file

from clvr_jax.errors import ClvrError

DIFFUSERS_NAME = "diffusion_pytorch_model"
TRANSFORMERS_NAME = "model"


def read_json(path: Path) -> Any:
    """Reads a JSON file; ClvrError names the file and what is wrong with it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ClvrError(f"{path}: no such file") from error
    except (ValueError, OSError) as error:
        raise ClvrError(f"{path}: cannot be read as JSON ({error})") from error


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


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well, else is removed."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ClvrError(f"{folder}: cannot be written ({error.strerror}); choose another place") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        if folder.exists():
            # The old folder steps aside first: a process killed here leaves it under another name, not half deleted.
            previous = temporary.with_name(temporary.name + ".previous")
            folder.rename(previous)
            temporary.rename(folder)
            shutil.rmtree(previous)
        else:
            temporary.rename(folder)
    except OSError as error:
        raise ClvrError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
