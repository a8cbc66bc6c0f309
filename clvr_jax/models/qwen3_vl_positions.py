"""Where every patch and every token of a Qwen3-VL conversation is: integer bookkeeping in NumPy, done on the host.

Image grids are static under jit, so what follows from them is computed once while tracing and enters the program as
constants; the positions of tokens follow from the token ids and are an input of the model.

Patches come in merge-block order: the merge x merge patches that become one token are neighbors in the sequence.
Source of the arithmetic: transformers `Qwen3VLModel.get_rope_index` and `vision_utils`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.models.qwen3_layers import inverse_frequencies

# One (frames, rows, columns) of patches for each image, in the order in which they appear.
Grids = tuple[tuple[int, int, int], ...]


def as_grids(grid_thw: Sequence[Sequence[int]] | np.ndarray) -> Grids:
    """Any (images, 3) table of integers -> the hashable form that jit takes as a static argument."""
    return tuple((int(t), int(h), int(w)) for t, h, w in grid_thw)


def merged_tokens(grid_thw: Grids, merge: int) -> tuple[int, ...]:
    """Tokens that each image takes in the prompt: one for each merge x merge patches."""
    return tuple(t * (h // merge) * (w // merge) for t, h, w in grid_thw)


def patch_rows_columns(grid_thw: Grids, merge: int) -> np.ndarray:
    """Row and column of every patch in its own image.

    Returns: (patches, 2) int32, all images one after another, each in merge-block order, repeated for its frames.
    Raises: ClvrError if a side is no multiple of `merge`.
    """
    tables = []
    for frames, rows, columns in grid_thw:
        if rows % merge or columns % merge:
            raise ClvrError(f"Qwen3-VL: image grid {rows} x {columns} patches: both must be multiples of {merge}")
        row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
        blocks = (rows // merge, merge, columns // merge, merge)
        in_blocks = [axis.reshape(blocks).transpose(0, 2, 1, 3).reshape(-1) for axis in (row, column)]
        tables.append(np.tile(np.stack(in_blocks, axis=-1), (frames, 1)))
    return np.concatenate(tables).astype(np.int32)


def interpolation_taps(grid_thw: Grids, side: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """How the learned side x side table of positions is stretched, corner to corner, over each image.

    Returns: indices into the flattened table (patches, 4) int32 and their bilinear weights (patches, 4) float32.
    """
    positions = patch_rows_columns(grid_thw, merge)
    sizes = np.concatenate([np.tile([[h, w]], (t * h * w, 1)) for t, h, w in grid_thw])
    # In float32 and in this order, as the reference: a last-bit difference would move a floor to the next tap.
    source = positions.astype(np.float32) * np.float32(side - 1) / np.maximum(sizes - 1, 1).astype(np.float32)
    low = np.floor(source)
    weight_high = source - low
    taps = np.stack([low, low + 1], axis=-1).clip(0, side - 1).astype(np.int32)  # (patches, axis, 2)
    weights = np.stack([1 - weight_high, weight_high], axis=-1)
    indices = taps[:, 0, :, None] * side + taps[:, 1, None, :]
    products = weights[:, 0, :, None] * weights[:, 1, None, :]
    return indices.reshape(-1, 4), products.reshape(-1, 4).astype(np.float32)


def vision_rotary(grid_thw: Grids, merge: int, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Axial 2-D rotary table: a quarter of the frequencies' pairs turns with the row, the next with the column.

    Returns: cos and sin, each (patches, head_dim) float32, halves equal (for rotation of halves).
    """
    spatial = head_dim // 2
    frequencies = inverse_frequencies(spatial, theta)
    angles = patch_rows_columns(grid_thw, merge).astype(np.float32)[:, :, None] * frequencies
    half = angles.reshape(angles.shape[0], spatial)
    angles = np.concatenate([half, half], axis=-1)
    return np.cos(angles), np.sin(angles)


