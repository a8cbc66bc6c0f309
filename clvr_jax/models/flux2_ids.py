"""Where each FLUX.2 token stands: (T, H, W, L) ids and the rotary tables made from them.

Everything here is NumPy on the host. Ids depend on shapes only, so under `jax.jit` they are constants, and the angles
can be taken in float64: in float32 the tables would be wrong in the sixth digit, which parity with PyTorch notices.
"""

from collections.abc import Sequence

import jax
import numpy as np
from numpy.typing import NDArray

from clvr_jax.errors import ClvrError

REFERENCE_STRIDE = 10
"""Distance on the T axis between two reference images, and between the first one and the picture being drawn."""

IdArray = NDArray[np.int32]


def _grid(t: int, height: int, width: int, length: int) -> IdArray:
    """(height * width * length, 4) ids of one block of tokens at time `t`, the last axis running fastest."""
    h, w, place = np.meshgrid(np.arange(height), np.arange(width), np.arange(length), indexing="ij")
    return np.stack([np.full(h.size, t), h.ravel(), w.ravel(), place.ravel()], axis=-1).astype(np.int32)


def text_ids(length: int) -> IdArray:
    """(length, 4) ids (0, 0, 0, l) of text tokens. Source: Flux2KleinPipeline (diffusers)."""
    return _grid(0, 1, 1, length)


def latent_ids(height: int, width: int) -> IdArray:
    """(height * width, 4) ids (0, h, w, 0) of the picture being drawn, row by row. Sizes count latent tokens."""
    return _grid(0, height, width, 1)


def reference_ids(sizes: Sequence[tuple[int, int]]) -> IdArray:
    """Ids of reference images in order: reference i has T = 10 + 10 i and a grid of its own.

    Args:
      sizes: (height, width) of each reference in latent tokens; may be empty.
    Returns: (sum of height * width, 4) int32.
    Source: Flux2KleinPipeline (diffusers), scale 10.
    """
    blocks = [_grid(REFERENCE_STRIDE * (1 + i), height, width, 1) for i, (height, width) in enumerate(sizes)]
    return np.concatenate(blocks) if blocks else np.zeros((0, 4), np.int32)


def host_ids(ids: np.ndarray | jax.Array, axes: int, name: str) -> NDArray[np.int64]:
    """Checks ids and returns them as (tokens, axes) on the host.

    Args:
      ids: (tokens, axes), or (batch, tokens, axes) with every row of the batch equal, as diffusers passes them.
      axes: number of id axes the model was made for.
      name: how the error message calls them.
    Raises: ClvrError for traced ids, another shape, or ids that differ within the batch.
    """
    if isinstance(ids, jax.core.Tracer):
        raise ClvrError(f"{name} must be a NumPy array known when the model is traced; close over it in jax.jit")
    array = np.asarray(ids)
    if array.ndim not in (2, 3) or array.shape[-1] != axes:
        raise ClvrError(f"{name} has shape {array.shape}; expected (tokens, {axes}) or (batch, tokens, {axes})")
    if array.ndim == 3:
        if not (array == array[:1]).all():
            raise ClvrError(f"{name} differs within the batch; one set of ids serves all rows")
        array = array[0]
    return array.astype(np.int64)


def rotary_tables(
    ids: np.ndarray, axes_dims: Sequence[int], theta: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of the rotation of each pair of head channels.

    Args:
      ids: (tokens, axes) integer positions.
      axes_dims: head channels given to each axis; they sum to head_dim.
      theta: base of the frequencies theta ** (-2 i / dim).
    Returns: cos, sin, each (tokens, head_dim / 2) float32, computed in float64.
    """
    angles = [
        np.outer(ids[:, axis].astype(np.float64), 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim))
        for axis, dim in enumerate(axes_dims)
    ]
    angles_sf = np.concatenate(angles, axis=-1)
    return np.cos(angles_sf).astype(np.float32), np.sin(angles_sf).astype(np.float32)
