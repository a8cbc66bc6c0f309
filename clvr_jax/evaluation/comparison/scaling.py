"""Test-time scaling: accuracy against the budget of images, network evaluations or seconds.

All images are generated once, under the largest budget. The result under a smaller budget is computed from the
trajectory: a loop with at most k images generates the same first k images, verifies them, and returns the best of
them. The result is exact for a budget of images, and for a budget of network evaluations if all images cost the same.
Seconds are those of the steps in the recorded run, and an image counts from the end of its step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.shapes import ImageChecker, shapes_checker
from clvr_jax.evaluation.harness.generation import complete_samples
from clvr_jax.evaluation.harness.run_directory import RunDirectory
from clvr_jax.evaluation.statistics import clustered_interval, paired_bootstrap, sign_test
from clvr_jax.files.image_io import pixels
from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.reasoning.trajectories.trajectory import Trajectory, best_step

TIME_POINTS = 16


@dataclass(frozen=True)
class BudgetCurve:
    """The cost and the correctness of one prompt's result after each generated image.

    Attributes:
      index: of the prompt.
      nfe: network evaluations until the end of each generation.
      seconds: wall time until the end of each generation.
      correct: whether the best image so far, by the loop's verdicts, is correct.
      found: whether any image so far is correct, so that a perfect choice would return a correct one.
    """

    index: int
    nfe: tuple[int, ...]
    seconds: tuple[float, ...]
    correct: tuple[bool, ...]
    found: tuple[bool, ...]

    def correct_after(self, images: int) -> bool:
        """Returns whether the result is correct under a budget of this number of images, at least 1."""
        return bool(self.correct) and self.correct[min(images, len(self.correct)) - 1]

    def correct_within(self, spent: Sequence[float], limit: float) -> bool:
        """Returns whether the result is correct under a budget `limit` of `spent`, which is `nfe` or `seconds`."""
        images = int(np.searchsorted(spent, limit, side="right"))
        return images > 0 and self.correct_after(images)


class Point(TypedDict):
    """The accuracy under a limit, with its 95 % interval over prompts, and the mean cost per image under that limit."""

    limit: float
    accuracy: float
    low: float
    high: float
    nfe: float
    seconds: float


class Curves(TypedDict):
    """The points of one system for each kind of budget."""

    images: list[Point]
    nfe: list[Point]
    seconds: list[Point]


class Gain(TypedDict):
    """The comparison of the results under two budgets of images; see `gain`."""

    few: int
    many: int
    difference: float
    interval: list[float]
    won: int
    lost: int
    p_value: float


class SystemCurves(TypedDict):
    """The name, the run directory, the settings and the curves of one system; see `from_trajectories`."""

    name: str
    folder: str
    settings: Mapping[str, JSON]
    curves: Curves
    perfect_choice: list[Point]
    gain: Gain


class Scaling(TypedDict):
    """The curves of all systems, which is the content of scaling.json."""

    benchmark: str
    judge: Mapping[str, str]
    prompts: int
    systems: list[SystemCurves]


def from_trajectories(
    directories: Mapping[str, RunDirectory], on_progress: Callable[[int], None] | None = None
) -> Scaling:
    """Computes the curves of finished runs of the shapes world, in which a program judges every intermediate image.

    Args:
      directories: name of a system -> directory of its run.
      on_progress: called with the number of systems that are done.
    Returns: {"benchmark", "judge", "prompts", "systems": [{"name", "folder", "settings", "curves", "perfect_choice",
      "gain"}]}, for JSON; "curves" is the content of `curves`, "perfect_choice" that of its "images" if the judge
      chose the best image, and "gain" that of `gain` from 3 images to 8.
    Raises: ClvrError for a run of another benchmark, on other prompts, or that is not finished.
    """
    checker, first = shapes_checker(), next(iter(directories.values())).identity()
    systems: list[SystemCurves] = []
    for number, (name, directory) in enumerate(directories.items(), start=1):
        identity = directory.identity()
        if identity["benchmark"] != "shapes":
            raise ClvrError(
                f"{directory.root}: a run of {identity['benchmark']}; intermediate images can only be judged in the "
                "shapes world: give runs of clvr eval shapes"
            )
        if identity.get("metadata_sha256") != first.get("metadata_sha256"):
            raise ClvrError(
                f"{directory.root}: other prompts than {next(iter(directories))}; give runs on the same ones"
            )
        found = budget_curves(directory, checker)
        systems.append(
            {
                "name": name,
                "folder": str(directory.root),
                "settings": identity["settings"],
                "curves": curves(found),
                "perfect_choice": curves([replace(curve, correct=curve.found) for curve in found])["images"],
                "gain": gain(found, 3, 8),
            }
        )
        if on_progress:
            on_progress(number)
    return {
        "benchmark": "shapes",
        "judge": checker.identity,
        "prompts": first["prompts"],
        "systems": systems,
    }


def budget_curves(directory: RunDirectory, checker: ImageChecker) -> list[BudgetCurve]:
    """Returns the curve of every image of a finished run.

    Args:
      directory: of the run; an image without a trajectory has a curve of one point.
      checker: decides whether an image is correct.
    Raises: ClvrError if an image, record or trajectory is missing.
    """
    identity, entries = directory.identity(), directory.metadata()
    indices = complete_samples(directory, [entry["prompt"] for entry in entries], identity["seed"], identity["samples"])
    all_curves = []
    for index, sample in indices:
        trajectory = directory.trajectory(index, sample)
        if trajectory is None:
            record = directory.record(index, sample)
            if not record.has_image:
                all_curves.append(BudgetCurve(index, (), (), (), ()))
            else:
                correct = checker.is_correct(directory.image(index, sample), entries[index])
                all_curves.append(
                    BudgetCurve(index, (record.nfe or 0,), (record.seconds or 0.0,), (correct,), (correct,))
                )
        else:
            all_curves.append(budget_curve(index, trajectory, entries[index], checker))
    return all_curves


def budget_curve(index: int, trajectory: Trajectory, metadata: UncheckedJSON, checker: ImageChecker) -> BudgetCurve:
    """Returns the curve of one trajectory."""
    verdicts: dict[int, bool] = {}
    nfe, seconds, correct, found = [], [], [], []
    total_nfe, total_seconds = 0, 0.0
    for number, step in enumerate(trajectory.steps):
        total_nfe += step.nfe
        total_seconds += step.seconds
        if step.image is None:
            continue
        verdicts[number] = checker.is_correct(pixels(step.image), metadata)
        best = best_step(trajectory.steps[: number + 1])
        assert best is not None
        nfe.append(total_nfe)
        seconds.append(total_seconds)
        correct.append(verdicts[best])
        found.append(any(verdicts.values()))
    return BudgetCurve(index, tuple(nfe), tuple(seconds), tuple(correct), tuple(found))


def gain(all_curves: Sequence[BudgetCurve], few: int, many: int) -> Gain:
    """Compares the results under two budgets of images, prompt by prompt.

    Returns: {"few", "many"} the budgets, {"difference", "interval"} of accuracy with its 95 % interval (bootstrap over
      prompts), {"won", "lost"} prompts, and "p_value" of the exact sign test.
    """
    prompts: dict[int, list[BudgetCurve]] = {}
    for curve in all_curves:
        prompts.setdefault(curve.index, []).append(curve)
    first, second = (
        [float(np.mean([curve.correct_after(limit) for curve in each])) for each in prompts.values()]
        for limit in (few, many)
    )
    difference, test = paired_bootstrap(first, second), sign_test(first, second)
    return {
        "few": few,
        "many": many,
        "difference": difference.estimate,
        "interval": [difference.low, difference.high],
        "won": test.second_wins,
        "lost": test.first_wins,
        "p_value": test.p_value,
    }


def curves(all_curves: Sequence[BudgetCurve]) -> Curves:
    """Computes the accuracy under each limit: {"images", "nfe", "seconds"} -> points, for JSON.

    Limits are every number of images that occurs ("images"); every sum of network evaluations that occurs, none if
    they were not recorded; and 16 times, evenly spaced in their logarithm, from the first image to the last.

    Raises: ClvrError if no prompt has an image.
    """
    nonempty = [curve for curve in all_curves if curve.correct]
    if not nonempty:
        raise ClvrError("scaling: no image was generated, so there are no curves; give another run")
    bounds = min(curve.seconds[0] for curve in nonempty), max(curve.seconds[-1] for curve in nonempty)
    most = max(len(curve.correct) for curve in nonempty)
    sums = sorted({spent for curve in nonempty for spent in curve.nfe})
    times = np.geomspace(max(bounds[0], 1e-3), max(bounds[1], 1e-3) * (1 + 1e-9), TIME_POINTS)
    return {
        "images": [
            _point(
                all_curves,
                limit,
                [curve.correct_after(limit) for curve in all_curves],
                [min(limit, len(curve.nfe)) for curve in all_curves],
            )
            for limit in range(1, most + 1)
        ],
        "nfe": [_under(all_curves, limit, "nfe") for limit in sums if limit],
        "seconds": [_under(all_curves, float(limit), "seconds") for limit in times],
    }


def _under(all_curves: Sequence[BudgetCurve], limit: float, kind: Literal["nfe", "seconds"]) -> Point:
    correct = [curve.correct_within(getattr(curve, kind), limit) for curve in all_curves]
    counts = [int(np.searchsorted(getattr(curve, kind), limit, side="right")) for curve in all_curves]
    return _point(all_curves, limit, correct, counts)


def _point(all_curves: Sequence[BudgetCurve], limit: float, correct: Sequence[bool], counts: Sequence[int]) -> Point:
    prompts: dict[int, list[float]] = {}
    for curve, is_correct in zip(all_curves, correct, strict=True):
        prompts.setdefault(curve.index, []).append(float(is_correct))
    interval = clustered_interval(list(prompts.values()))
    spent = [
        (curve.nfe[count - 1], curve.seconds[count - 1]) if count else (0, 0.0)
        for curve, count in zip(all_curves, counts, strict=True)
    ]
    nfe, seconds = (float(np.mean(column)) for column in zip(*spent, strict=True))
    return {
        "limit": limit,
        "accuracy": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "nfe": nfe,
        "seconds": seconds,
    }
