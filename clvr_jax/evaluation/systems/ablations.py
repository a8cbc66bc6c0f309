"""Ablations of a loop: blank images in place of images, and the detector's descriptions in place of the verifier's.

A component that is as good without images as with them does not use them. In a loop with a separate verifier, both
components must be blind: the verifier's report would describe to a blind controller what the image shows. Exact
descriptions are the other end, an upper bound of what better verification gives; they exist in the shapes world only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from clvr_jax.files.image_io import ImageLike, as_pil, pixels
from clvr_jax.interfaces import Usage
from clvr_jax.reasoning.conversation.protocols import Controller, Conversation
from clvr_jax.reasoning.verification.verification import Verification, Verifier
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.requirements import describe
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


class VerifierAblation(Verifier):
    """A verifier that passes everything on to another one; ablations replace how it checks images.

    Args:
      verifier: the verifier.
      change: what is changed, for the name.
    """

    def __init__(self, verifier: Verifier, change: str):
        self._verifier, self._change = verifier, change

    @property
    def name(self) -> str:
        """The verifier's name and what is changed."""
        return f"{self._verifier.name}, {self._change}"

    @property
    def usage(self) -> Usage:
        """The usage of the verifier so far."""
        return getattr(self._verifier, "usage", Usage())

    def derive(self, prompts: Sequence[str]) -> list[tuple[str, ...]]:
        """Derives requirements as the verifier does."""
        return self._verifier.derive(prompts)

    def check(self, requirements: Sequence[Sequence[str]], images: Sequence[ImageLike]) -> list[Verification]:
        """Checks images as the verifier does."""
        return self._verifier.check(requirements, images)

    def check_plans(self, requirements: Sequence[Sequence[str]], plans: Sequence[str]) -> list[Verification]:
        """Checks plans as the verifier does."""
        return self._verifier.check_plans(requirements, plans)


class BlindVerifier(VerifierAblation):
    """A verifier that checks a blank image in place of each image; prompts and plans are not changed.

    Args:
      verifier: the verifier.
      color: of the blank images, as in `blank_image`.
    """

    def __init__(self, verifier: Verifier, color: Color | None = None):
        super().__init__(verifier, "blind")
        self._color = color

    def check(self, requirements: Sequence[Sequence[str]], images: Sequence[ImageLike]) -> list[Verification]:
        """Checks blank images."""
        return super().check(requirements, [blank_image(image, self._color) for image in images])


class ExactDescriptions(VerifierAblation):
    """A verifier that compares requirements with the detector's description of an image, as if it were its own.

    What a loop with exact descriptions lacks is due to planning, comparison and generation. What a loop with the
    model's own descriptions lacks in addition is due to these.
    """

    def __init__(self, verifier: Verifier):
        super().__init__(verifier, "exact descriptions")

    def check(self, requirements: Sequence[Sequence[str]], images: Sequence[ImageLike]) -> list[Verification]:
        """Compares requirements with exact descriptions of the images. Raises: ClvrError for images of other worlds."""
        checked = self.check_plans(requirements, [describe(detect(pixels(image))) for image in images])
        return [dataclasses.replace(verification, verifier=self.name) for verification in checked]


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
