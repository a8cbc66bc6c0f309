"""A tree of parameters as an Orbax checkpoint, written and read one layer at a time.

Orbax itself saves a tree that is in memory; a 32 GB model converted on a laptop never is. So the arrays are written
through TensorStore, which Orbax stands on, in Orbax's layout: zarr arrays in one OCDBT store, and two JSON files that
say what the tree is. `ocp.StandardCheckpointer().restore` reads such a folder like its own, each process its shards.
"""

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from clvr_jax.convert.rules import Entry

from clvr_jax.errors import ClvrError
from clvr_jax.files import read_json, write_json

PARAMS = "params"
"""Folder of a model's parameters, beside its config.json."""

TreePath = tuple[str | int, ...]

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
        folder.mkdir(parents=True, exist_ok=True)
        context = ts.Context()
        self._transaction = ts.Transaction()
        self._arrays = {
            path: _open(
                folder,
                path,
                context,
                metadata={
                    "shape": list(shape),
                    "chunks": _chunks(shape, dtype, path in stacked),
                    "dtype": dtype.name if dtype.name == "bfloat16" else dtype.str,
                    "compressor": None,  # weights do not shrink, and their bytes are read as they are
                    "order": "C",
                    "filters": None,
                    "fill_value": None,
                    "dimension_separator": ".",
                },
            )
            for path, (shape, dtype) in leaves.items()
        }

    def write(self, path: TreePath, layer: int | None, values: np.ndarray) -> None:
        """Writes one layer of a stacked leaf, or (`layer` None) a whole leaf"""
        array = self._arrays[path].with_transaction(self._transaction)
        (array if layer is None else array[layer]).write(values).result()

    def flush(self) -> None:
        """Puts what was written on the disk; until then it is held in memory."""
        self._transaction.commit_sync()
        self._transaction = ts.Transaction()

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
                "use_ocdbt": True,
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


def is_tree(folder: Path) -> bool:
    """Whether the folder is a complete Orbax checkpoint of one tree."""
    return (folder / "_METADATA").exists()


def open_tree(folder: Path) -> dict[str, ts.TensorStore]:
    """The arrays of an Orbax checkpoint, dotted path -> array; nothing is read before it is indexed.

    Raises: ClvrError if it is none, or is damaged.
    """
    if not is_tree(folder):
        raise ClvrError(f"{folder}: not a complete Orbax checkpoint, _METADATA is missing")
    metadata = read_json(folder / "_METADATA")
    if not metadata.get("use_ocdbt", False) or metadata.get("use_zarr3", False):
        raise ClvrError(f"{folder}: an Orbax checkpoint of another layout (only OCDBT with zarr arrays is read)")
    context = ts.Context({"file_io_mode": {"mode": "memmap"}})  # one copy less of every byte
    arrays = {}
    for described in metadata["tree_metadata"].values():
        path = tuple(entry["key"] for entry in described["key_metadata"])
        try:
            arrays[".".join(path)] = _open(folder, path, context)
        except ValueError as error:
            reason = str(error).splitlines()[0][:160]
            raise ClvrError(f"{folder}: {'.'.join(path)} cannot be read ({reason})") from error
    return arrays


def read_into(values: np.ndarray, array: ts.TensorStore, layer: int | None) -> np.ndarray:
    """Reads a whole array, or one layer of it, into memory of its shape and dtype, which is returned."""
    ts.array(values).write(array if layer is None else array[layer]).result()
    return values


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
            ("surplus", arrays.keys() - expected.keys()),
            ("with another shape", {name for name in shared if arrays[name].shape != expected[name].shape}),
        )
        if names
    ]
    if faults:
        raise ClvrError(f"{folder}: leaves do not match the model; " + "; ".join(faults))
    return {key: arrays[name].dtype.numpy_dtype for name, entry in expected.items() for key in entry.keys}


def nested(leaves: Mapping[TreePath, Any]) -> dict[str, Any]:
    """Path -> leaf as the tree of dictionaries that Orbax restores."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *owners, last = map(str, path)
        functools.reduce(lambda node, name: node.setdefault(name, {}), owners, tree)[last] = leaf
    return tree


def _open(folder: Path, path: TreePath, context: ts.Context, metadata: dict[str, Any] | None = None) -> ts.TensorStore:
    spec: dict[str, Any] = {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": f"file://{folder.absolute()}/",
            "path": ".".join(map(str, path)) + "/",
        },
    }
    if metadata is None:
        return ts.open(spec, open=True, read=True, context=context).result()
    return ts.open({**spec, "metadata": metadata}, create=True, open=True, context=context).result()


def _chunks(shape: tuple[int, ...], dtype: np.dtype, stacked: bool) -> list[int]:
    """Chunks of one layer and at most some megabytes, so that a process that needs a part reads not much more."""
    chunks = list(shape)
    if stacked:
        chunks[0] = 1
    while int(np.prod(chunks)) * dtype.itemsize > _CHUNK_BYTES:
        widest = int(np.argmax(chunks))
        chunks[widest] = -(-chunks[widest] // 2)
    return [max(size, 1) for size in chunks]
