"""Conversations as Qwen3-VL reads them, and which of their tokens it learns to say."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clvr_jax.data.qwen3_vl_images import ImageLike, Qwen3VLImageProcessor
from clvr_jax.errors import UsageError
from clvr_jax.models.qwen3_vl_positions import Conversation, batch_conversations

Message = Mapping[str, Any]
"""{"role": ..., "content": text or parts}; a part is {"type": "text", "text": ...} or {"type": "image"}."""

IMAGE_PAD = "<|image_pad|>"
END_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""What ends a reply, as in Qwen3-VL's generation_config.json: the end of a turn, or of everything."""

_SAID = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)


def read_conversation(
    tokenizer: Any,
    image_processor: Qwen3VLImageProcessor,
    messages: Sequence[Message],
    images: Sequence[ImageLike],
    *,
    add_generation_prompt: bool = True,
) -> Conversation:
    """Messages and pictures -> token ids with one placeholder for each visual token, and patches.

    Raises: UsageError if the messages hold another number of image parts than there are pictures.
    """
    text, pixel_values, grids = _expanded(tokenizer, image_processor, messages, images, add_generation_prompt)
    return Conversation(tokenizer(text)["input_ids"], pixel_values, grids)


def supervised_conversation(
    tokenizer: Any,
    image_processor: Qwen3VLImageProcessor,
    messages: Sequence[Message],
    images: Sequence[ImageLike],
    *,
    last_only: bool = False,
) -> tuple[Conversation, np.ndarray]:
    """A whole conversation to learn from, and a weight for each of its tokens.

    Returns: the conversation, and (tokens,) float32: 1 at what the assistant says and at the end of its turns, 0 at
      everything it only reads. With `last_only` the weight is 1 in the assistant's last turn only.
    Raises: as `read_conversation`.
    """
    text, pixel_values, grids = _expanded(tokenizer, image_processor, messages, images, False)
    ids, weights = supervised_tokens(tokenizer, text, last_only=last_only)
    return Conversation(ids, pixel_values, grids), weights


def supervised_tokens(tokenizer: Any, text: str, *, last_only: bool = False) -> tuple[list[int], np.ndarray]:
    """The tokens of a whole chat as text, and their weights as `supervised_conversation` has them."""
    read = tokenizer(text, return_offsets_mapping=True)
    begins = np.array([begin for begin, _ in read["offset_mapping"]])
    weights = np.zeros(len(begins), np.float32)
    turns = list(_SAID.finditer(text))
    for said in turns[-1:] if last_only else turns:
        weights[(begins >= said.start(1)) & (begins < said.end(1))] = 1
    return read["input_ids"], weights


def collate_conversations(
    examples: Sequence[tuple[Conversation, np.ndarray]],
    *,
    image_token_id: int,
    merge: int,
    pad_token: int,
    length_multiple: int = 32,
    image_slots: int = 0,
) -> dict[str, Any]:
    """Supervised conversations as one batch, every array with its rows first, as a mesh cuts them.

    Returns: what `batch_conversations` returns, but positions_b3t for positions_3bt; and weights_bt float32.
    """
    batch = batch_conversations(
        [conversation for conversation, _ in examples],
        image_token_id=image_token_id,
        merge=merge,
        length_multiple=length_multiple,
        image_slots=image_slots,
        pad_token=pad_token,
    )
    weights_bt = np.zeros(batch["input_ids_bt"].shape, np.float32)
    for row, (_, weights) in enumerate(examples):
        weights_bt[row, : len(weights)] = weights
    positions_b3t = batch.pop("positions_3bt").swapaxes(0, 1)
    return {**batch, "positions_b3t": positions_b3t, "weights_bt": weights_bt}


def _expanded(
    tokenizer: Any,
    image_processor: Qwen3VLImageProcessor,
    messages: Sequence[Message],
    images: Sequence[ImageLike],
    add_generation_prompt: bool,
) -> tuple[str, np.ndarray | None, tuple[tuple[int, int, int], ...]]:
    """The chat as text with one placeholder for each visual token, the patches and their grids."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    pieces = text.split(IMAGE_PAD)
    if len(pieces) - 1 != len(images):
        raise UsageError(f"chat: the messages have {len(pieces) - 1} image parts, {len(images)} pictures were given")
    if not images:
        return text, None, ()
    pixel_values, grids = image_processor(images)
    merge = image_processor.merge_size
    tokens = [IMAGE_PAD * (t * h * w // merge**2) for t, h, w in grids]
    expanded = pieces[0] + "".join(pad + piece for pad, piece in zip(tokens, pieces[1:], strict=True))
    return expanded, pixel_values, grids
