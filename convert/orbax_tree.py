"""A tree of parameters as an Orbax checkpoint, written and read one layer at a time.

Orbax itself saves a tree that is in memory; a 32 GB model converted on a laptop never is. So the arrays are written in
Orbax's layout without it: a zarr folder for each, its chunks as files of plain bytes, and two JSON files that say what
the tree is. `ocp.StandardCheckpointer().restore` reads such a folder like its own, each process its shards.
"""

import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts
from clvr_jax.convert.disk import put
from clvr_jax.convert.rules import Entry
from clvr_jax.convert.tensors import is_file_name

from clvr_jax.errors import ClvrError
from clvr_jax.files import read_json, write_json

PARAMS = "params"
"""Folder of a model's parameters, beside its config.json."""

TreePath = tuple[str | int, ...]
Memory = Callable[[tuple[int, ...], np.dtype], np.ndarray]
"""(shape, dtype) -> an array to be filled."""
Block = tuple[slice, np.ndarray]
"""Rows of an array, along its first axis, and their values."""

_CHUNK_BYTES = 16 * 2**20
_DICTIONARY = 2  # Orbax's kind of key; members of lists are saved under their number as a name


class TreeWriter:
    """An Orbax checkpoint that is being written.

    Args:
      folder: made if it does not exist; one that was begun with the same leaves is continued.
      leaves: path -> (shape, dtype) of every leaf.
      stacked: paths of the leaves whose first axis is layers, which are written one by one.
    """

    def __init__(
        self, folder: Path, leaves: Mapping[TreePath, tuple[tuple[int, ...], np.dtype]], stacked: set[TreePath]
    ):
        self._folder, self._leaves = folder, leaves
        self._arrays = {}
        for path, (shape, dtype) in leaves.items():
            place = folder / ".".join(map(str, path))
            array = _Plain(place, shape, dtype, _chunks(shape, dtype, path in stacked))
            place.mkdir(parents=True, exist_ok=True)
            write_json(place / ".zarray", array.metadata)
            self._arrays[path] = array

    def write(self, path: TreePath, layer: int | None, values: np.ndarray) -> None:
        """Writes one layer of a stacked leaf, or (`layer` None) a whole leaf."""
        self._arrays[path].write(values, layer)

    def finish(self) -> None:
        """Says what the tree is: only now is the folder a checkpoint."""
        tree = {
            str(tuple(map(str, path))): {
                "key_metadata": [{"key": str(key), "key_type": _DICTIONARY} for key in path],
                "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)},
            }
            for path, (shape, _) in self._leaves.items()
        }
        write_json(
            self._folder / "_METADATA",
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
            self._folder / "_CHECKPOINT_METADATA",
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
    """A zarr array whose chunks are plain bytes. Chunks are cut along one axis only: they are whole rows of a layer."""

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]

    @property
    def metadata(self) -> dict[str, Any]:
        """The content of `.zarray` (zarr, version 2)."""
        return {
            "zarr_format": 2,
            "shape": list(self.shape),
            "chunks": list(self.chunks),
            "dtype": "bfloat16" if self.dtype == ml_dtypes.bfloat16 else self.dtype.str,
            "compressor": None,  # weights do not shrink, and their bytes are read as they are
            "order": "C",
            "filters": None,
            "fill_value": None,
            "dimension_separator": ".",
        }

    def write(self, values: np.ndarray, layer: int | None) -> None:
        """Writes one layer, or all of it."""
        for rows, file, length in self._files(layer):
            put(file, 0, values[rows] if values.ndim else values)
            os.truncate(file, length)  # the last chunk is as long as the others

    def blocks(self, layer: int | None, memory: Memory) -> Iterator[Block]:
        """One layer (None: all of it) in blocks of rows, mapped."""
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
        """Rows, file and size in bytes of each chunk of a layer."""
        own, chunks = (self.shape, self.chunks) if layer is None else (self.shape[1:], self.chunks[1:])
        length = math.prod(chunks) * self.dtype.itemsize
        step = chunks[0] if chunks else 1
        for number in range(-(-own[0] // step) if own else 1):
            key = [*([] if layer is None else [layer]), *([number] if own else []), *[0] * (len(own) - 1)]
            rows = slice(number * step, min((number + 1) * step, own[0])) if own else slice(0, 1)
            yield rows, self.folder / (".".join(map(str, key)) or "0"), length


@dataclass(frozen=True)
class _Store:
    """An array in any other layout that Orbax writes, read through TensorStore, on which it stands."""

    array: ts.TensorStore

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        """As NumPy has it."""
        return self.array.dtype.numpy_dtype

    def blocks(self, layer: int | None, memory: Memory) -> Iterator[Block]:
        """One layer (None: all of it) in one block, read into memory that is asked for."""
        part = self.array if layer is None else self.array[layer]
        values = memory(tuple(part.shape), self.dtype)
        ts.array(values).write(part).result()
        yield slice(None), values


StoredArray = _Plain | _Store


def is_tree(folder: Path) -> bool:
    """Whether the folder is a complete Orbax checkpoint of one tree."""
    return (folder / "_METADATA").exists()


def open_tree(folder: Path) -> dict[str, StoredArray]:
    """The arrays of an Orbax checkpoint, dotted path -> array; nothing is read before it is asked for.

    Raises: ClvrError if it is none, or is damaged.
    """
    if not is_tree(folder):
        raise ClvrError(f"{folder}: not a complete Orbax checkpoint, _METADATA is missing")
    metadata = read_json(folder / "_METADATA")
    context = ts.Context({"file_io_mode": {"mode": "memmap"}})  # one copy less of every byte
    arrays: dict[str, StoredArray] = {}
    for name in _names(folder, metadata):
        arrays[name] = _plain_array(folder / name) or _stored_array(folder, name, metadata, context)
    return arrays


def _names(folder: Path, metadata: Mapping[str, Any]) -> Iterator[str]:
    """The dotted paths that `_METADATA` lists, each of them a directory here or a key of Orbax's own store."""
    try:
        for described in metadata["tree_metadata"].values():
            name = ".".join(entry["key"] for entry in described["key_metadata"])
            if not is_file_name(name):
                raise ClvrError(f"{folder}: _METADATA lists {name[:60]!r}, which is no name; convert the model again")
            yield name
    except (AttributeError, LookupError, TypeError) as error:
        raise ClvrError(f"{folder}: _METADATA is not what Orbax writes; convert the model again") from error


def _plain_array(folder: Path) -> _Plain | None:
    if not (folder / ".zarray").exists():
        return None
    found = read_json(folder / ".zarray")
    try:
        dtype = np.dtype(ml_dtypes.bfloat16 if found["dtype"] == "bfloat16" else found["dtype"])
        array = _Plain(folder, tuple(found["shape"]), dtype, tuple(found["chunks"]))
        if not all(type(n) is int and 0 <= n < 2**40 for n in (*array.shape, *array.chunks)):
            raise ValueError("sizes are no sizes")
        if len(array.shape) != len(array.chunks):
            raise ValueError("shape and chunks differ in length")
    except (LookupError, TypeError, ValueError) as error:
        raise ClvrError(f"{folder / '.zarray'}: not what zarr writes ({error}); convert the model again") from error
    cut = [axis for axis, (size, chunk) in enumerate(zip(array.shape, array.chunks, strict=True)) if size != chunk]
    is_ours = array.metadata == found and (len(cut) < 2 or (cut == [0, 1] and array.chunks[0] == 1))
    return array if is_ours else None


def _stored_array(folder: Path, name: str, metadata: Mapping[str, Any], context: ts.Context) -> _Store:
    where: dict[str, Any] = {"driver": "file", "path": f"{folder.absolute()}/{name}/"}
    if metadata.get("use_ocdbt", False):
        where = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/", "path": f"{name}/"}
    spec = {"driver": "zarr3" if metadata.get("use_zarr3") else "zarr", "kvstore": where}
    try:
        return _Store(ts.open(spec, open=True, read=True, context=context).result())
    except ValueError as error:
        reason = str(error).splitlines()[0][:160]
        raise ClvrError(f"{folder}: {name} cannot be read ({reason})") from error


def check_tree(folder: Path, plan: list[Entry]) -> dict[str, np.dtype]:
    """Raises ClvrError unless the checkpoint has exactly the leaves of a model.

    Returns: PyTorch key -> dtype of the leaf that it is a part of.
    """
    arrays = open_tree(folder)
    expected = {".".join(map(str, entry.path)): entry for entry in plan}
    shared = expected.keys() & arrays.keys()
    faults = [
        f"{len(names)} {title}: {', '.join(sorted(names)[:6])}"
        for title, names in (
            ("missing", expected.keys() - arrays.keys()),
            ("unexpected", arrays.keys() - expected.keys()),
            ("with another shape", {name for name in shared if arrays[name].shape != expected[name].shape}),
        )
        if names
    ]
    if faults:
        raise ClvrError(f"{folder}: leaves do not match the model; " + "; ".join(faults))
    return {key: arrays[name].dtype for name, entry in expected.items() for key in entry.keys}


def nested(leaves: Mapping[TreePath, Any]) -> dict[str, Any]:
    """Path -> leaf as the tree of dictionaries that Orbax restores."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *owners, last = map(str, path)
        functools.reduce(lambda node, name: node.setdefault(name, {}), owners, tree)[last] = leaf
    return tree


def _chunks(shape: tuple[int, ...], dtype: np.dtype, stacked: bool) -> tuple[int, ...]:
    """Chunks of one layer and some megabytes, so that a process that needs a part reads not much more.

    Their number divides the rows where it can, since the last one would be filled up.
    """
    layers, own = ((1,), shape[1:]) if stacked else ((), shape)
    if not math.prod(own) or not own:
        return (*layers, *(max(size, 1) for size in own))
    least = min(-(-math.prod(own) * dtype.itemsize // _CHUNK_BYTES), own[0])
    count = next((count for count in range(least, 4 * least) if own[0] % count == 0), least)
    return (*layers, -(-own[0] // count), *own[1:])
