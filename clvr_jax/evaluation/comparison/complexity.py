"""The semantic complexity probe: the complexity of prompts, and the pass rate of a system against it.

    C_task = a N log(1 + N) + b E + g w log(1 + W) + R_extra

with N objects, E edges (relations and attributes) and W words.
Source: arXiv 2605.14876. It defines the formula, ten tiers and the area under pass rate against complexity. The rest is
our choice: natural logarithms; the definition of an edge and of R_extra in metadata (`task_from_metadata`); all weights
1; tiers with equal numbers of prompts, in which prompts of the same complexity share a tier; the area by the trapezoid
rule, relative to a system without failures, times 100; the two power laws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.statistics import clustered_interval
from clvr_jax.files.json_input import UncheckedJSON

TIERS = 10


@dataclass(frozen=True)
class Weights:
    """Weights of the formula: a (objects), b (edges), g (words) and w (text), the same for all prompts."""

    objects: float = 1.0
    edges: float = 1.0
    words: float = 1.0
    text: float = 1.0


@dataclass(frozen=True)
class Task:
    """The content of a prompt, in the terms of the formula.

    Attributes:
      objects: N, number of objects.
      edges: E, number of relations and attributes.
      words: W, number of words.
      extra: R_extra, for requirements that the other terms do not count.
    """

    objects: int
    edges: int
    words: int
    extra: float = 0.0

    def complexity(self, weights: Weights | None = None) -> float:
        """Returns C_task."""
        weights = weights or Weights()
        return (
            weights.objects * self.objects * math.log1p(self.objects)
            + weights.edges * self.edges
            + weights.words * weights.text * math.log1p(self.words)
            + self.extra
        )


def task_from_metadata(metadata: UncheckedJSON) -> Task:
    """Counts objects, edges and words of metadata in GenEval's form, or in that of the shapes world.

    An include item has an edge for each of the keys color, position and place, and one for a count other than 1. Each
    exclude item adds 1 to R_extra.

    Args:
      metadata: with "include" and "prompt".
    Raises: ClvrError if it has no include list.
    """
    include = metadata.get("include")
    if not isinstance(include, list):
        raise ClvrError("complexity: the metadata has no include list; give metadata in GenEval's format")
    edges = sum(sum(key in item for key in ("color", "position", "place")) + (item["count"] != 1) for item in include)
    return Task(
        objects=sum(item["count"] for item in include),
        edges=edges,
        words=len(metadata["prompt"].split()),
        extra=float(len(metadata.get("exclude", ()))),
    )


class TierResult(TypedDict):
    """The JSON value of a `Tier`."""

    complexity: float
    prompts: int
    passed: float
    low: float
    high: float


@dataclass(frozen=True)
class Tier:
    """A tier of prompts: mean complexity, number of prompts, and pass rate with its 95 % interval."""

    complexity: float
    prompts: int
    passed: float
    low: float
    high: float

    def to_json(self) -> TierResult:
        """Returns the JSON value."""
        return {
            "complexity": self.complexity,
            "prompts": self.prompts,
            "passed": self.passed,
            "low": self.low,
            "high": self.high,
        }


def assign_tiers(complexities: Sequence[float], count: int = TIERS) -> list[int]:
    """Returns the tier of each prompt, from 0 for the easiest; without ties, tiers have equal sizes.

    Prompts of the same complexity share a tier, so some tiers may be empty.
    """
    ordered = np.sort(np.asarray(complexities, dtype=np.float64))
    return [int(np.searchsorted(ordered, value)) * count // len(ordered) for value in complexities]


def pass_curve(complexities: Sequence[float], scores: Sequence[Sequence[float]], count: int = TIERS) -> list[Tier]:
    """Returns the pass rate against complexity, easiest tier first.

    Args:
      complexities: of the prompts.
      scores: of the images of each prompt, 0 to 1.
      count: number of tiers; empty ones are left out.
    Raises: ClvrError if there are no scores, or not one complexity per prompt.
    """
    if len(complexities) != len(scores) or not scores:
        raise ClvrError(f"pass curve: {len(complexities)} complexities but {len(scores)} prompts with scores")
    tiers = assign_tiers(complexities, count)
    curve = []
    for tier in sorted(set(tiers)):
        own = [index for index, position in enumerate(tiers) if position == tier]
        interval = clustered_interval([scores[index] for index in own])
        mean = float(np.mean([complexities[index] for index in own]))
        curve.append(Tier(mean, len(own), interval.estimate, interval.low, interval.high))
    return curve


def area(curve: Sequence[Tier]) -> float:
    """Returns the area under a pass curve between its first and last tier, 100 for a system that never fails."""
    if len(curve) == 1:
        return 100 * curve[0].passed
    x, y = [tier.complexity for tier in curve], [tier.passed for tier in curve]
    return float(100 * np.trapezoid(y, x) / (x[-1] - x[0]))


class PowerLawResult(TypedDict):
    """The JSON value of a `PowerLaw`."""

    factor: float
    exponent: float
    r_squared: float


@dataclass(frozen=True)
class PowerLaw:
    """A power law y = factor x^exponent, and the share of the variance of log y that it explains."""

    factor: float
    exponent: float
    r_squared: float

    def to_json(self) -> PowerLawResult:
        """Returns the JSON value."""
        return {"factor": self.factor, "exponent": self.exponent, "r_squared": self.r_squared}


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """Fits a power law by least squares in logarithms.

    Args:
      x, y: the points.
    Returns: None for fewer than three points, for values that are not positive, or if all x are equal.
    """
    if len(x) < 3 or min(x) <= 0 or min(y) <= 0 or min(x) == max(x):
        return None
    log_x, log_y = np.log(x), np.log(y)
    exponent, offset = np.polyfit(log_x, log_y, 1)
    spread = float(((log_y - log_y.mean()) ** 2).sum())
    rest = float(((log_y - offset - exponent * log_x) ** 2).sum())
    return PowerLaw(float(np.exp(offset)), float(exponent), 1 - rest / spread if spread else 1.0)


def failure_law(curve: Sequence[Tier]) -> PowerLaw | None:
    """Fits the odds of failure against complexity, with half a failure and half a success added to each tier."""
    odds = [(tier.prompts * (1 - tier.passed) + 0.5) / (tier.prompts * tier.passed + 0.5) for tier in curve]
    return power_law([tier.complexity for tier in curve], odds)


class Probe(TypedDict):
    """The complexity probe of one system; see `probe`."""

    area: float
    tiers: list[TierResult]
    failure_law: PowerLawResult | None
    half_fails_at: float | None


def probe(complexities: Sequence[float], scores: Sequence[Sequence[float]]) -> Probe:
    """Computes the complexity probe of one system, for JSON.

    Args:
      complexities: of the prompts.
      scores: of the images of each prompt, 0 to 1.
    Returns: {"area", "tiers": [Tier], "failure_law": PowerLaw or None, "half_fails_at": the complexity at which half of
      the prompts fail by that law, None if it is not between the first and the last tier}.
    """
    curve = pass_curve(complexities, scores)
    law = failure_law(curve)
    half = law.factor ** (-1 / law.exponent) if law and law.exponent > 0 else math.inf
    return {
        "area": area(curve),
        "tiers": [tier.to_json() for tier in curve],
        "failure_law": law.to_json() if law else None,
        "half_fails_at": half if curve[0].complexity <= half <= curve[-1].complexity else None,
    }
