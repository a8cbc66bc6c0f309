"""Confidence intervals and paired tests for the scores of benchmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypedDict, TypeVar

import numpy as np

from clvr_jax.errors import ClvrError

T = TypeVar("T")

_RESAMPLES_AT_ONCE = 256


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float


class RateResult(TypedDict):
    """The JSON value of a rate; its interval is [low, high]."""

    count: int
    of: int
    rate: float
    interval: list[float]


@dataclass(frozen=True)
class Rate:
    """The share of cases in which something occurs, with its interval."""

    count: int
    of: int
    interval: Interval

    def to_json(self) -> RateResult:
        """Returns {"count", "of", "rate", "interval": [low, high]}."""
        bounds = [self.interval.low, self.interval.high]
        return {"count": self.count, "of": self.of, "rate": self.count / self.of, "interval": bounds}


@dataclass(frozen=True)
class SignTest:
    """The pairs that each side wins, without ties, and the two-sided p-value of "both win equally often"."""

    first_wins: int
    second_wins: int
    p_value: float


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """Returns at most `limit` of the items, evenly spaced, so that a short run has every tag; all if None."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def wilson_interval(successes: float, trials: float, confidence: float = 0.95) -> Interval:
    """Returns Wilson's score interval of a proportion, without continuity correction.

    Args:
      successes: 0 .. trials.
      trials: at least 1; an effective number of trials need not be an integer.
      confidence: two-sided, in (0, 1).
    Source: Wilson 1927; Newcombe 1998, method 3.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ClvrError(f"Wilson interval: needs 0 <= successes <= trials and trials >= 1, got {successes} of {trials}")
    z = _quantile(confidence)
    share = successes / trials
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # The formula gives the bounds 0 and 1 only up to rounding.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == trials else center + half
    return Interval(share, low, high)


def clustered_interval(scores: Sequence[Sequence[float]], seed: int = 0, confidence: float = 0.95) -> Interval:
    """Returns the mean over prompts of the mean score of their images, with an interval.

    Prompts are independent, the images of one prompt are not. Scores of 0 and 1 have Wilson's interval for an effective
    number of images: the number of images divided by the design effect, which is the variance over prompts relative to
    that of independent images. The design effect is at least 1 and at most the number of images per prompt, which is
    also its value if all prompts have the same mean. With one image per prompt this is Wilson's interval itself. Other
    scores have a percentile bootstrap interval over prompts.

    Args:
      scores: of the images of each prompt; at least one prompt with at least one image each.
      seed: of the bootstrap.
      confidence: two-sided, in (0, 1).
    Source: Kish 1965 (design effect); Korn and Graubard 1998 (effective sample size in an interval of a proportion).
    """
    if not scores or not all(scores):
        raise ClvrError("interval over prompts: give at least one prompt, and at least one score for each prompt")
    means = np.asarray([np.mean(own) for own in scores], dtype=np.float64)
    if any(value not in (0, 1) for own in scores for value in own):
        return paired_bootstrap([0.0] * len(means), means.tolist(), seed=seed, confidence=confidence)
    images = sum(map(len, scores))
    share, most = float(means.mean()), images / len(scores)
    independent = share * (1 - share) / images
    seen = float(means.var(ddof=1)) / len(means) if len(means) > 1 else 0.0
    effect = min(max(seen / independent, 1.0), most) if independent and seen else most
    trials = images / effect
    return wilson_interval(share * trials, trials, confidence)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrects p-values for their number, so that the probability of any false positive is controlled.

    Source: Holm 1979.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def weighted_mean(parts: Sequence[Interval], weights: Sequence[float] | None = None) -> Interval:
    """Returns the mean of independent estimates, such as GenEval's mean over tags, with an interval.

    Args:
      parts: the estimates with their intervals.
      weights: one for each part, normalized by their sum; equal weights if None.
    Returns: the mean; its interval adds the squared distances of the weighted intervals' bounds.
    Source: method of variance estimates recovery (Zou and Donner 2008; Newcombe 1998, method 10).
    """
    weights = [1.0] * len(parts) if weights is None else weights
    if not parts or len(parts) != len(weights) or sum(weights) <= 0:
        raise ClvrError(f"weighted mean: needs parts with weights, got {len(parts)} parts and {len(weights)} weights")
    weighted, total = list(zip(weights, parts, strict=True)), sum(weights)
    mean = sum(weight * part.estimate for weight, part in weighted) / total
    below = math.sqrt(sum((weight * (part.estimate - part.low)) ** 2 for weight, part in weighted)) / total
    above = math.sqrt(sum((weight * (part.high - part.estimate)) ** 2 for weight, part in weighted)) / total
    return Interval(mean, mean - below, mean + above)


def sign_test(first: Sequence[float], second: Sequence[float]) -> SignTest:
    """Runs the exact two-sided sign test on paired scores; for scores of 0 and 1 this is McNemar's exact test.

    Args:
      first, second: scores of two systems on the same prompts, in the same order.
    Source: McNemar 1947, with the binomial distribution instead of the chi-squared approximation.
    """
    if len(first) != len(second):
        raise ClvrError(f"sign test: scores must be paired, got {len(first)} and {len(second)}")
    first_wins = sum(a > b for a, b in zip(first, second, strict=True))
    second_wins = sum(a < b for a, b in zip(first, second, strict=True))
    decided = first_wins + second_wins
    tail = sum(math.comb(decided, wins) for wins in range(min(first_wins, second_wins) + 1))
    # Integers are exact for any number of pairs; 0.5**decided would underflow.
    p_value = 1.0 if 2 * tail >= 2**decided else 2 * tail / 2**decided
    return SignTest(first_wins, second_wins, p_value)


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    groups: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Returns the difference of means, second - first, with a percentile bootstrap interval over pairs.

    Args:
      first, second: scores of two systems on the same prompts, in the same order; at least one pair.
      groups: the group (tag) of each pair; the difference is then the unweighted mean of the groups' differences, and
        pairs are resampled within their group. None puts all pairs into one group.
      seed: of the resampling; the same seed gives the same interval.
      resamples: number of bootstrap samples.
      confidence: two-sided, in (0, 1).
    Source: Efron and Tibshirani 1993, percentile interval, stratified.
    """
    if len(first) != len(second) or not first:
        raise ClvrError(f"paired bootstrap: scores must be paired and not empty, got {len(first)} and {len(second)}")
    if groups is not None and len(groups) != len(first):
        raise ClvrError(f"paired bootstrap: {len(first)} pairs but {len(groups)} groups")
    _quantile(confidence)
    difference = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    labels = np.asarray(groups if groups is not None else ["all"] * len(first))
    members = [difference[labels == label] for label in sorted(set(labels.tolist()))]
    rng = np.random.default_rng(seed)
    samples = np.zeros(resamples)
    for group in members:
        for start in range(0, resamples, _RESAMPLES_AT_ONCE):
            rows = min(_RESAMPLES_AT_ONCE, resamples - start)
            picks = rng.integers(len(group), size=(rows, len(group)))
            samples[start : start + rows] += group[picks].mean(axis=1) / len(members)
    tail = (1 - confidence) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return Interval(float(np.mean([group.mean() for group in members])), float(low), float(high))


def _quantile(confidence: float) -> float:
    """Returns the normal quantile of a two-sided confidence level."""
    if not 0 < confidence < 1:
        raise ClvrError(f"confidence must be between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)
