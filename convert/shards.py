"""Reading of parameters from safetensors, transposed, cast or quantized for a device, block by block.

A few threads read blocks of rows into small buffers, and write them from there into the array of the parameter: no
second copy of a parameter is made. The array is aligned to pages, so that JAX uses it on a CPU without a copy.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from clvr_jax.checkpoint_io.blocks import Buffers, copy_block
from clvr_jax.checkpoint_io.disk import empty
from clvr_jax.checkpoint_io.tensors import FLOATS, StoredTensor
from clvr_jax.convert.lora.trees import Adapter, delta_slice
from clvr_jax.convert.rules import AS_IS, LINEAR, Entry
from clvr_jax.errors import ClvrError
from clvr_jax.models.common.adapters import KernelAdapter
from clvr_jax.models.common.quantization import INT8_MAX

_BLOCK_BYTES = 16 * 2**20
_WORKERS = 3
_MEMORY = threading.local()

Index = tuple[slice, ...]
Adapters = Sequence[tuple[Adapter, float]]
"""The adapters of one parameter, with their weights."""


class _Block(NamedTuple):
    """Rows of one stored matrix, and the part of the parameter that they fill.

    layer: index in the stack, None without one. rows, columns: of the stored tensor. target: view of the parameter in
    the stored tensor's axis order. scale: (rows,) view of the scales to compute, None if the values are not quantized.
    """

    stored: StoredTensor
    layer: int | None
    rows: slice
    columns: slice
    target: np.ndarray
    scale: np.ndarray | None


def read_part(
    entry: Entry, stored: Mapping[str, StoredTensor], index: Index, target: np.dtype, adapters: Adapters = ()
) -> np.ndarray:
    """Reads one device's shard of a parameter; only the rows of the stored matrix that the shard needs are read.

    Args:
      entry: the parameter.
      stored: key -> location of its tensors.
      index: of the parameter, one slice per leading axis.
      target: dtype of the result.
      adapters: LoRAs with their weights, which are added in float32.
    Returns: the shard, in an array of its own.
    Raises: ClvrError if a file cannot be read.
    """
    values = empty(_shape(entry.shape, index), target)
    if len(entry.torch_shape) > 2 or entry.transform not in (AS_IS, LINEAR):
        _read_whole(entry, stored, index, values, adapters)
    else:
        _run(entry, _blocks(entry, stored, index, values, None, adapters), adapters)
    return values


def read_quantized(
    entry: Entry, stored: Mapping[str, StoredTensor], index: Index, adapters: Adapters = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Reads one device's shard of a parameter and quantizes it to int8.

    Args: those of `read_part`. The entry is a matrix or embeddings, stored with its output channels (tokens) as rows.
    Returns: the shard, and the float32 scales of its output channels (tokens).
    """
    values = empty(_shape(entry.shape, index), np.dtype(np.int8))
    shape = tuple(size for axis, size in enumerate(values.shape) if axis != scaled_axis(entry))
    scales = empty(shape, np.dtype(np.float32))
    _run(entry, _blocks(entry, stored, index, values, scales, adapters), adapters)
    return values, scales


def scaled_axis(entry: Entry) -> int:
    """Returns the axis of a parameter that shares a scale: the input of a kernel, the features of embeddings."""
    return len(entry.shape) - (1 if entry.transform is AS_IS else 2)


def scale_index(entry: Entry, index: Index) -> Index:
    """Returns the part of the scales that a part of a parameter needs."""
    whole = (*index, *[slice(None)] * (len(entry.shape) - len(index)))
    return tuple(part for axis, part in enumerate(whole) if axis != scaled_axis(entry))


def _shape(shape: tuple[int, ...], index: Index) -> tuple[int, ...]:
    parts = (*index, *[slice(None)] * (len(shape) - len(index)))
    return tuple(len(range(size)[part]) for size, part in zip(shape, parts, strict=True))


