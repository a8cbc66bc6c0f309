"""Whole folders and single files, PyTorch <-> JAX, of any size: a few tensors are in memory at a time.

A PyTorch folder is a diffusers pipeline, or one model of it or of transformers, with safetensors. Its JAX counterpart
is the same folder in which `params/`, an Orbax checkpoint of the module's parameters, takes the place of the
safetensors. Everything else (configurations, tokenizer, scheduler) is copied. Black Forest Labs' own single files of
FLUX.2 are read too, and become one model's folder.

The new folder appears when it is complete, and a run that was killed goes on (journal.py).
"""

import json
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from clvr_jax.convert.disk import empty
from clvr_jax.convert.journal import Journal, reading, resumable, states
from clvr_jax.convert.model_card import add_model_card
from clvr_jax.convert.orbax_tree import PARAMS, TreeWriter
from clvr_jax.convert.planning import Conversion, Format, PipelineComponent, TensorSlice
from clvr_jax.convert.tensors import FLOATS, bits, preallocate_files, write_tensor

from clvr_jax.outputs import check_destination

_TILE, _LINE = (512, 8192), 64
_LARGE_BYTES = 256 * 2**20
_WORKERS = 3


def convert(
    conversion: Conversion,
    destination: Path,
    *,
    card: str | None = None,
    resume: bool = False,
    on_tensor: Callable[[str], None] | None = None,
) -> list[str]:
    """Does what was planned.

    Args:
      conversion: from `planning.plan`.
      destination: the new folder; must not exist.
      card: README.md of the new folder, unless the source brings one.
      resume: go on with a run of the same conversion that was killed.
      on_tensor: called with "component/key" after each tensor, those of an earlier run included.
    Returns: the tensors ("component/key") that hold a NaN; they are written as they are.
    Raises: UsageError if the destination exists or a killed run is there and `resume` is not set; ClvrError if
      something cannot be written. Then nothing is left behind; a run that is killed leaves its temporary folder.
    """
    check_destination(destination, conversion.source)
    with resumable(destination, "conversion", _identity(conversion), conversion.nbytes, resume) as (folder, journal):
        not_finite = _write(conversion, folder, journal, on_tensor or (lambda name: None))
        for path in conversion.copied:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            copy_file(conversion.source / path, folder / path)
        for name, text in conversion.written.items():
            (folder / name).write_text(text)
        if card:
            add_model_card(folder, card)
    return not_finite


def _write(conversion: Conversion, folder: Path, journal: Journal, on_tensor: Callable[[str], None]) -> list[str]:
    for component in conversion.components:
        write, finish = writer(component, folder / component.name, conversion.to)
        names = {tensor_slice: f"{component.name}/{tensor_slice.spec.key}" for tensor_slice in component.slices}
        wanted = [tensor_slice for tensor_slice in component.slices if names[tensor_slice] not in journal.done]
        for name in (name for name in names.values() if name in journal.done):
            on_tensor(name)
        for tensor_slice, has_nan in _converted(component, conversion.to, wanted, write):
            journal.add(names[tensor_slice], has_nan)
            on_tensor(names[tensor_slice])
        finish()
    return [name for name, bad in journal.done.items() if bad]


def _converted(
    component: PipelineComponent,
    to: Format,
    slices: list[TensorSlice],
    write: Callable[[TensorSlice, np.ndarray], None],
) -> Iterator[tuple[TensorSlice, bool]]:
    """Writes each tensor_slice and says whether it holds a NaN, in order.

    Some at a time, each from the first byte to the last by one thread: while one waits for the disk, others turn theirs
    over.
    """
    memory: SimpleQueue[Buffers] = SimpleQueue()
    for _ in range(_WORKERS):
        memory.put(Buffers())

    def convert(tensor_slice: TensorSlice) -> tuple[TensorSlice, bool]:
        buffers = memory.get()
        try:
            values = buffers("values", shape_in(tensor_slice, to), tensor_slice.spec.dtype)
            filled = _seen_as(component.source, values, tensor_slice, to)
            with reading(f"{component.where}: {tensor_slice.spec.key}"):
                for rows, block in component.read(tensor_slice, partial(buffers, "source")):
                    _copy(block, filled[rows] if filled.ndim else filled, buffers)
            has_nan = _has_nan(values)
            write(tensor_slice, values)
            return tensor_slice, has_nan
        finally:  # also of a tensor that failed: the others would wait for its memory for ever
            memory.put(Buffers() if _is_large(tensor_slice) else buffers)  # so much memory is not kept

    pool = ThreadPoolExecutor(_WORKERS)
    try:
        running: deque[Future[tuple[TensorSlice, bool]]] = deque()
        for number, tensor_slice in enumerate(slices):
            alone = _is_large(tensor_slice) or (number and _is_large(slices[number - 1]))
            while len(running) >= (1 if alone else 2 * _WORKERS):
                yield running.popleft().result()
            running.append(pool.submit(convert, tensor_slice))
        while running:
            yield running.popleft().result()
    finally:
        # The first failure is told at once: what has not begun is not begun.
        pool.shutdown(cancel_futures=True)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file with its times. Raises: ClvrError if it cannot be read, OSError if it cannot be written."""
    with reading(source):
        source.open("rb").close()
    shutil.copy2(source, target)


def _is_large(tensor_slice: TensorSlice) -> bool:
    """Too large to have two of them."""
    return tensor_slice.spec.nbytes > _LARGE_BYTES


class Buffers:
    """Memory that is used again and again: fresh pages would cost more than what is done in them."""

    def __init__(self) -> None:
        self._blocks: dict[str, np.ndarray] = {}

    def __call__(self, block: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array to be filled; it holds until its name is used again."""
        nbytes = math.prod(shape) * dtype.itemsize
        if block not in self._blocks or self._blocks[block].size < nbytes:
            self._blocks.pop(block, None)
            self._blocks[block] = empty((nbytes,), np.dtype(np.uint8))
        return self._blocks[block][:nbytes].view(dtype).reshape(shape)