def mrope_axes(head_dim: int, mrope_section: Sequence[int]) -> np.ndarray:
    """Which axis turns each of the head_dim / 2 frequencies: 0 time, 1 row, 2 column, interleaved.

    Rows take indices 1, 4, 7, ... and columns 2, 5, 8, ... as far as their sections reach; time takes what is left.
    """
    axes = np.zeros(head_dim // 2, dtype=np.int32)
    for axis in (1, 2):
        axes[axis : 3 * mrope_section[axis] : 3] = axis
    return axes


def mrope_positions(
    input_ids_bt: np.ndarray,
    grids: Sequence[Grids],
    *,
    image_token_id: int,
    merge: int,
    attention_mask_bt: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of every token: text advances all three axes; an image spreads over rows and columns at one time.

    Args:
      input_ids_bt: (batch, tokens) with `image_token_id` where image tokens go.
      grids: for each conversation, the grids of its images in order.
      image_token_id: id of the image placeholder.
      merge: patches per token along one side.
      attention_mask_bt: (batch, tokens), nonzero at real tokens; padding may be on either side. None: no padding.
    Returns: positions_3bt (3, batch, tokens) int32, 0 at padding, and rope_delta_b (batch,) int32: the position of a
      token after the prompt is its index among the real tokens plus rope_delta.
    Raises: ClvrError if the placeholders of a conversation are not those of its images.
    """
    ids = np.asarray(input_ids_bt)
    real = np.ones(ids.shape, dtype=bool) if attention_mask_bt is None else np.asarray(attention_mask_bt).astype(bool)
    if len(grids) != ids.shape[0]:
        raise ClvrError(f"Qwen3-VL: {ids.shape[0]} conversations but image grids of {len(grids)}")
    positions_3bt = np.zeros((3, *ids.shape), dtype=np.int32)
    deltas = np.zeros(ids.shape[0], dtype=np.int32)
    for row, own_grids in enumerate(grids):
        is_image = ids[row][real[row]] == image_token_id
        positions_3t = _conversation_positions(is_image, own_grids, merge, row)
        positions_3bt[:, row, real[row]] = positions_3t
        deltas[row] = positions_3t.max(initial=-1) + 1 - is_image.size
    return positions_3bt, deltas


def _conversation_positions(is_image: np.ndarray, grids: Grids, merge: int, row: int) -> np.ndarray:
    counts = merged_tokens(grids, merge)
    if int(is_image.sum()) != sum(counts):
        raise ClvrError(
            f"Qwen3-VL: conversation {row} has {int(is_image.sum())} image tokens, its {len(grids)} images need "
            f"{sum(counts)} {list(counts)}: expand every image placeholder to the number of its tokens"
        )
    positions_3t = np.zeros((3, is_image.size), dtype=np.int32)
    start, here = 0, 0  # next position, next token
    for (frames, rows, columns), count in zip(grids, counts, strict=True):
        text = int(np.argmax(is_image[here:]))
        if not is_image[here + text : here + text + count].all():
            raise ClvrError(f"Qwen3-VL: conversation {row}: an image's {count} tokens do not stand together")
        positions_3t[:, here : here + text] = start + np.arange(text)
        start, here = start + text, here + text
        spread = np.indices((frames, rows // merge, columns // merge)).reshape(3, -1)
        positions_3t[:, here : here + count] = start + spread
        start, here = start + max(rows, columns) // merge, here + count
    positions_3t[:, here:] = start + np.arange(is_image.size - here)
    return positions_3t


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One prompt: token ids with expanded image placeholders, and the patches and grids of its images in order."""

    input_ids: Sequence[int]
    pixel_values: np.ndarray | None = None
    grid_thw: Grids = ()

    def __post_init__(self) -> None:
        patches = 0 if self.pixel_values is None else self.pixel_values.shape[0]
        if patches != sum(t * h * w for t, h, w in self.grid_thw):
            raise ClvrError(f"Qwen3-VL: a conversation has {patches} patches but image grids {self.grid_thw}")


def batch_conversations(
    conversations: Sequence[Conversation],
    *,
    image_token_id: int,
    merge: int,
    length_multiple: int = 32,
    image_slots: int = 0,
    pad_token: int = 0,
) -> dict[str, Any]:
    """Conversations of any lengths -> the arguments of `Qwen3VL.prefill` and `Qwen3VL.__call__`.

    Few shapes mean few compilations: prompts are padded on the right to a multiple of `length_multiple`, and if the
    images of every conversation begin as those of the one with most, each row gets equally many (zeros where it has
    none). Otherwise images are packed one after another, and every combination of grids is a program of its own.

    Args:
      conversations: at least one.
      image_token_id: id of the image placeholder.
      merge: patches per token along one side.
      length_multiple: of the padded prompts.
      image_slots: room for at least this many images in a row (of the last grid), so that a conversation can grow
        without a new program. No effect without images or when they are packed.
      pad_token: id written into padding.
    Returns: input_ids_bt int32, attention_mask_bt bool, positions_3bt int32, and, if there are images, pixel_values
      float32 ((b, patches, features) or packed (patches, features)) and the static grid_thw.
    Raises: ClvrError if placeholders and images do not match.
    """
    if not conversations:
        raise ClvrError("Qwen3-VL: no conversations given")
    longest = max(len(conversation.input_ids) for conversation in conversations)
    shape = (len(conversations), max(1, -(-longest // length_multiple)) * length_multiple)
    ids, real = np.full(shape, pad_token, np.int32), np.zeros(shape, bool)
    for row, conversation in enumerate(conversations):
        ids[row, : len(conversation.input_ids)] = conversation.input_ids
        real[row, : len(conversation.input_ids)] = True
    positions_3bt, _ = mrope_positions(
        ids,
        [conversation.grid_thw for conversation in conversations],
        image_token_id=image_token_id,
        merge=merge,
        attention_mask_bt=real,
    )
    batch = {"input_ids_bt": ids, "attention_mask_bt": real, "positions_3bt": positions_3bt}
    return {**batch, **_batch_images(conversations, image_slots)}


def _batch_images(conversations: Sequence[Conversation], image_slots: int) -> dict[str, Any]:
    most = max((conversation.grid_thw for conversation in conversations), key=len)
    given = [c.pixel_values for c in conversations if c.pixel_values is not None and c.grid_thw]
    if not given:
        return {}
    if any(c.grid_thw != most[: len(c.grid_thw)] for c in conversations):
        packed = tuple(grid for c in conversations for grid in c.grid_thw)
        return {"pixel_values": np.concatenate(given), "grid_thw": packed}
    most += most[-1:] * (image_slots - len(most))
    patches = sum(t * h * w for t, h, w in most)
    pixel_values = np.zeros((len(conversations), patches, given[0].shape[1]), np.float32)
    for row, conversation in enumerate(conversations):
        if conversation.pixel_values is not None:
            pixel_values[row, : conversation.pixel_values.shape[0]] = conversation.pixel_values
    return {"pixel_values": pixel_values, "grid_thw": most}