def _blocks(
    entry: Entry,
    stored: Mapping[str, StoredTensor],
    index: Index,
    values: np.ndarray,
    scales: np.ndarray | None,
    adapters: Adapters,
) -> Iterator[_Block]:
    """Yields the blocks of a parameter whose tensors are vectors or matrices."""
    # The delta of a KernelAdapter is computed for a complete matrix, so it should be computed once.
    is_split = not any(isinstance(adapter, KernelAdapter) for adapter, _ in adapters)
    whole = (*index, *[slice(None)] * (len(entry.shape) - len(index)))
    layers, own = (range(len(entry.keys))[whole[0]], whole[1:]) if entry.stacked else (range(1), whole)
    for number, layer in enumerate(layers):
        tensor = stored[entry.keys[layer]]
        part = values[number] if entry.stacked else values
        scale = scales if scales is None or not entry.stacked else scales[number]
        target = entry.transform.to_torch(part)
        # A permutation of axes is one of slices as well.
        order = entry.transform.torch_shape(tuple(range(len(own))))
        rows, *rest = [own[axis] for axis in order] or [slice(None)]
        shape = tensor.shape or (1,)
        chosen = range(shape[0])[rows]
        columns = rest[0] if rest else slice(None)
        step = max(1, _BLOCK_BYTES // max(tensor.nbytes // max(shape[0], 1), 1) if is_split else len(chosen))
        for begin in range(0, len(chosen), step):
            some = chosen[begin : begin + step]
            yield _Block(
                tensor,
                layer if entry.stacked else None,
                slice(some.start, some.stop),
                columns,
                target.reshape(1)[begin:] if target.ndim == 0 else target[begin : begin + len(some)],
                None if scale is None else scale[begin : begin + len(some)],
            )


def _run(entry: Entry, blocks: Iterator[_Block], adapters: Adapters) -> None:
    work = list(blocks)
    if sum(block.target.nbytes for block in work) < _BLOCK_BYTES // 8:  # not worth a thread
        for block in work:
            _fill(entry, block, adapters)
        return
    with ThreadPoolExecutor(_WORKERS) as pool:
        for _ in pool.map(lambda block: _fill(entry, block, adapters), work):
            pass


def _fill(entry: Entry, block: _Block, adapters: Adapters) -> None:
    buffers = _MEMORY.__dict__.setdefault("buffers", Buffers())
    tensor, target = block.stored, block.target
    shape = tensor.shape or (1,)
    count = block.rows.stop - block.rows.start
    offset = tensor.offset + block.rows.start * (tensor.nbytes // shape[0])
    is_plain = tensor.dtype == target.dtype and target.flags.c_contiguous and not adapters and block.scale is None
    if is_plain and target.shape == (count, *shape[1:]):
        return _read_bytes(tensor, offset, target)
    values = buffers("source", (count, *shape[1:]), tensor.dtype)
    _read_bytes(tensor, offset, values)
    is_widened = target.dtype == FLOATS["float32"] and values.dtype == FLOATS["bfloat16"]
    if block.scale is None and not adapters and not is_widened:
        return copy_block(values[:, block.columns] if values.ndim > 1 else values, target, buffers)
    wide = buffers("wide", values.shape, np.dtype(np.float32))
    _widen(values, wide)
    if adapters:
        # All columns of the stored rows, because the scale of a row depends on all of them.
        rows = (slice(None), block.rows) if entry.transform is LINEAR else (block.rows,)
        delta = delta_slice(adapters, block.layer, rows, partial(_kernel, entry, tensor))
        wide += delta.T if entry.transform is LINEAR else delta
    if block.scale is None:
        return copy_block(wide[:, block.columns] if wide.ndim > 1 else wide, target, buffers)
    magnitude = np.maximum(wide.max(axis=1), -wide.min(axis=1))
    block.scale[...] = magnitude / np.float32(INT8_MAX)
    wide /= np.where(block.scale == 0, np.float32(1), block.scale)[:, None]
    np.rint(wide, out=wide)
    rounded = buffers("rounded", wide.shape, np.dtype(np.int8))
    np.copyto(rounded, wide, casting="unsafe")
    copy_block(rounded[:, block.columns], target, buffers)


def _kernel(entry: Entry, tensor: StoredTensor) -> np.ndarray:
    """Returns the complete kernel of one layer in float32."""
    return entry.transform.from_torch(tensor.open()).astype(np.float32)


def _widen(values: np.ndarray, wide: np.ndarray) -> None:
    """Casts to float32; bfloat16 by a shift, several times as fast as element by element."""
    if values.dtype == FLOATS["bfloat16"]:
        np.left_shift(values.view(np.uint16), np.uint32(16), out=wide.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(wide, values, casting="unsafe")


def _read_bytes(tensor: StoredTensor, offset: int, target: np.ndarray) -> None:
    """Reads bytes of a file into a contiguous array."""
    view = target.reshape(-1).view(np.uint8).data
    if not view.nbytes:
        return
    try:
        descriptor = os.open(tensor.file, os.O_RDONLY)
        try:
            done = 0
            while done < view.nbytes:
                read = os.preadv(descriptor, [view[done:]], offset + done)
                if not read:
                    raise ClvrError(f"{tensor.file}: {tensor.key} ends too early; fetch or convert it again")
                done += read
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ClvrError(f"{tensor.file}: {tensor.key}: cannot be read ({error})") from error


def _read_whole(
    entry: Entry, stored: Mapping[str, StoredTensor], index: Index, values: np.ndarray, adapters: Adapters
) -> None:
    """Reads a parameter of more axes than a matrix, such as the kernel of a convolution."""
    layers, own = (range(len(entry.keys))[index[0]], index[1:]) if entry.stacked and index else ((0,), index)
    if entry.stacked and not index:
        layers = range(len(entry.keys))
    for number, layer in enumerate(layers):
        part = entry.transform.from_torch(stored[entry.keys[layer]].open())[own]
        if adapters:
            kernel = partial(_kernel, entry, stored[entry.keys[layer]])
            part = part.astype(np.float32) + delta_slice(adapters, layer if entry.stacked else None, own, kernel)
        np.copyto(values[number] if entry.stacked else values, part, casting="unsafe")
