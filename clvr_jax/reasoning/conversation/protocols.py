"""The roles of the closed loop, always for a batch of prompts: the controller and the image generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from clvr_jax.errors import ClvrError
from clvr_jax.files.image_io import ImageLike
from clvr_jax.interfaces import Message
from clvr_jax.reasoning.conversation.actions import GIVEN_IMAGES_PROMPT
from clvr_jax.reasoning.conversation.context import chat_messages, conditioning_text


@dataclass(frozen=True)
class Conversation:
    """A history that the controller continues by one reply.

    Attributes:
      prompt: the user's request.
      replies: all replies so far, with action tokens, oldest first.
      images: the user's own images, then the image generated after each reply. The last one is to be judged.
      seed: 31-bit seed of this call; each attempt has its own.
      attempt: number of replies that could not be used; 0 at first. A controller that decodes greedily should sample
        from attempt 1 on, or it repeats itself.
      report: the verifier's report on the last image; "" if there is none.
      requirements: what the verifier checks; () without a verifier.
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
        num_generated = len(self.images) - self.num_given
        if num_generated != len(self.replies) or self.num_given < 0:
            raise ClvrError(f"conversation: {len(self.replies)} replies but {num_generated} images; each reply has one")

    def messages(self, system: str | None = None) -> list[Message]:
        """Returns the chat that the controller continues.

        Args:
          system: the system prompt, if any. An explanation of the user's own images is added to it.
        """
        if system is not None and self.num_given:
            system += GIVEN_IMAGES_PROMPT
        num_generated = len(self.images) - self.num_given
        return chat_messages(
            self.prompt, self.replies, num_generated, system, self.report, self.requirements, self.num_given
        )


@dataclass(frozen=True)
class GenerationRequest:
    """A history whose next image is to be generated.

    Attributes:
      prompt: the user's request.
      replies: r_1 .. r_t with action tokens; r_t holds the current instruction.
      images: the references in order: the user's own images, then the generated images 1 .. t - 1.
      seed: 31-bit seed of the noise.
      num_given: how many of the images are the user's own.
    """

    prompt: str
    replies: tuple[str, ...]
    images: tuple[ImageLike, ...] = field(default=(), repr=False, compare=False)
    seed: int = 0
    num_given: int = 0

    def __post_init__(self) -> None:
        num_generated = len(self.images) - self.num_given
        if num_generated != len(self.replies) - 1 or self.num_given < 0:
            raise ClvrError(f"generation request: {len(self.replies)} replies need one image less, got {num_generated}")

    @property
    def text(self) -> str:
        """The text that conditions the diffusion model."""
        return conditioning_text(self.prompt, self.replies)


@dataclass(frozen=True)
class GeneratedImage:
    """An image and its cost.

    Attributes:
      image: the image.
      nfe: forward passes of the diffusion network; classifier-free guidance counts twice.
      left_out: number of the oldest replies that did not fit into the generator's text length.
    """

    image: ImageLike = field(repr=False, compare=False)
    nfe: int
    left_out: int = 0

    def __post_init__(self) -> None:
        if self.nfe < 0 or self.left_out < 0:
            raise ClvrError(f"generated image: nfe and left_out must be >= 0, got {self.nfe} and {self.left_out}")


class Controller(Protocol):
    """Plans, verifies and corrects; usually a vision-language model."""

    def reply(self, conversations: Sequence[Conversation]) -> list[str]:
        """Returns one raw reply (reasoning and action token) for every conversation, in order.

        A reply must depend on its own conversation and seed only, not on the rest of the batch.
        """
        ...


class ImageGenerator(Protocol):
    """Generates and edits images; usually a diffusion model."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GeneratedImage]:
        """Returns one image for every request, in order. Requests of a batch may differ in their number of references.

        An image must depend on its own request and seed only, not on the rest of the batch.
        """
        ...
