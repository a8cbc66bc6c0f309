"""Positions of patches and tokens of Qwen3-VL conversations, computed with NumPy on the host.

Static image grids make the positions of patches constants of the program; `image_buckets` computes them from traced
grids. The positions of tokens depend on the token ids and are an input of the model.

Patches are in merge-block order: the merge x merge patches of one token are adjacent in the sequence.

Source: `Qwen3VLModel.get_rope_index` and `vision_utils` (transformers).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, Int32, Shaped

from clvr_jax.errors import ClvrError
from clvr_jax.models.qwen3.layers import inverse_frequencies

Grids = tuple[tuple[int, int, int], ...]
"""The (frames, rows, columns) of patches of each image, in the order of the images."""


def as_grids(grid_thw: Sequence[Sequence[int]] | Int[np.ndarray, "n 3"]) -> Grids:
    """Returns an (images, 3) table of integers as a hashable value, for static arguments of jit."""
    return tuple((int(t), int(h), int(w)) for t, h, w in grid_thw)


def merged_tokens(grid_thw: Grids, merge: int) -> tuple[int, ...]:
    """Returns the number of tokens of each image in the prompt: one for each merge x merge patches."""
    return tuple(t * (h // merge) * (w // merge) for t, h, w in grid_thw)


def patch_rows_columns(grid_thw: Grids, merge: int) -> Int32[np.ndarray, "n 2"]:
    """Returns row and column of every patch in its image.

    Returns: (patches, 2) int32 of the concatenated images, each in merge-block order, repeated for its frames.
    Raises: ClvrError if a side is not a multiple of `merge`.
    """
    tables = []
    for frames, rows, columns in grid_thw:
        if rows % merge or columns % merge:
            raise ClvrError(f"Qwen3-VL: image grid {rows} x {columns} patches: both must be multiples of {merge}")
        row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
        blocks = (rows // merge, merge, columns // merge, merge)
        merge_ordered = [axis.reshape(blocks).transpose(0, 2, 1, 3).reshape(-1) for axis in (row, column)]
        tables.append(np.tile(np.stack(merge_ordered, axis=-1), (frames, 1)))
    return np.concatenate(tables).astype(np.int32)


def interpolation_taps(
    grid_thw: Grids, side: int, merge: int
) -> tuple[Int32[np.ndarray, "n 4"], Float32[np.ndarray, "n 4"]]:
    """Computes the bilinear interpolation of the learned side x side position table to each image, corners aligned.

    Returns: indices into the flattened table (patches, 4) int32, and their weights (patches, 4) float32.
    """
    positions = patch_rows_columns(grid_thw, merge)
    sizes = np.concatenate([np.tile([[h, w]], (t * h * w, 1)) for t, h, w in grid_thw])
    # In float32 and in the order of the reference: a difference in the last bit could change the floor.
    source = positions.astype(np.float32) * np.float32(side - 1) / np.maximum(sizes - 1, 1).astype(np.float32)
    low = np.floor(source)
    weight_high = source - low
    taps = np.stack([low, low + 1], axis=-1).clip(0, side - 1).astype(np.int32)  # (patches, axis, 2)
    weights = np.stack([1 - weight_high, weight_high], axis=-1)
    indices = taps[:, 0, :, None] * side + taps[:, 1, None, :]
    products = weights[:, 0, :, None] * weights[:, 1, None, :]
    return indices.reshape(-1, 4), products.reshape(-1, 4).astype(np.float32)


def vision_rotary(
    grid_thw: Grids, merge: int, head_dim: int, theta: float
) -> tuple[Float32[np.ndarray, "n h"], Float32[np.ndarray, "n h"]]:
    """Returns the axial 2-D rotary table: a quarter of the channels for the row, the next for the column, repeated.

    Returns: cos and sin, each (patches, head_dim) float32; both halves are equal, for rotation of halves.
    """
    spatial = head_dim // 2
    frequencies = inverse_frequencies(spatial, theta)
    angles = patch_rows_columns(grid_thw, merge).astype(np.float32)[:, :, None] * frequencies
    half = angles.reshape(angles.shape[0], spatial)
    angles = np.concatenate([half, half], axis=-1)
    return np.cos(angles), np.sin(angles)


def mrope_axes(head_dim: int, mrope_section: Sequence[int]) -> Int32[np.ndarray, " f"]:
    """Returns the axis of each of the head_dim / 2 frequencies: 0 time, 1 row, 2 column, interleaved.

    Rows have indices 1, 4, 7, ... and columns 2, 5, 8, ..., as many as their sections; time has all others.
    """
    axes = np.zeros(head_dim // 2, dtype=np.int32)
    for axis in (1, 2):
        axes[axis : 3 * mrope_section[axis] : 3] = axis
    return axes


def mrope_positions(
    input_ids_bt: Int[np.ndarray, "b t"],
    grids: Sequence[Grids],
    *,
    image_token_id: int,
    merge: int,
    attention_mask_bt: Shaped[np.ndarray, "b t"] | None = None,
) -> tuple[Int32[np.ndarray, "3 b t"], Int32[np.ndarray, " b"]]:
    """Returns the positions of tokens: text advances on all three axes, an image on rows and columns.

    Args:
      input_ids_bt: (batch, tokens) with `image_token_id` at image tokens.
      grids: for each conversation, the grids of its images in order.
      image_token_id: id of the image placeholder.
      merge: patches per token along one side.
      attention_mask_bt: (batch, tokens), nonzero at real tokens; padding may be on either side. None without padding.
    Returns: positions_3bt (3, batch, tokens) int32, 0 at padding, and rope_delta_b (batch,) int32: the position of a
      token after the prompt is its index among the real tokens plus rope_delta.
    Raises: ClvrError if the placeholders of a conversation do not match its images.
    """
    ids = np.asarray(input_ids_bt)
    real = np.ones(ids.shape, dtype=bool) if attention_mask_bt is None else np.asarray(attention_mask_bt).astype(bool)
    if len(grids) != ids.shape[0]:
        raise ClvrError(f"Qwen3-VL: {ids.shape[0]} conversations, but image grids of {len(grids)}")
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
            f"{sum(counts)} {list(counts)}: repeat every image placeholder for each of its tokens"
        )
    positions_3t = np.zeros((3, is_image.size), dtype=np.int32)
    position, token = 0, 0  # the next ones
    for (frames, rows, columns), count in zip(grids, counts, strict=True):
        text = int(np.argmax(is_image[token:]))
        if not is_image[token + text : token + text + count].all():
            raise ClvrError(f"Qwen3-VL: conversation {row}: the {count} tokens of an image are not contiguous")
        positions_3t[:, token : token + text] = position + np.arange(text)
        position, token = position + text, token + text
        offsets = np.indices((frames, rows // merge, columns // merge)).reshape(3, -1)
        positions_3t[:, token : token + count] = position + offsets
        position, token = position + max(rows, columns) // merge, token + count
    positions_3t[:, token:] = position + np.arange(is_image.size - token)
    return positions_3t


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A prompt: token ids, with a placeholder for each image token; the patches and grids of its images in order."""

    input_ids: Sequence[int]
    pixel_values: Float[np.ndarray, "n p"] | None = None
    grid_thw: Grids = ()

    def __post_init__(self) -> None:
        patches = 0 if self.pixel_values is None else self.pixel_values.shape[0]
        if patches != sum(t * h * w for t, h, w in self.grid_thw):
            raise ClvrError(f"Qwen3-VL: a conversation has {patches} patches, but image grids {self.grid_thw}")


