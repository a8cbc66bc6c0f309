"""The blind ablation: a verifier or a controller whose images are replaced by blank ones of the same size.

A component that is as good without images as with them does not use them. In a loop with a separate verifier, both
components must be blind: the verifier's report would describe to a blind controller what the image shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from clvr_jax.image_io import ImageLike, as_pil
from clvr_jax.interfaces import Usage
from clvr_jax.reasoning.protocols import Controller, Conversation
from clvr_jax.reasoning.verification import Verification, Verifier
from clvr_jax.worlds.shapes.scene import BACKGROUND, CANVAS

Color = tuple[int, int, int]

WHITE: Color = (255, 255, 255)


def blank_image(image: ImageLike, color: Color | None = None) -> np.ndarray:
    """Returns a blank image, uint8 (height, width, 3), of the same size as `image`.

    Args:
      image: the image to replace.
      color: of the blank image; if None, the empty canvas of the shapes world for images of its size, else white.
    """
    width, height = as_pil(image).size
    if color is None:
        color = BACKGROUND if (width, height) == (CANVAS, CANVAS) else WHITE
    return np.full((height, width, 3), color, dtype=np.uint8)


class BlindVerifier(Verifier):
    """A verifier that checks a blank image in place of each image; prompts and plans are not changed.

    Args:
      verifier: the verifier.
      color: of the blank images, as in `blank_image`.
    """

    def __init__(self, verifier: Verifier, color: Color | None = None):
        self._verifier, self._color = verifier, color

    @property
    def name(self) -> str:
        """The verifier's name and "blind"."""
        return f"{self._verifier.name}, blind"

    @property
    def usage(self) -> Usage:
        """The usage of the verifier so far."""
        return getattr(self._verifier, "usage", Usage())

    def derive(self, prompts: Sequence[str]) -> list[tuple[str, ...]]:
        """Derives requirements as the verifier does."""
        return self._verifier.derive(prompts)

    def check(self, requirements: Sequence[Sequence[str]], images: Sequence[ImageLike]) -> list[Verification]:
        """Checks blank images."""
        return self._verifier.check(requirements, [blank_image(image, self._color) for image in images])

    def check_plans(self, requirements: Sequence[Sequence[str]], plans: Sequence[str]) -> list[Verification]:
        """Checks plans as the verifier does."""
        return self._verifier.check_plans(requirements, plans)


class BlindController(Controller):
    """A controller that sees a blank image in place of each image; texts are not changed.

    Args:
      controller: the controller.
      color: of the blank images, as in `blank_image`.
    """

    def __init__(self, controller: Controller, color: Color | None = None):
        self._controller, self._color = controller, color

    @property
    def usage(self) -> Usage:
        """The usage of the controller so far."""
        return getattr(self._controller, "usage", Usage())

    def reply(self, conversations: Sequence[Conversation]) -> list[str]:
        """Replies to the conversations with blank images."""
        blind = [
            dataclasses.replace(each, images=tuple(blank_image(image, self._color) for image in each.images))
            for each in conversations
        ]
        return self._controller.reply(blind)
