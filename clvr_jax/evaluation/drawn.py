"""What a system under test gives back for a prompt, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from clvr_jax.errors import ClvrError
from clvr_jax.reasoning.images import Picture
from clvr_jax.reasoning.loop import derive_seed
from clvr_jax.reasoning.tools import Usage
from clvr_jax.reasoning.trajectory import Trajectory

DrawAll = Callable[[list[str], list[int]], Iterable[Any]]
"""(prompts, seeds) -> one result per prompt, in order: a Drawn, or anything that `Drawn.of` takes. Dear results are
yielded one by one, so that a run that fails has those before."""


@dataclass(frozen=True)
class Drawn:
    """One result.

    Attributes:
      image: None if a closed loop ended without any picture, or an endpoint refused to draw.
      nfe: network evaluations of our own models, None if unknown.
      usage: tokens of the language model, and dollars of endpoints; None if unknown.
      trajectory: of a closed loop.
      outcome: how it ended, where no trajectory tells.
      seconds: that it took alone; None to share the time of its batch.
    """

    image: Picture | None = field(repr=False)
    nfe: int | None = None
    usage: Usage | None = None
    trajectory: Trajectory | None = None
    outcome: str | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, result: Any) -> Drawn:
        """From a picture, a Trajectory, or an object with `image` and, if it has them, `nfe`, `usage` and `trajectory`.

        Raises: ClvrError for None, or an object without image and trajectory.
        """
        if isinstance(result, Drawn):
            return result
        if isinstance(result, Trajectory):
            return cls(result.image, result.nfe, trajectory=result)
        trajectory = getattr(result, "trajectory", None)
        picture = getattr(result, "image", None if trajectory is not None else result)
        if picture is None and trajectory is None:
            raise ClvrError("benchmark: a drawing came back without a picture")
        return cls(picture, getattr(result, "nfe", None), getattr(result, "usage", None), trajectory)


def picture_seed(seed: int, prompt: str, sample: int) -> int:
    """The seed of one picture: it depends on the run's seed, the prompt and the number of the sample only."""
    return derive_seed(seed, sample, prompt)
