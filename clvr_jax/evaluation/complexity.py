"""The semantic complexity probe: how hard a prompt is by what it asks for, and how a system's success falls with it.

    C_task = a N log(1 + N) + b E + g w log(1 + W) + R_extra

with N things, E edges between them (relations and attributes) and W words.
Source: arXiv 2605.14876. It gives the formula, ten tiers and the area under pass against complexity. Ours, where it is
silent: natural logarithms; what counts as an edge and as R_extra in a metadata (`task_of`); all weights 1; tiers of
equally many prompts, prompts of the same complexity never in two of them; the trapezoid over complexity, as a share of
what a system without failures reaches, times 100; the two power laws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.statistics import clustered_interval

TIERS = 10


@dataclass(frozen=True)
class Weights:
    """a, b and g of the formula, and w, the weight of words, the same for all prompts."""

    things: float = 1.0
    edges: float = 1.0
    words: float = 1.0
    text: float = 1.0


@dataclass(frozen=True)
class Task:
    """What a prompt asks for.

    things: N. edges: E. words: W. extra: R_extra, what the rest does not count.
    """

    things: int
    edges: int
    words: int
    extra: float = 0.0

    def complexity(self, weights: Weights | None = None) -> float:
        """C_task."""
        weights = weights or Weights()
        return (
            weights.things * self.things * math.log1p(self.things)
            + weights.edges * self.edges
            + weights.words * weights.text * math.log1p(self.words)
            + self.extra
        )


def task_of(metadata: Mapping[str, Any]) -> Task:
    """What a metadata in GenEval's form asks for, that of the shapes world included.

    Things are counted one by one. An include item has an edge for each of color, position and place that it names, and
    one for a count other than 1. Every exclude item is an extra of 1.

    Args:
      metadata: with "include" and "prompt".
    Raises: ClvrError if it has no include list.
    """
    include = metadata.get("include")
    if not isinstance(include, list):
        raise ClvrError("complexity: the metadata has no include list, so what it asks for is unknown")
    edges = sum(sum(key in item for key in ("color", "position", "place")) + (item["count"] != 1) for item in include)
    return Task(
        things=sum(item["count"] for item in include),
        edges=edges,
        words=len(metadata["prompt"].split()),
        extra=float(len(metadata.get("exclude", ()))),
    )


@dataclass(frozen=True)
class Tier:
    """Prompts of like complexity: its mean, how many they are, and the share that passes with its 95 % interval."""

    complexity: float
    prompts: int
    passed: float
    low: float
    high: float


def tiers_of(complexities: Sequence[float], count: int = TIERS) -> list[int]:
    """The tier of every prompt, from 0, easy ones first: equally many in each, as far as equal complexity allows.

    A prompt's tier follows from how many are easier, so that equal ones share it; some tiers may then be empty.
    """
    ordered = np.sort(np.asarray(complexities, dtype=np.float64))
    return [int(np.searchsorted(ordered, value)) * count // len(ordered) for value in complexities]


def pass_curve(complexities: Sequence[float], scores: Sequence[Sequence[float]], count: int = TIERS) -> list[Tier]:
    """Success against complexity, easy tiers first.

    Args:
      complexities: of the prompts.
      scores: of the pictures of each prompt, 0 to 1.
      count: of tiers; empty ones are left out.
    """
    if len(complexities) != len(scores) or not scores:
        raise ClvrError(f"pass curve: {len(complexities)} complexities but {len(scores)} prompts with scores")
    places = tiers_of(complexities, count)
    curve = []
    for tier in sorted(set(places)):
        own = [index for index, place in enumerate(places) if place == tier]
        interval = clustered_interval([scores[index] for index in own])
        mean = float(np.mean([complexities[index] for index in own]))
        curve.append(Tier(mean, len(own), interval.estimate, interval.low, interval.high))
    return curve


def area(curve: Sequence[Tier]) -> float:
    """The area under a pass curve between its first and last tier, 100 for a system that never fails."""
    if len(curve) == 1:
        return 100 * curve[0].passed
    x, y = [tier.complexity for tier in curve], [tier.passed for tier in curve]
    return float(100 * np.trapezoid(y, x) / (x[-1] - x[0]))


@dataclass(frozen=True)
class PowerLaw:
    """y = factor x^exponent, and the share of the variance of log y that it explains."""

    factor: float
    exponent: float
    r_squared: float


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """Least squares in logarithms; None for fewer than three points, or for values that are not positive or all equal.

    Args:
      x, y: the points.
    """
    if len(x) < 3 or min(x) <= 0 or min(y) <= 0 or min(x) == max(x):
        return None
    log_x, log_y = np.log(x), np.log(y)
    exponent, offset = np.polyfit(log_x, log_y, 1)
    spread = float(((log_y - log_y.mean()) ** 2).sum())
    rest = float(((log_y - offset - exponent * log_x) ** 2).sum())
    return PowerLaw(float(np.exp(offset)), float(exponent), 1 - rest / spread if spread else 1.0)


def failure_law(curve: Sequence[Tier]) -> PowerLaw | None:
    """The odds of failure against complexity; half a failure and half a success are added to each tier."""
    odds = [(tier.prompts * (1 - tier.passed) + 0.5) / (tier.prompts * tier.passed + 0.5) for tier in curve]
    return power_law([tier.complexity for tier in curve], odds)


def probe(complexities: Sequence[float], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The probe of one system, for JSON.

    Args:
      complexities: of the prompts.
      scores: of the pictures of each prompt, 0 to 1.
    Returns: {"area", "tiers": [Tier], "failure_law": PowerLaw or None, "half_fails_at": the complexity at which by that
      law half of the prompts fail, None if that is not between the first and the last tier}.
    """
    curve = pass_curve(complexities, scores)
    law = failure_law(curve)
    half = law.factor ** (-1 / law.exponent) if law and law.exponent > 0 else math.inf
    return {
        "area": area(curve),
        "tiers": [asdict(tier) for tier in curve],
        "failure_law": asdict(law) if law else None,
        "half_fails_at": half if curve[0].complexity <= half <= curve[-1].complexity else None,
    }
