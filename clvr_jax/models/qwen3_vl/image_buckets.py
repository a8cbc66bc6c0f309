"""Images of any size in arrays of few shapes, so that a new image size needs no new program.

Each image has a row of its own, padded to a bucket of patches, beside images of similar size; its grid is an input of
the program. The positions
of patches are those of `positions`, which are constants of the program for static grids.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from clvr_jax.errors import ClvrError
from clvr_jax.models.qwen3.layers import inverse_frequencies
from clvr_jax.models.qwen3_vl.positions import (
    Conversation,
    Grids,
    batch_tokens,
    merged_tokens,
    mrope_positions,
    part_of,
)

Grid = tuple[int, int, int]

TOKENS = 32
"""Padded lengths of prompts are multiples of it."""


class BucketedImages(NamedTuple):
    """The images of a batch in classes of similar size.

    pixel_values, grid_thw: for each class, (images, patches, features) float32 with padding behind the patches of each
    image, and (images, 3) int32. ends_i: number of image tokens of the batch up to the end of each image, in the order
    of the images; offsets_i: what is added to the number of an image token for the index of its feature.
    """

    pixel_values: tuple[Float32[Array, "_ _ p"] | Float32[np.ndarray, "_ _ p"], ...]
    grid_thw: tuple[Int[Array, "_ 3"] | Int[np.ndarray, "_ 3"], ...]
    ends_i: Int[Array, " i"] | Int[np.ndarray, " i"]
    offsets_i: Int[Array, " i"] | Int[np.ndarray, " i"]


class PatchPositions(NamedTuple):
    """Positions of the patches of i images, each padded to p patches.

    cos, sin: rotary table, (i, p, head_dim) float32. taps, weights: indices into the learned positions and their
    weights, (i, p, 4). valid_mask: (i, p), whether a patch belongs to its image.
    """

    cos: Float32[Array, "i p h"]
    sin: Float32[Array, "i p h"]
    taps: Int32[Array, "i p 4"]
    weights: Float32[Array, "i p 4"]
    valid_mask: Bool[Array, "i p"]


def bucket_of(number: int, multiple: int) -> int:
    """Returns the smallest bucket that holds `number`: at most an eighth larger, or less than `multiple` larger.

    Buckets are the multiples of an eighth of a power of two up to the next power, and multiples of `multiple`.

    Args:
      number: at least 0.
      multiple: a power of two.
    """
    step = max(multiple, 1 << max(number.bit_length() - 4, 0))
    return max(-(-number // step), 1) * step


def bucket_conversations(
    conversations: Sequence[Conversation], *, image_token_id: int, merge: int, pad_token: int = 0, image_step: int = 2
) -> dict[str, Any]:
    """Returns the arguments of `Qwen3VL.prefill` for conversations with images of any sizes, all of them arrays.

    The length of the prompts, and the number and the patches of images of similar size, are padded to buckets.
    Conversations in the same buckets have the same program.

    Args: see `batch_conversations` and `bucket_images`.
    Returns: input_ids_bt int32, attention_mask_bt bool, positions_3bt int32, and, if there are images, pixel_values, a
      `BucketedImages`.
    Raises: ClvrError if placeholders and images do not match.
    """
    longest = max(len(conversation.input_ids) for conversation in conversations)
    tokens = bucket_of(longest, TOKENS)
    batch = batch_tokens(conversations, tokens, image_token_id=image_token_id, merge=merge, pad_token=pad_token)
    images = [image for conversation in conversations for image in _images_of(conversation)]
    if not images:
        return batch
    grids = [grid for conversation in conversations for grid in conversation.grid_thw]
    buckets = bucket_images(images, grids, merge=merge, conversations=len(conversations), image_step=image_step)
    return {**batch, "pixel_values": buckets}


def bucket_suffixes(
    conversations: Sequence[Conversation],
    starts: Sequence[int],
    *,
    image_token_id: int,
    merge: int,
    pad_token: int = 0,
) -> dict[str, Any]:
    """Returns the arguments of `Qwen3VL.prefill`, but `prefix`, for the tokens after a prefix of each conversation.

    Args:
      conversations, image_token_id, merge, pad_token: see `batch_conversations`.
      starts: number of tokens in the prefix of each conversation.
    Returns: as `bucket_conversations`; positions are those in the whole conversation.
    Raises: ClvrError if placeholders and images do not match, for a prefix that is the whole conversation, and for one
      that ends inside an image.
    """
    places: dict[str, int] = {"image_token_id": image_token_id, "merge": merge}
    # A round of the loop has one new image.
    image_step = 1 if any(starts) else 2
    suffixes = [
        part_of(whole, start, len(whole.input_ids), **places)
        for whole, start in zip(conversations, starts, strict=True)
    ]
    batch = bucket_conversations(suffixes, **places, pad_token=pad_token, image_step=image_step)
    for row, (whole, start) in enumerate(zip(conversations, starts, strict=True)):
        positions_31t, _ = mrope_positions(
            np.array([whole.input_ids]), [whole.grid_thw], image_token_id=image_token_id, merge=merge
        )
        batch["positions_3bt"][:, row, : len(whole.input_ids) - start] = positions_31t[:, 0, start:]
    return batch


def bucket_images(
    images: Sequence[Float[np.ndarray, "_ p"]],
    grids: Grids | Sequence[Grid],
    *,
    merge: int,
    conversations: int = 1,
    image_step: int = 2,
) -> BucketedImages:
    """Returns the images of a batch in few shapes.

    Args:
      images: the patches of each image, in the order of the images.
      grids: the grid of each image, with one frame.
      merge: patches per token along one side.
      conversations: of the batch. Each class has a multiple of `image_step` images for each of them on average.
      image_step: with 2, a conversation that grows by an image at a time needs half as many programs as with 1.
    Raises: ClvrError for an image with several frames.
    """
    if any(frames != 1 for frames, _, _ in grids):
        raise ClvrError(f"Qwen3-VL: image grids {tuple(grids)}: images with several frames have no buckets")
    classes = size_classes(grids, merge)
    pixel_values, class_grids, offsets = [], [], np.zeros(len(images), np.int32)
    counts = np.array(merged_tokens(tuple(grids), merge))
    begins, first = np.cumsum(counts) - counts, 0
    for patches, members in classes.items():
        number = image_slots(len(members), conversations, image_step)
        values = np.zeros((number, patches, images[0].shape[1]), np.float32)
        for slot, member in enumerate(members):
            values[slot, : len(images[member])] = images[member]
            offsets[member] = first + slot * patches // merge**2 - begins[member]
        unused = [(1, merge, merge)] * (number - len(members))
        class_grids.append(np.array([*(grids[member] for member in members), *unused], np.int32))
        pixel_values.append(values)
        first += number * patches // merge**2
    slots = sum(map(len, pixel_values)) - len(images)
    ends = np.pad((begins + counts).astype(np.int32), (0, slots), constant_values=np.iinfo(np.int32).max)
    return BucketedImages(tuple(pixel_values), tuple(class_grids), ends, np.pad(offsets, (0, slots)))


def patch_bucket(grids: Grids | Sequence[Grid], merge: int) -> int:
    """Returns the number of patches that images of similar size, each with one frame, are padded to."""
    return bucket_of(max(rows * columns for _, rows, columns in grids), 4 * merge**2)


def size_classes(grids: Grids | Sequence[Grid], merge: int) -> dict[int, list[int]]:
    """Returns the patches that the images of each class are padded to, and the numbers of its images.

    An image has at least half as many patches as the largest one of its class.
    """
    own = [patch_bucket((grid,), merge) for grid in grids]
    classes: dict[int, list[int]] = {}
    for number in sorted(range(len(own)), key=lambda number: -own[number]):
        largest = next(reversed(classes), 0)
        if not 2 * own[number] >= largest > 0:
            largest = own[number]
        classes.setdefault(largest, []).append(number)
    return classes


def image_slots(images: int, conversations: int, step: int = 2) -> int:
    """Returns the number of images that a class is padded to: on average, a multiple of `step` per conversation."""
    return -(-images // (step * conversations)) * step * conversations


def _images_of(conversation: Conversation) -> list[np.ndarray]:
    """Returns the patches (patches, features) of each image of a conversation."""
    if conversation.pixel_values is None or not conversation.grid_thw:
        return []
    ends = np.cumsum([frames * rows * columns for frames, rows, columns in conversation.grid_thw])
    return np.split(conversation.pixel_values, ends[:-1])


def patch_positions(
    grids_i3: Int[Array, "i 3"], patches: int, *, side: int, merge: int, head_dim: int, theta: float
) -> PatchPositions:
    """Computes positions from traced grids, as `vision_rotary` and `interpolation_taps` do from static ones.

    Args:
      grids_i3: (images, 3): 1, rows and columns of patches; both sides are multiples of `merge`.
      patches: number of patches that every image is padded to.
      side: rows, and columns, of the table of learned positions.
      merge: patches per token along one side.
      head_dim, theta: of the rotary table.
    """
    patch, columns_i1 = jnp.arange(patches), grids_i3[:, 2:] // merge
    block, inside = patch // merge**2, patch % merge**2
    rows_ip = block // columns_i1 * merge + inside // merge
    columns_ip = block % columns_i1 * merge + inside % merge
    places_ip2 = jnp.stack([rows_ip, columns_ip], axis=-1).astype(jnp.float32)
    valid_mask_ip = patch < grids_i3[:, 1:2] * grids_i3[:, 2:]

    sizes_i12 = jnp.maximum(grids_i3[:, None, 1:] - 1, 1).astype(jnp.float32)
    source_ip2 = places_ip2 * np.float32(side - 1) / sizes_i12
    low_ip2 = jnp.floor(source_ip2)
    high_weight_ip2 = source_ip2 - low_ip2
    taps = jnp.stack([low_ip2, low_ip2 + 1], axis=-1).clip(0, side - 1).astype(jnp.int32)  # (i, p, axis, 2)
    weights = jnp.stack([1 - high_weight_ip2, high_weight_ip2], axis=-1)
    indices = taps[:, :, 0, :, None] * side + taps[:, :, 1, None, :]
    products = weights[:, :, 0, :, None] * weights[:, :, 1, None, :]

    spatial = head_dim // 2
    angles = places_ip2[..., None] * inverse_frequencies(spatial, theta)
    half = angles.reshape(*rows_ip.shape, spatial)
    angles = jnp.concatenate([half, half], axis=-1)
    four = (*rows_ip.shape, 4)
    return PatchPositions(
        jnp.cos(angles), jnp.sin(angles), indices.reshape(four), products.reshape(four), valid_mask_ip
    )


def feature_indices(images: BucketedImages, order_bt: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Returns the index of the feature of each image token among the features of all images, class after class.

    Args:
      images: of the batch.
      order_bt: number of image tokens in the batch before each token.
    """
    image_bt = jnp.sum(order_bt[..., None] >= images.ends_i, axis=-1)
    return order_bt + jnp.asarray(images.offsets_i)[jnp.minimum(image_bt, len(images.offsets_i) - 1)]
