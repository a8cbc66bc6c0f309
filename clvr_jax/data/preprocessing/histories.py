"""The conditioning text of an image generator: a history without its oldest replies if it is too long.

Pipelines, supervised fine-tuning, distillation, RL and the data engine all make this text here, so that training and
inference agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from clvr_jax.data.preprocessing.text import prompt_tokens
from clvr_jax.errors import ClvrError
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.reasoning.conversation.context import conditioning_text


@dataclass(frozen=True)
class FittedHistory:
    """The conditioning text of a history.

    Attributes:
      text: the text that the image generator reads.
      length: number of its tokens, chat template included.
      left_out: number of replies, the oldest ones, that are not part of it.
    """

    text: str
    length: int
    left_out: int = 0


def fit_history(tokenizer: Tokenizer, prompt: str, replies: Sequence[str], limit: int | None) -> FittedHistory:
    """Returns the history with as many of the latest replies as fit.

    Whole replies are left out, the oldest first; never the prompt, the marks of the images, or the last reply, which is
    the current instruction.

    Args:
      tokenizer: tokenizer of the text encoder, with a chat template.
      prompt, replies: see `reasoning.context.conditioning_text`.
      limit: maximum number of tokens, the chat template included; None for no limit.
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


def token_count(tokenizer: Tokenizer, text: str) -> int:
    """Returns the number of tokens of a text, the chat template included."""
    return len(prompt_tokens(tokenizer, [text])[0])
