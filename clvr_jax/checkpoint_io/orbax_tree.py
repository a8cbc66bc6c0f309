"""Orbax checkpoints of a parameter tree that are written and read one layer at a time.

Orbax itself saves a tree that is in memory, but a 32 GB model that is converted on a laptop does not fit. So the arrays
are written in Orbax's format without Orbax: one zarr directory per array, its chunks as files of uncompressed bytes,
and two JSON files that describe the tree. `ocp.StandardCheckpointer().restore` reads such a directory like its own, and
each process reads its shards.
"""

import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorstore as ts
from jaxtyping import PyTree

from clvr_jax.checkpoint_io.disk import put
from clvr_jax.checkpoint_io.tensors import is_file_name
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import read_json, write_json
from clvr_jax.files.json_input import JSON, UncheckedJSON

PARAMS = "params"
"""Name of the directory of a model's parameters, beside its config.json."""

TreePath = tuple[str | int, ...]
Memory = Callable[[tuple[int, ...], np.dtype], np.ndarray]
"""(shape, dtype) -> an uninitialized array."""
Block = tuple[slice, np.ndarray]
"""Rows of an array, along its first axis, and their values."""

_CHUNK_BYTES = 16 * 2**20
_DICTIONARY = 2  # Orbax's type of key for dictionaries; list members are saved with their index as the key


class TreeWriter:
    """A writer of one Orbax checkpoint.

    Args:
      directory: created if it does not exist; an unfinished one with the same leaves is continued.
      leaves: path -> (shape, dtype) of every leaf.
      stacked: paths of the leaves whose first axis is the layers, which are written one by one.
    """

    def __init__(
        self, directory: Path, leaves: Mapping[TreePath, tuple[tuple[int, ...], np.dtype]], stacked: set[TreePath]
    ):
        self._directory, self._leaves = directory, leaves
        self._arrays = {}
        for path, (shape, dtype) in leaves.items():
            place = directory / ".".join(map(str, path))
            array = _Plain(place, shape, dtype, _chunks(shape, dtype, path in stacked))
            place.mkdir(parents=True, exist_ok=True)
            write_json(place / ".zarray", array.metadata)
            self._arrays[path] = array

    def write(self, path: TreePath, layer: int | None, values: np.ndarray) -> None:
        """Writes one layer of a stacked leaf, or a complete leaf if `layer` is None."""
        self._arrays[path].write(values, layer)

    def finish(self) -> None:
        """Writes the description of the tree, which completes the checkpoint."""
        tree = {
            str(tuple(map(str, path))): {
                "key_metadata": [{"key": str(key), "key_type": _DICTIONARY} for key in path],
                "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)},
            }
            for path, (shape, _) in self._leaves.items()
        }
        write_json(
            self._directory / "_METADATA",
            {
                "tree_metadata": tree,
                "use_ocdbt": False,
                "use_zarr3": False,
                "store_array_data_equal_to_fill_value": True,
                "custom_metadata": None,
            },
        )
        now = time.time_ns()
        write_json(
            self._directory / "_CHECKPOINT_METADATA",
            {
                "item_handlers": "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler",
                "metrics": {},
                "performance_metrics": {},
                "init_timestamp_nsecs": now,
                "commit_timestamp_nsecs": now,
                "custom_metadata": {},
            },
        )


