"""The streaming conversion of directories and single files, PyTorch <-> JAX: a few tensors are in memory at a time.

A PyTorch directory is a diffusers pipeline, or one model of diffusers or transformers, with safetensors. Its JAX
counterpart is the same directory with `params/`, an Orbax checkpoint of the module's parameters, in place of the
safetensors. All other files (configurations, tokenizer, scheduler) are copied. Black Forest Labs' own single files of
FLUX.2 are read too, and become the directory of one model.

The new directory appears when it is complete, and an interrupted run can be resumed (journal.py).
"""

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from clvr_jax.checkpoint_io.blocks import Buffers, copy_block
from clvr_jax.checkpoint_io.journal import Journal, reading, resumable, states
from clvr_jax.checkpoint_io.orbax_tree import PARAMS, TreeWriter
from clvr_jax.checkpoint_io.tensors import FLOATS, preallocate_files, write_tensor
from clvr_jax.convert.model_card import add_model_card
from clvr_jax.convert.streaming.planning import Conversion, Format, PipelineComponent, TensorSlice
from clvr_jax.files.output_paths import check_destination

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
    """Executes a planned conversion.

    Args:
      conversion: from `planning.plan`.
      destination: the new directory; must not exist.
      card: README.md of the new directory, unless the source has one.
      resume: continue an interrupted run of the same conversion.
      on_tensor: called with "component/key" after each tensor, including those of an earlier run.
    Returns: the tensors ("component/key") that contain a NaN; they are written as they are.
    Raises: UsageError if the destination exists, or if there is an interrupted run and `resume` is not set; ClvrError
      if a file cannot be read or written. Then no file remains; a run that is killed leaves its temporary directory.
    """
    check_destination(destination, conversion.source)
    with resumable(destination, "conversion", _identity(conversion), conversion.nbytes, resume) as (directory, journal):
        not_finite = _write(conversion, directory, journal, on_tensor or (lambda name: None))
        for path in conversion.copied:
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            copy_file(conversion.source / path, directory / path)
        for name, text in conversion.written.items():
            (directory / name).write_text(text)
        if card:
            add_model_card(directory, card)
    return not_finite


def _write(conversion: Conversion, directory: Path, journal: Journal, on_tensor: Callable[[str], None]) -> list[str]:
    for component in conversion.components:
        write, finish = writer(component, directory / component.name, conversion.to)
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
    """Writes each slice and yields it with whether it contains a NaN, in order.

    A few threads each process one slice from the first byte to the last: while one waits for the disk, the others
    transpose.
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
                    copy_block(block, filled[rows] if filled.ndim else filled, buffers)
            has_nan = _has_nan(values)
            write(tensor_slice, values)
            return tensor_slice, has_nan
        finally:  # also after a failure: the other threads would wait for the buffers forever
            memory.put(Buffers() if _is_large(tensor_slice) else buffers)  # large buffers are freed

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
        # After the first failure no further slice is started.
        pool.shutdown(cancel_futures=True)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file with its times. Raises: ClvrError if it cannot be read, OSError if it cannot be written."""
    with reading(source):
        source.open("rb").close()
    shutil.copy2(source, target)


def _is_large(tensor_slice: TensorSlice) -> bool:
    """Returns whether a slice is so large that only one of its size is processed at a time."""
    return tensor_slice.spec.nbytes > _LARGE_BYTES


def writer(
    component: PipelineComponent, directory: Path, to: Format
) -> tuple[Callable[[TensorSlice, np.ndarray], None], Callable[[], None]]:
    """Creates the files of a model in `directory`, or opens them to resume.

    Returns: a function that writes one slice, in the axis order of the destination's format, and a function to call
      after the last slice.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if to == "torch":
        places = preallocate_files(
            directory, [tensor_slice.spec for tensor_slice in component.slices], component.architecture.file_name
        )
        return lambda tensor_slice, values: write_tensor(places[tensor_slice.spec.key], values), lambda: None
    leaves = {
        tensor_slice.entry.path: (tensor_slice.entry.shape, tensor_slice.spec.dtype)
        for tensor_slice in component.slices
    }
    stacked = {tensor_slice.entry.path for tensor_slice in component.slices if tensor_slice.entry.stacked}
    tree = TreeWriter(directory / PARAMS, leaves, stacked)
    return lambda tensor_slice, values: tree.write(tensor_slice.entry.path, tensor_slice.layer, values), tree.finish


def shape_in(tensor_slice: TensorSlice, form: Format) -> tuple[int, ...]:
    """Returns the shape of a slice in a format."""
    if form == "torch":
        return tensor_slice.spec.shape
    return tensor_slice.entry.shape if tensor_slice.layer is None else tensor_slice.entry.shape[1:]


def _seen_as(source: Format, values: np.ndarray, tensor_slice: TensorSlice, to: Format) -> np.ndarray:
    """Returns a view of an array in the destination's axis order that has the source's axis order."""
    transform = tensor_slice.entry.transform
    return values if source == to else transform.to_torch(values) if to == "jax" else transform.from_torch(values)


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
    """Returns what must be equal to resume an interrupted run: the tensors to write and the content of the source."""
    specs = [(c.name, p.spec.key, p.spec.shape, p.spec.dtype.name) for c in conversion.components for p in c.slices]
    files = {conversion.source / path for path in conversion.copied}
    files |= {file for component in conversion.components for file in component.files}
    source = str(conversion.source.absolute())
    return json.dumps([source, conversion.to, conversion.variant, specs, states(files)])
