"""What a loop does with wrong images: whether it rejects them, and whether it ends with a right one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clvr_jax.evaluation.benchmarks.shapes import ImageChecker
from clvr_jax.evaluation.harness.results import ImageResult
from clvr_jax.evaluation.harness.run_directory import RunDirectory
from clvr_jax.files.image_io import pixels
from clvr_jax.files.json_input import UncheckedJSON
from clvr_jax.reasoning.trajectories.trajectory import ACCEPTED, Trajectory

OBJECTS_PER_STEP = 2
"""Objects that the controllers of the shapes world generate in one planned step."""


@dataclass(frozen=True)
class Corrections:
    """Counts over the runs of one system on one set of prompts.

    Attributes:
      runs: all runs.
      wrong: runs whose image was wrong after the last planned step.
      recovered: those of `wrong` whose result is right.
      accepted: runs that ended with an accepted image.
      wrongly_accepted: those of `accepted` whose result is wrong.
      unaccepted_right: runs that ended otherwise although their result is right.
    """

    runs: int
    wrong: int
    recovered: int
    accepted: int
    wrongly_accepted: int
    unaccepted_right: int


def count_corrections(directory: RunDirectory, entries: Sequence[ImageResult], checker: ImageChecker) -> Corrections:
    """Counts corrections in the trajectories of a run.

    Args:
      directory: of a closed loop on prompts of the shapes world.
      entries: the images of its results, with "index", "sample" and "correct".
      checker: decides whether an image is right.
    """
    metadata = directory.metadata()
    after_plan, right, accepted = [], [], []
    for entry in entries:
        trajectory = directory.trajectory(entry["index"], entry["sample"])
        if trajectory is None:
            continue
        image = _image_after_plan(trajectory, metadata[entry["index"]])
        after_plan.append(image is not None and checker.is_correct(image, metadata[entry["index"]]))
        right.append(bool(entry["correct"]))
        accepted.append(trajectory.outcome == ACCEPTED)
    counted = list(zip(after_plan, right, accepted, strict=True))
    return Corrections(
        runs=len(counted),
        wrong=sum(not first for first, _, _ in counted),
        recovered=sum(last and not first for first, last, _ in counted),
        accepted=sum(accepted),
        wrongly_accepted=sum(ended and not last for _, last, ended in counted),
        unaccepted_right=sum(last and not ended for _, last, ended in counted),
    )


def _image_after_plan(trajectory: Trajectory, metadata: UncheckedJSON) -> np.ndarray | None:
    """Returns the image of the last planned step, or the last one of a run that was shorter; None without an image."""
    objects = sum(clause.get("count", 1) for clause in metadata["include"])
    steps = trajectory.generated[: -(-objects // OBJECTS_PER_STEP)]
    return pixels(steps[-1].image) if steps and steps[-1].image is not None else None
