"""An ablation of the shapes world: the detector describes images for the verifier.

What a loop with exact descriptions lacks is due to planning, comparison and generation. What a loop with the model's
own descriptions lacks in addition is due to these.
"""

from collections.abc import Sequence
from dataclasses import replace

from clvr_jax.image_io import ImageLike, pixels
from clvr_jax.interfaces import Usage
from clvr_jax.reasoning.verification import Verification, Verifier
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.requirements import describe


class ExactDescriptions(Verifier):
    """A verifier that compares requirements with the detector's description of an image, as if it were its own."""

    def __init__(self, verifier: Verifier):
        self._verifier = verifier

    @property
    def name(self) -> str:
        """The verifier's name and "exact descriptions"."""
        return f"{self._verifier.name}, exact descriptions"

    @property
    def usage(self) -> Usage:
        """The usage of the verifier so far."""
        return getattr(self._verifier, "usage", Usage())

    def derive(self, prompts: Sequence[str]) -> list[tuple[str, ...]]:
        """Derives requirements as the verifier does."""
        return self._verifier.derive(prompts)

    def check(self, requirements: Sequence[Sequence[str]], images: Sequence[ImageLike]) -> list[Verification]:
        """Compares requirements with exact descriptions of the images."""
        checked = self._verifier.check_plans(requirements, [describe(detect(pixels(image))) for image in images])
        return [replace(verification, verifier=self.name) for verification in checked]

    def check_plans(self, requirements: Sequence[Sequence[str]], plans: Sequence[str]) -> list[Verification]:
        """Checks plans as the verifier does."""
        return self._verifier.check_plans(requirements, plans)