@dataclass(frozen=True)
class _Plain:
    """A zarr array with uncompressed chunks, each of which consists of complete rows of one layer."""

    directory: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]

    @property
    def metadata(self) -> dict[str, JSON]:
        """The content of `.zarray` (zarr, version 2)."""
        return {
            "zarr_format": 2,
            "shape": list(self.shape),
            "chunks": list(self.chunks),
            "dtype": "bfloat16" if self.dtype == ml_dtypes.bfloat16 else self.dtype.str,
            "compressor": None,  # weights hardly compress, and uncompressed bytes can be memory-mapped
            "order": "C",
            "filters": None,
            "fill_value": None,
            "dimension_separator": ".",
        }

    def write(self, values: np.ndarray, layer: int | None) -> None:
        """Writes one layer, or the complete array if `layer` is None."""
        for rows, file, length in self._files(layer):
            put(file, 0, values[rows] if values.ndim else values)
            os.truncate(file, length)  # zarr pads the last chunk to the size of the others

    def blocks(self, layer: int | None, memory: Memory) -> Iterator[Block]:
        """Yields one layer, or the complete array if `layer` is None, in memory-mapped blocks of rows."""
        own = self.shape if layer is None else self.shape[1:]
        for rows, file, length in self._files(layer):
            if file.stat().st_size != length:
                raise ClvrError(f"{file}: {file.stat().st_size} bytes instead of {length}; convert the model again")
            shape = (rows.stop - rows.start, *own[1:]) if own else ()
            yield (
                rows,
                np.memmap(file, self.dtype, "r", shape=shape) if math.prod(shape) else np.zeros(shape, self.dtype),
            )

    def _files(self, layer: int | None) -> Iterator[tuple[slice, Path, int]]:
        """Yields rows, file and size in bytes of each chunk of a layer."""
        own, chunks = (self.shape, self.chunks) if layer is None else (self.shape[1:], self.chunks[1:])
        length = math.prod(chunks) * self.dtype.itemsize
        step = chunks[0] if chunks else 1
        for number in range(-(-own[0] // step) if own else 1):
            key = [*([] if layer is None else [layer]), *([number] if own else []), *[0] * (len(own) - 1)]
            rows = slice(number * step, min((number + 1) * step, own[0])) if own else slice(0, 1)
            yield rows, self.directory / (".".join(map(str, key)) or "0"), length


@dataclass(frozen=True)
class _Store:
    """An array in any other format of Orbax, which is read through TensorStore as in Orbax itself."""

    array: ts.TensorStore

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        """NumPy dtype of the array."""
        return self.array.dtype.numpy_dtype

    def blocks(self, layer: int | None, memory: Memory) -> Iterator[Block]:
        """Yields one layer, or the complete array if `layer` is None, in one block of memory from the allocator."""
        part = self.array if layer is None else self.array[layer]
        values = memory(tuple(part.shape), self.dtype)
        ts.array(values).write(part).result()
        yield slice(None), values


StoredArray = _Plain | _Store


def is_tree(directory: Path) -> bool:
    """Returns whether the directory is a complete Orbax checkpoint of one tree."""
    return (directory / "_METADATA").exists()


def open_tree(directory: Path) -> dict[str, StoredArray]:
    """Returns dotted path -> array of an Orbax checkpoint; values are read on request.

    Raises: ClvrError if the directory is not a complete checkpoint, or is damaged.
    """
    if not is_tree(directory):
        raise ClvrError(f"{directory}: not a complete Orbax checkpoint, _METADATA is missing")
    metadata = read_json(directory / "_METADATA")
    context = ts.Context({"file_io_mode": {"mode": "memmap"}})  # avoids one copy
    arrays: dict[str, StoredArray] = {}
    for name in _names(directory, metadata):
        arrays[name] = _plain_array(directory / name) or _stored_array(directory, name, metadata, context)
    return arrays


def _names(directory: Path, metadata: UncheckedJSON) -> Iterator[str]:
    """Yields the dotted paths that `_METADATA` lists: each is a directory here or a key of Orbax's own store."""
    try:
        for described in metadata["tree_metadata"].values():
            name = ".".join(entry["key"] for entry in described["key_metadata"])
            if not is_file_name(name):
                raise ClvrError(
                    f"{directory}: _METADATA lists {name[:60]!r}, which is not a file name; convert the model again"
                )
            yield name
    except (AttributeError, LookupError, TypeError) as error:
        raise ClvrError(f"{directory}: _METADATA is not what Orbax writes; convert the model again") from error


def _plain_array(directory: Path) -> _Plain | None:
    if not (directory / ".zarray").exists():
        return None
    found = read_json(directory / ".zarray")
    try:
        dtype = np.dtype(ml_dtypes.bfloat16 if found["dtype"] == "bfloat16" else found["dtype"])
        array = _Plain(directory, tuple(found["shape"]), dtype, tuple(found["chunks"]))
        if not all(type(n) is int and 0 <= n < 2**40 for n in (*array.shape, *array.chunks)):
            raise ValueError("sizes must be integers from 0 to 2**40")
        if len(array.shape) != len(array.chunks):
            raise ValueError("shape and chunks differ in length")
        if any(size > 0 and chunk == 0 for size, chunk in zip(array.shape, array.chunks, strict=True)):
            raise ValueError("a chunk has no rows")
    except (LookupError, TypeError, ValueError) as error:
        raise ClvrError(f"{directory / '.zarray'}: not what zarr writes ({error}); convert the model again") from error
    split = [axis for axis, (size, chunk) in enumerate(zip(array.shape, array.chunks, strict=True)) if size != chunk]
    is_ours = array.metadata == found and (len(split) < 2 or (split == [0, 1] and array.chunks[0] == 1))
    return array if is_ours else None


def _stored_array(directory: Path, name: str, metadata: UncheckedJSON, context: ts.Context) -> _Store:
    where = {"driver": "file", "path": f"{directory.absolute()}/{name}/"}
    if metadata.get("use_ocdbt", False):
        where = {"driver": "ocdbt", "base": f"file://{directory.absolute()}/", "path": f"{name}/"}
    spec = {"driver": "zarr3" if metadata.get("use_zarr3") else "zarr", "kvstore": where}
    try:
        return _Store(ts.open(spec, open=True, read=True, context=context).result())
    except ValueError as error:
        reason = str(error).splitlines()[0][:160]
        raise ClvrError(f"{directory}: {name} cannot be read ({reason})") from error


def nested(leaves: Mapping[TreePath, PyTree]) -> dict[str, PyTree]:
    """Converts path -> leaf to the tree of dictionaries that Orbax restores."""
    tree: dict[str, PyTree] = {}
    for path, leaf in leaves.items():
        *owners, last = map(str, path)
        functools.reduce(lambda node, name: node.setdefault(name, {}), owners, tree)[last] = leaf
    return tree


def _chunks(shape: tuple[int, ...], dtype: np.dtype, stacked: bool) -> tuple[int, ...]:
    """Returns the shape of chunks of some megabytes in one layer, so that a process reads little more than its shard.

    The number of chunks divides the number of rows if possible, because the last chunk is padded.
    """
    layers, own = ((1,), shape[1:]) if stacked else ((), shape)
    if not math.prod(own) or not own:
        return (*layers, *(max(size, 1) for size in own))
    least = min(-(-math.prod(own) * dtype.itemsize // _CHUNK_BYTES), own[0])
    count = next((count for count in range(least, 4 * least) if own[0] % count == 0), least)
    return (*layers, -(-own[0] // count), *own[1:])