def part_of(conversation: Conversation, begin: int, end: int, *, image_token_id: int, merge: int) -> Conversation:
    """Returns tokens begin..end - 1 of a conversation, with the patches of their images.

    Raises: ClvrError for no tokens, and for a part that begins or ends inside an image.
    """
    if not 0 <= begin < end <= len(conversation.input_ids):
        raise ClvrError(f"Qwen3-VL: a conversation of {len(conversation.input_ids)} tokens has no part {begin}:{end}")
    is_image = np.asarray(conversation.input_ids) == image_token_id
    ends = np.cumsum([0, *merged_tokens(conversation.grid_thw, merge)])
    first, last = (int(np.searchsorted(ends, is_image[:place].sum())) for place in (begin, end))
    if [ends[first], ends[last]] != [is_image[:begin].sum(), is_image[:end].sum()]:
        raise ClvrError(f"Qwen3-VL: the part {begin}:{end} of a conversation begins or ends inside an image")
    ids, grids = conversation.input_ids[begin:end], conversation.grid_thw[first:last]
    if conversation.pixel_values is None or not grids:
        return Conversation(ids)
    patches = np.cumsum([0, *(t * h * w for t, h, w in conversation.grid_thw)])
    return Conversation(ids, conversation.pixel_values[patches[first] : patches[last]], grids)


