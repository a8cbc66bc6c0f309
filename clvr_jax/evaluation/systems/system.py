"""A system under test: a function of prompts and seeds, and its output for each prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from clvr_jax.errors import ClvrError
from clvr_jax.files.image_io import ImageLike
from clvr_jax.files.json_input import JSON
from clvr_jax.interfaces import Usage
from clvr_jax.reasoning.seeds import derive_seed
from clvr_jax.reasoning.trajectories.trajectory import Trajectory

GenerateFn = Callable[[list[str], list[int]], Iterable[object]]
"""A function (prompts, seeds) -> one result per prompt, in order. A result is a SystemOutput, or anything that
`SystemOutput.from_result` accepts. A function whose results are expensive yields them one by one, so that a run that
fails keeps those before."""


@dataclass(frozen=True)
class SystemOutput:
    """The output for one prompt.

    Attributes:
      image: None if a closed loop ended without an image, or an endpoint refused the prompt.
      nfe: network evaluations of our own models, None if unknown.
      usage: tokens of the language model, and dollars of endpoints; None if unknown.
      trajectory: of a closed loop.
      outcome: how the generation ended, if there is no trajectory that records it.
      seconds: wall time of this prompt alone; None if it shares the time of its batch.
      adapted: which fields the requests to endpoints lacked because their servers refuse them, in words.
    """

    image: ImageLike | None = field(repr=False)
    nfe: int | None = None
    usage: Usage | None = None
    trajectory: Trajectory | None = None
    outcome: str | None = None
    seconds: float | None = None
    adapted: tuple[str, ...] = ()

    @classmethod
    def from_result(cls, result: Any) -> SystemOutput:
        """Converts an image, a Trajectory, or an object with `image` and optionally `nfe`, `usage` and `trajectory`.

        Raises: ClvrError for None, or an object without image and trajectory.
        """
        if isinstance(result, SystemOutput):
            return result
        if isinstance(result, Trajectory):
            return cls(result.image, result.nfe, trajectory=result)
        trajectory = getattr(result, "trajectory", None)
        image = getattr(result, "image", None if trajectory is not None else result)
        if image is None and trajectory is None:
            raise ClvrError("benchmark: the system returned a result without an image")
        return cls(image, getattr(result, "nfe", None), getattr(result, "usage", None), trajectory)


@dataclass(frozen=True)
class System:
    """A system that generates images.

    Attributes:
      generate: (prompts, seeds) -> one result per prompt.
      settings: JSON values that identify the system; a run has images of one identity only.
      device: the device that generates, recorded with each image.
      batch_size: preferred number of prompts per call of `generate`.
    """

    generate: GenerateFn
    settings: Mapping[str, JSON]
    device: str | None = None
    batch_size: int = 16


def image_seed(seed: int, prompt: str, sample: int) -> int:
    """Returns the seed of one image, which depends only on the run's seed, the prompt and the sample index."""
    return derive_seed(seed, sample, prompt)
