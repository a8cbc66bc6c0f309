"""Reusable buffers, and copies that transpose matrices at the speed of plain copies."""

import math

import numpy as np

from clvr_jax.checkpoint_io.disk import empty
from clvr_jax.checkpoint_io.tensors import bits

_TILE, _LINE = (512, 8192), 64


class Buffers:
    """Named buffers for reuse: fresh pages from the system would cost more than the computation in them."""

    def __init__(self) -> None:
        self._blocks: dict[str, np.ndarray] = {}

    def __call__(self, block: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Returns an uninitialized array; it is valid until its name is requested again."""
        nbytes = math.prod(shape) * dtype.itemsize
        if block not in self._blocks or self._blocks[block].size < nbytes:
            self._blocks.pop(block, None)
            self._blocks[block] = empty((nbytes,), np.dtype(np.uint8))
        return self._blocks[block][:nbytes].view(dtype).reshape(shape)


def copy_block(values: np.ndarray, target: np.ndarray, buffers: Buffers) -> None:
    """Copies `values` to `target` of the same shape, which may be transposed, and casts if the dtypes differ.

    buffers: of this thread; "spaced" is used.
    """
    if values.dtype == target.dtype:
        # As integers: bfloat16 is no native NumPy type, and would be copied element by element.
        values, target = bits(values), bits(target)
    if values.ndim != 2 or target.flags.c_contiguous:
        np.copyto(target, values, casting="unsafe")
        return
    # A matrix is transposed in tiles, through a copy of the tile in large pages with an odd number of cache lines per
    # row: then a column maps neither to one set of cache lines nor to many pages. Four to six times as fast as without
    # tiles.
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
