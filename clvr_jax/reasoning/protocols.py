"""What the loop asks of a controller and of a drawer, always for a batch of prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from clvr_jax.errors import ClvrError
from clvr_jax.image_io import ImageLike
from clvr_jax.reasoning import context
from clvr_jax.reasoning.actions import GIVEN_IMAGES_PROMPT


@dataclass(frozen=True)
class Conversation:
    """A history that waits for the controller's next reply.

    Attributes:
      prompt: the user's request.
      replies: the replies that led here, with action tokens, oldest first.
      images: the user's own images, then the picture that each reply led to; the last one of those is to be judged.
      seed: 31-bit seed of this call; another attempt has another seed.
      report: the verifier's report on the last image, "" if there is none.
      requirements: what the verifier checks, () if nobody derived requirements.
      attempt: 0 at first; n if the n replies before could not be parsed. A controller that decodes greedily should
        sample from attempt 1 on, or it repeats itself.
      num_given: how many of the images are the user's own.
    """

    prompt: str
    replies: tuple[str, ...] = ()
    images: tuple[ImageLike, ...] = field(default=(), repr=False, compare=False)
    seed: int = 0
    attempt: int = 0
    report: str = ""
    requirements: tuple[str, ...] = ()
    num_given: int = 0

    def __post_init__(self) -> None:
        made = len(self.images) - self.num_given
        if made != len(self.replies) or self.num_given < 0:
            raise ClvrError(f"conversation: {len(self.replies)} replies but {made} images; each reply has one")

    def messages(self, system: str | None = None) -> list[context.Message]:
        """The chat that the controller continues; see context.chat_messages.

        system: the system prompt; what the user's own images are follows it, if there are any.
        """
        if system is not None and self.num_given:
            system += GIVEN_IMAGES_PROMPT
        made = len(self.images) - self.num_given
        return context.chat_messages(
            self.prompt, self.replies, made, system, self.report, self.requirements, self.num_given
        )


@dataclass(frozen=True)
class GenerationRequest:
    """A history that waits for its next picture.

    Attributes:
      prompt: the user's request.
      replies: r_1 .. r_t, with action tokens; r_t is what to draw now.
      images: the references in order: the user's own images, then pictures 1 .. t - 1.
      seed: 31-bit seed of this drawing.
      num_given: how many of the images are the user's own.
    """

    prompt: str
    replies: tuple[str, ...]
    images: tuple[ImageLike, ...] = field(default=(), repr=False, compare=False)
    seed: int = 0
    num_given: int = 0

    def __post_init__(self) -> None:
        made = len(self.images) - self.num_given
        if made != len(self.replies) - 1 or self.num_given < 0:
            raise ClvrError(f"draw request: {len(self.replies)} replies need one image less, got {made}")

    @property
    def text(self) -> str:
        """What the diffusion model reads; see context.drawing_text."""
        return context.conditioning_text(self.prompt, self.replies)


@dataclass(frozen=True)
class GeneratedImage:
    """A picture and its price: `nfe` forwards of the diffusion network (guidance counts twice).

    left_out: how many replies, the oldest, the image generator did not read, because the history was too long for it.
    """

    image: ImageLike = field(repr=False, compare=False)
    nfe: int
    left_out: int = 0

    def __post_init__(self) -> None:
        if self.nfe < 0 or self.left_out < 0:
            raise ClvrError(f"drawing: nfe and left_out must be >= 0, got {self.nfe} and {self.left_out}")


class Controller(Protocol):
    """Plans, judges and decides: usually a vision-language model."""

    def reply(self, conversations: Sequence[Conversation]) -> list[str]:
        """One raw reply (reasoning and action token) for every conversation, in order.

        The reply must depend on its own conversation and seed only, not on the rest of the batch.
        """
        ...


class ImageGenerator(Protocol):
    """Draws and edits: usually a diffusion model. Requests of one batch may differ in their number of references."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GeneratedImage]:
        """One drawing for every request, in order; it depends on its own request and seed only."""
        ...
