"""Tokens, patches and loss weights of conversations for Qwen3-VL."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clvr_jax.data.preprocessing.chat_templates import render_chats, without_control_tokens
from clvr_jax.data.preprocessing.qwen3_vl_images import ImageLike, Qwen3VLImageProcessor
from clvr_jax.errors import UsageError
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.models.qwen3_vl.positions import Conversation, batch_conversations

Message = Mapping[str, object]
"""{"role": ..., "content": text or parts}; a part is {"type": "text", "text": ...} or {"type": "image"}."""

IMAGE_PAD = "<|image_pad|>"
END_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""Tokens that end a reply, as in Qwen3-VL's generation_config.json: end of turn, and end of text."""

_ASSISTANT_TURN = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)


def read_conversation(
    tokenizer: Tokenizer,
    image_processor: Qwen3VLImageProcessor,
    messages: Sequence[Message],
    images: Sequence[ImageLike],
    *,
    add_generation_prompt: bool = True,
) -> Conversation:
    """Converts messages and images to token ids, with one placeholder per visual token, and patches.

    Args:
      tokenizer: tokenizer of the model, with a chat template.
      image_processor: makes the patches.
      messages: the messages.
      images: one image for each image part of the messages, in order.
      add_generation_prompt: end with the start of the assistant's next turn.
    Raises: UsageError if the numbers of image parts and images differ.
    """
    text, pixel_values, grids = _expanded(tokenizer, image_processor, messages, images, add_generation_prompt)
    return Conversation(tokenizer(text)["input_ids"], pixel_values, grids)


def supervised_conversation(
    tokenizer: Tokenizer,
    image_processor: Qwen3VLImageProcessor,
    messages: Sequence[Message],
    images: Sequence[ImageLike],
    *,
    last_only: bool = False,
) -> tuple[Conversation, np.ndarray]:
    """Converts a whole conversation for supervised training.

    Args:
      tokenizer, image_processor, messages, images: see `read_conversation`.
      last_only: train on the assistant's last turn only.
    Returns: the conversation, and loss weights (tokens,) float32: 1 in the assistant's turns, end of turn included, and
      0 elsewhere.
    Raises: UsageError, see `read_conversation`.
    """
    text, pixel_values, grids = _expanded(tokenizer, image_processor, messages, images, False)
    ids, weights = supervised_tokens(tokenizer, text, last_only=last_only)
    return Conversation(ids, pixel_values, grids), weights


def supervised_tokens(tokenizer: Tokenizer, text: str, *, last_only: bool = False) -> tuple[list[int], np.ndarray]:
    """Returns the tokens of a whole chat in text form, and their loss weights, see `supervised_conversation`."""
    read = tokenizer(text, return_offsets_mapping=True)
    begins = np.array([begin for begin, _ in read["offset_mapping"]])
    weights = np.zeros(len(begins), np.float32)
    turns = list(_ASSISTANT_TURN.finditer(text))
    for turn in turns[-1:] if last_only else turns:
        weights[(begins >= turn.start(1)) & (begins < turn.end(1))] = 1
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
    """Collates supervised conversations into a batch; the batch axis of every array is the first, to be sharded.

    Args:
      examples: conversations and their loss weights.
      image_token_id, merge, pad_token, length_multiple, image_slots: see `batch_conversations`.
    Returns: the dict of `batch_conversations`, with positions_b3t in place of positions_3bt, and weights_bt float32.
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
    tokenizer: Tokenizer,
    image_processor: Qwen3VLImageProcessor,
    messages: Sequence[Message],
    images: Sequence[ImageLike],
    add_generation_prompt: bool,
) -> tuple[str, np.ndarray | None, tuple[tuple[int, int, int], ...]]:
    """Returns the chat as text with one placeholder per visual token, the patches, and their grids."""
    (text,) = render_chats(tokenizer, [without_control_tokens(messages)], add_generation_prompt=add_generation_prompt)
    pieces = text.split(IMAGE_PAD)
    if len(pieces) - 1 != len(images):
        raise UsageError(f"chat: the messages have {len(pieces) - 1} image parts, but {len(images)} images were given")
    if not images:
        return text, None, ()
    pixel_values, grids = image_processor(images)
    merge = image_processor.merge_size
    tokens = [IMAGE_PAD * (t * h * w // merge**2) for t, h, w in grids]
    expanded = pieces[0] + "".join(pad + piece for pad, piece in zip(tokens, pieces[1:], strict=True))
    return expanded, pixel_values, grids
