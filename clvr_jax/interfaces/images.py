"""The interface of image models: requests, responses, and the protocol that pipelines and endpoints implement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from clvr_jax.files.image_io import ImageLike
from clvr_jax.interfaces.usage import Usage


@dataclass(frozen=True)
class ImageRequest:
    """An image to generate from text, or by an edit of reference images.

    Attributes:
      prompt: text that conditions the image.
      references: images to edit or compose; empty for text-to-image.
      size: (height, width) in pixels; None takes the model's own.
      seed: 31-bit seed of the noise.
    """

    prompt: str
    references: Sequence[ImageLike] = field(default=(), repr=False)
    size: tuple[int, int] | None = None
    seed: int = 0


@dataclass(frozen=True)
class ImageResponse:
    """A generated image and its cost."""

    image: ImageLike = field(repr=False)
    usage: Usage = Usage()


class ImageModel(Protocol):
    """A model that generates and edits images. Calls may come from many threads at once."""

    @property
    def name(self) -> str:
        """Model and revision, recorded with its images."""
        ...

    def generate(self, request: ImageRequest) -> ImageResponse:
        """Returns one image. Raises: ProviderError."""
        ...
