"""Histories as an image generator reads them: whole, or without their oldest replies where they are too long for it.

Pipelines, supervised fine-tuning, distillation, RL and the data engine all make the generator's text here, so that a
model is trained on what it is given later.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clvr_jax.data.text import prompt_tokens
from clvr_jax.errors import ClvrError
from clvr_jax.reasoning.context import conditioning_text


@dataclass(frozen=True)
class FittedHistory:
    """The text of a history that fits.

    text: what the image generator reads. length: its tokens, chat template included. left_out: how many replies, the
    oldest, are not part of it.
    """

    text: str
    length: int
    left_out: int = 0


def fit_history(tokenizer: Any, prompt: str, replies: Sequence[str], limit: int | None) -> FittedHistory:
    """Returns the history with as many replies as fit, the latest ones.

    The oldest replies are left out first, whole replies at a time; the prompt, the marks of the images and the last
    reply, which is the current instruction, never are.

    Args:
      tokenizer: of the text encoder, with a chat template.
      prompt, replies: see `reasoning.context.conditioning_text`.
      limit: most tokens that the generator reads, the chat template included; None if any number.
    Raises: ClvrError if the prompt and the current instruction alone are longer.
    """
    for left_out in range(len(replies) or 1):
        text = conditioning_text(prompt, replies, left_out)
        length = token_count(tokenizer, text)
        if limit is None or length <= limit:
            return FittedHistory(text, length, left_out)
    raise ClvrError(
        f"the prompt and the current instruction take {length:,} tokens, more than the {limit:,} that the image "
        f"generator reads (the prompt alone takes {token_count(tokenizer, prompt):,}); shorten the prompt"
    )


def token_count(tokenizer: Any, text: str) -> int:
    """Returns the number of tokens of a text, the chat template included."""
    return len(prompt_tokens(tokenizer, [text])[0])
