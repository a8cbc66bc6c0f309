"""Position ids (T, H, W, L) of FLUX.2 tokens, and their rotary tables.

Everything is NumPy on the host. Ids depend only on shapes, so they are constants under `jax.jit`, and the angles are
computed in float64: in float32 the tables would be wrong in the sixth digit, which parity with PyTorch detects.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float32, Int, Int32, Int64
from numpy.typing import NDArray

from clvr_jax.errors import ClvrError

REFERENCE_STRIDE = 10
"""Distance on the T axis between two reference images, and between the first one and the generated image."""

IdArray = NDArray[np.int32]


def _grid(t: int, height: int, width: int, length: int) -> IdArray:
    """Returns the ids of a grid of tokens at time `t`, (height * width * length, 4), in C order."""
    h, w, index = np.meshgrid(np.arange(height), np.arange(width), np.arange(length), indexing="ij")
    return np.stack([np.full(h.size, t), h.ravel(), w.ravel(), index.ravel()], axis=-1).astype(np.int32)


def text_ids(length: int) -> Int32[np.ndarray, "t 4"]:
    """Returns the ids (0, 0, 0, l) of text tokens, (length, 4). Source: Flux2KleinPipeline (diffusers)."""
    return _grid(0, 1, 1, length)


def latent_ids(height: int, width: int) -> Int32[np.ndarray, "t 4"]:
    """Returns the ids (0, h, w, 0) of a generated image, (height * width, 4), by rows; sizes are in latent tokens."""
    return _grid(0, height, width, 1)


def reference_ids(sizes: Sequence[tuple[int, int]], first: int = 0) -> Int32[np.ndarray, "t 4"]:
    """Returns the ids of reference images: reference i has T = 10 + 10 i and its own grid.

    They do not depend on the references that follow, so what was computed for the first ones stays valid.

    Args:
      sizes: (height, width) of each reference in latent tokens; may be empty.
      first: number of references before these.
    Returns: (sum of height * width, 4) int32.
    Source: Flux2KleinPipeline (diffusers), scale 10.
    """
    blocks = [_grid(REFERENCE_STRIDE * (1 + i), height, width, 1) for i, (height, width) in enumerate(sizes, first)]
    return np.concatenate(blocks) if blocks else np.zeros((0, 4), np.int32)


def host_ids(
    ids: Int[np.ndarray | Array, "t axes"] | Int[np.ndarray | Array, "b t axes"], axes: int, name: str
) -> Int64[np.ndarray, "t axes"]:
    """Checks ids and returns them as a NumPy array (tokens, axes).

    Args:
      ids: (tokens, axes), or (batch, tokens, axes) with equal rows of the batch, as in diffusers.
      axes: number of id axes of the model.
      name: of the argument, for error messages.
    Raises: ClvrError for traced ids, another shape, or ids that differ within the batch.
    """
    if isinstance(ids, jax.core.Tracer):
        raise ClvrError(
            f"{name} must be a NumPy array that is known at trace time; close over it in jax.jit instead of passing it"
        )
    array = np.asarray(ids)
    if array.ndim not in (2, 3) or array.shape[-1] != axes:
        raise ClvrError(f"{name} has shape {array.shape}; expected (tokens, {axes}) or (batch, tokens, {axes})")
    if array.ndim == 3:
        if not (array == array[:1]).all():
            raise ClvrError(f"{name} differs within the batch; pass the same ids for all rows")
        array = array[0]
    return array.astype(np.int64)


def rotary_tables(
    ids: Int[np.ndarray, "t axes"], axes_dims: Sequence[int], theta: float
) -> tuple[Float32[np.ndarray, "t f"], Float32[np.ndarray, "t f"]]:
    """Returns cosines and sines of the rotation of each pair of head channels.

    Args:
      ids: (tokens, axes) integer positions.
      axes_dims: number of head channels of each axis; the sum is head_dim.
      theta: base of the frequencies theta ** (-2 i / dim).
    Returns: cos, sin, each (tokens, head_dim / 2) float32, computed in float64.
    """
    angles = [
        np.outer(ids[:, axis].astype(np.float64), 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim))
        for axis, dim in enumerate(axes_dims)
    ]
    angles_sf = np.concatenate(angles, axis=-1)
    return np.cos(angles_sf).astype(np.float32), np.sin(angles_sf).astype(np.float32)