def batch_conversations(
    conversations: Sequence[Conversation],
    *,
    image_token_id: int,
    merge: int,
    length_multiple: int = 32,
    image_slots: int = 0,
    pad_token: int = 0,
) -> dict[str, Any]:
    """Returns the arguments of `Qwen3VL.prefill` and `Qwen3VL.__call__` for conversations of any lengths.

    To compile few programs, prompts are padded on the right to a multiple of `length_multiple`. If the grids of every
    conversation are the first ones of the conversation with the most images, all rows get the same number of images,
    with zeros for missing ones. Otherwise images are packed, and every combination of grids needs another program;
    `bucket_conversations` gives all sizes of images the same programs.

    Args:
      conversations: at least one.
      image_token_id: id of the image placeholder.
      merge: patches per token along one side.
      length_multiple: the padded length is a multiple of this.
      image_slots: minimum number of images of a row (of the last grid), so that a conversation can grow without
        another program. It has no effect without images, or if they are packed.
      pad_token: token id of padding.
    Returns: input_ids_bt int32, attention_mask_bt bool, positions_3bt int32, and, if there are images, pixel_values
      float32 ((b, patches, features) or packed (patches, features)) and the static grid_thw.
    Raises: ClvrError if placeholders and images do not match.
    """
    if not conversations:
        raise ClvrError("Qwen3-VL: no conversations given")
    longest = max(len(conversation.input_ids) for conversation in conversations)
    length = max(1, -(-longest // length_multiple)) * length_multiple
    batch = batch_tokens(conversations, length, image_token_id=image_token_id, merge=merge, pad_token=pad_token)
    return {**batch, **_batch_images(conversations, image_slots)}


def batch_tokens(
    conversations: Sequence[Conversation], length: int, *, image_token_id: int, merge: int, pad_token: int
) -> dict[str, Any]:
    """Returns input_ids_bt, attention_mask_bt and positions_3bt of `batch_conversations`, padded to `length` tokens."""
    shape = (len(conversations), length)
    ids, valid_mask = np.full(shape, pad_token, np.int32), np.zeros(shape, bool)
    for row, conversation in enumerate(conversations):
        ids[row, : len(conversation.input_ids)] = conversation.input_ids
        valid_mask[row, : len(conversation.input_ids)] = True
    positions_3bt, _ = mrope_positions(
        ids,
        [conversation.grid_thw for conversation in conversations],
        image_token_id=image_token_id,
        merge=merge,
        attention_mask_bt=valid_mask,
    )
    return {"input_ids_bt": ids, "attention_mask_bt": valid_mask, "positions_3bt": positions_3bt}


def _batch_images(conversations: Sequence[Conversation], image_slots: int) -> dict[str, Any]:
    grids = max((conversation.grid_thw for conversation in conversations), key=len)
    given = [c.pixel_values for c in conversations if c.pixel_values is not None and c.grid_thw]
    if not given:
        return {}
    if any(c.grid_thw != grids[: len(c.grid_thw)] for c in conversations):
        packed = tuple(grid for c in conversations for grid in c.grid_thw)
        return {"pixel_values": np.concatenate(given), "grid_thw": packed}
    grids += grids[-1:] * (image_slots - len(grids))
    patches = sum(t * h * w for t, h, w in grids)
    pixel_values = np.zeros((len(conversations), patches, given[0].shape[1]), np.float32)
    for row, conversation in enumerate(conversations):
        if conversation.pixel_values is not None:
            pixel_values[row, : conversation.pixel_values.shape[0]] = conversation.pixel_values
    return {"pixel_values": pixel_values, "grid_thw": grids}