def writer(
    component: PipelineComponent, folder: Path, to: Format
) -> tuple[Callable[[TensorSlice, np.ndarray], None], Callable[[], None]]:
    """Begins the files of a model in `folder`, or goes on with them.

    Returns: what takes a tensor_slice, in the destination's layout; and what says that it was all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if to == "torch":
        places = preallocate_files(
            folder, [tensor_slice.spec for tensor_slice in component.slices], component.architecture.file_name
        )
        return lambda tensor_slice, values: write_tensor(places[tensor_slice.spec.key], values), lambda: None
    leaves = {
        tensor_slice.entry.path: (tensor_slice.entry.shape, tensor_slice.spec.dtype)
        for tensor_slice in component.slices
    }
    stacked = {tensor_slice.entry.path for tensor_slice in component.slices if tensor_slice.entry.stacked}
    tree = TreeWriter(folder / PARAMS, leaves, stacked)
    return lambda tensor_slice, values: tree.write(tensor_slice.entry.path, tensor_slice.layer, values), tree.finish


def shape_in(tensor_slice: TensorSlice, layout: Format) -> tuple[int, ...]:
    """Shape of a tensor_slice in the layout of a format."""
    if layout == "torch":
        return tensor_slice.spec.shape
    return tensor_slice.entry.shape if tensor_slice.layer is None else tensor_slice.entry.shape[1:]


def _seen_as(source: Format, values: np.ndarray, tensor_slice: TensorSlice, to: Format) -> np.ndarray:
    """A view of the destination's layout in that of the source."""
    transform = tensor_slice.entry.transform
    return values if source == to else transform.to_torch(values) if to == "jax" else transform.from_torch(values)


def _copy(values: np.ndarray, target: np.ndarray, buffers: Buffers) -> None:
    """Copies, casting if the types differ."""
    if values.dtype == target.dtype:
        # As integers: a bfloat16 is of a type that NumPy does not know, and copied one by one.
        values, target = bits(values), bits(target)
    if values.ndim != 2 or target.flags.c_contiguous:
        np.copyto(target, values, casting="unsafe")
        return
    # A matrix is turned over some rows at a time, by way of a copy of them in large pages whose rows are an odd number
    # of cache lines apart: columns then meet neither the same lines nor many pages. Four to six times as fast as in one
    # go.
    rows, columns = _TILE
    width = min(columns, values.shape[1]) * values.dtype.itemsize
    distance = (width // _LINE + 1 | 1) * _LINE // values.dtype.itemsize
    spaced = buffers("spaced", (min(rows, len(values)), distance), values.dtype)
    for row in range(0, values.shape[0], rows):
        for column in range(0, values.shape[1], columns):
            tile = np.s_[row : row + rows, column : column + columns]
            part = spaced[: len(values[tile]), : values[tile].shape[1]]
            part[...] = values[tile]
            np.copyto(target[tile], part, casting="unsafe")


def _has_nan(values: np.ndarray) -> bool:
    if values.dtype.kind in "iub":
        return False
    flat = values.reshape(-1)
    step = 1 << 18  # stays in the cache
    if values.dtype == FLOATS["bfloat16"]:
        bits = flat.view(np.uint16)
        return any(int((bits[i : i + step] & 0x7FFF).max()) > 0x7F80 for i in range(0, bits.size, step))
    return any(bool(np.isnan(flat[i : i + step]).any()) for i in range(0, flat.size, step))


def _identity(conversion: Conversion) -> str:
    """What must be the same for a killed run to go on: what is written, and the content of the source."""
    specs = [(c.name, p.spec.key, p.spec.shape, p.spec.dtype.name) for c in conversion.components for p in c.slices]
    files = {conversion.source / path for path in conversion.copied}
    files |= {file for component in conversion.components for file in component.files}
    source = str(conversion.source.absolute())
    return json.dumps([source, conversion.to, conversion.variant, specs, states(files)])
