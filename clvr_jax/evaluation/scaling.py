"""What more compute at test time buys: success against drawings, network evaluations and seconds allowed.

Everything is drawn once, under the largest budget. What a smaller one would have given is read off the trajectory: the
loop with at most k drawings makes the same first k, judges them, and returns the best of those. For drawings this is
exact, and for network evaluations where all drawings cost the same; seconds are what the steps took in that run, and a
picture counts from when it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.drawing import all_drawn
from clvr_jax.evaluation.layout import Folder
from clvr_jax.evaluation.shapes import Judge, shapes_judge
from clvr_jax.evaluation.statistics import clustered_interval
from clvr_jax.reasoning.images import pixels
from clvr_jax.reasoning.trajectory import Trajectory, best_step

TIME_POINTS = 16


@dataclass(frozen=True)
class Way:
    """One picture in the making: after each drawing, what is spent, and whether what would be returned is correct.

    Attributes:
      index: of the prompt.
      nfe: network evaluations up to and with each drawing.
      seconds: the same in time.
      correct: of the best picture so far, by the controller's verdicts.
    """

    index: int
    nfe: tuple[int, ...]
    seconds: tuple[float, ...]
    correct: tuple[bool, ...]

    def after(self, drawings: int) -> bool:
        """Whether the picture is correct that at most so many drawings give."""
        return bool(self.correct) and self.correct[min(drawings, len(self.correct)) - 1]

    def within(self, spent: Sequence[float], limit: float) -> bool:
        """Whether the picture is correct that is there before more than `limit` of `spent` is spent."""
        drawings = int(np.searchsorted(spent, limit, side="right"))
        return drawings > 0 and self.after(drawings)


@dataclass(frozen=True)
class Point:
    """Success under a limit, with its 95 % interval over prompts, and what was spent under it, means per picture."""

    limit: float
    accuracy: float
    low: float
    high: float
    nfe: float
    seconds: float


def read_off(folders: Mapping[str, Folder], on_progress: Callable[[int], None] | None = None) -> dict[str, Any]:
    """The curves of finished runs of the shapes world, where a program judges every picture on the way.

    Args:
      folders: of the runs, by the names of the systems.
      on_progress: called with the number of systems that are done.
    Returns: {"benchmark", "judge", "prompts", "systems": [{"name", "folder", "settings", "curves"}]}, for JSON; see
      `curves`.
    Raises: ClvrError for a run of another benchmark or other prompts, or one that is not finished.
    """
    judge, first = shapes_judge(), next(iter(folders.values())).identity()
    systems = []
    for number, (name, folder) in enumerate(folders.items(), start=1):
        identity = folder.identity()
        if identity["benchmark"] != "shapes":
            raise ClvrError(
                f"{folder.root}: a run of {identity['benchmark']}; every picture on the way is judged, which only the "
                "program of the shapes world does: give runs of clvr eval shapes"
            )
        if identity.get("metadata_sha256") != first.get("metadata_sha256"):
            raise ClvrError(f"{folder.root}: other prompts than {next(iter(folders))}; give runs on the same ones")
        found = curves(ways_of(folder, judge))
        systems.append({"name": name, "folder": str(folder.root), "settings": identity["settings"], "curves": found})
        if on_progress:
            on_progress(number)
    return {
        "benchmark": "shapes",
        "judge": {"name": judge.name, "version": judge.version},
        "prompts": first["prompts"],
        "systems": systems,
    }


def ways_of(folder: Folder, judge: Judge) -> list[Way]:
    """The way of every picture of a finished run.

    Args:
      folder: of the run; pictures without a trajectory were drawn in one go.
      judge: says what is correct.
    Raises: ClvrError if a picture, record or trajectory is missing.
    """
    identity, entries = folder.identity(), folder.metadata()
    places = all_drawn(folder, [entry["prompt"] for entry in entries], identity["seed"], identity["samples"])
    ways = []
    for index, sample in places:
        trajectory = folder.trajectory(index, sample)
        if trajectory is None:
            record = folder.record(index, sample)
            if not record.has_picture:
                ways.append(Way(index, (), (), ()))
            else:
                correct = judge.check(folder.picture(index, sample), entries[index]).correct
                ways.append(Way(index, (record.nfe or 0,), (record.seconds or 0.0,), (correct,)))
        else:
            ways.append(way_of(index, trajectory, entries[index], judge))
    return ways


def way_of(index: int, trajectory: Trajectory, metadata: Mapping[str, Any], judge: Judge) -> Way:
    """The way of one trajectory; every picture is judged once."""
    verdicts: dict[int, bool] = {}
    nfe, seconds, correct = [], [], []
    spent_nfe, spent_seconds = 0, 0.0
    for number, step in enumerate(trajectory.steps):
        spent_nfe += step.nfe
        spent_seconds += step.seconds
        if step.image is None:
            continue
        best = best_step(trajectory.steps[: number + 1])
        assert best is not None
        picture = trajectory.steps[best].image
        if best not in verdicts and picture is not None:
            verdicts[best] = judge.check(pixels(picture), metadata).correct
        nfe.append(spent_nfe)
        seconds.append(spent_seconds)
        correct.append(verdicts[best])
    return Way(index, tuple(nfe), tuple(seconds), tuple(correct))


def curves(ways: Sequence[Way]) -> dict[str, list[dict[str, float]]]:
    """Success under each limit: {"drawings", "nfe", "seconds"} -> points, for JSON.

    Limits are: every number of drawings that occurs; every sum of network evaluations that occurs, none if they were
    not counted; 16 times, evenly spread in their logarithm, from the first picture to the last.
    """
    drawn = [way for way in ways if way.correct]
    if not drawn:
        raise ClvrError("scaling: no picture was drawn, so there is nothing to read off")
    ends = min(way.seconds[0] for way in drawn), max(way.seconds[-1] for way in drawn)
    most = max(len(way.correct) for way in drawn)
    sums = sorted({spent for way in drawn for spent in way.nfe})
    times = np.geomspace(max(ends[0], 1e-3), max(ends[1], 1e-3) * (1 + 1e-9), TIME_POINTS)
    return {
        "drawings": [
            _point(ways, limit, [way.after(limit) for way in ways], [min(limit, len(way.nfe)) for way in ways])
            for limit in range(1, most + 1)
        ],
        "nfe": [_under(ways, limit, "nfe") for limit in sums if limit],
        "seconds": [_under(ways, float(limit), "seconds") for limit in times],
    }


def _under(ways: Sequence[Way], limit: float, kind: str) -> dict[str, float]:
    correct = [way.within(getattr(way, kind), limit) for way in ways]
    made = [int(np.searchsorted(getattr(way, kind), limit, side="right")) for way in ways]
    return _point(ways, limit, correct, made)


def _point(ways: Sequence[Way], limit: float, correct: Sequence[bool], made: Sequence[int]) -> dict[str, float]:
    prompts: dict[int, list[float]] = {}
    for way, right in zip(ways, correct, strict=True):
        prompts.setdefault(way.index, []).append(float(right))
    interval = clustered_interval(list(prompts.values()))
    spent = [
        (way.nfe[count - 1], way.seconds[count - 1]) if count else (0, 0.0)
        for way, count in zip(ways, made, strict=True)
    ]
    nfe, seconds = (float(np.mean(column)) for column in zip(*spent, strict=True))
    return asdict(Point(limit, interval.estimate, interval.low, interval.high, nfe, seconds))
