"""Metrics of verifiers: false accepts and false rejects, reading accuracy, ROC AUC and calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from scipy.stats import rankdata

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.statistics import Interval, Rate, RateResult, wilson_interval
from clvr_jax.evaluation.verifier.cases import Case
from clvr_jax.evaluation.verifier.reading import agreement
from clvr_jax.files.json_input import JSON
from clvr_jax.reasoning.verification.verification import Verification

CALIBRATION_BINS = 10


@dataclass(frozen=True)
class CheckedCase:
    """A case with the answer of the verifier.

    Attributes:
      case: prompt, image and label.
      verification: the answer; None if there is none.
      problem: why there is no answer.
    """

    case: Case
    verification: Verification | None
    problem: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the verifier accepts the image; an image without a verdict is not accepted."""
        return self.verification is not None and self.verification.accepted is True

    @property
    def has_verdict(self) -> bool:
        """Whether the verifier accepts or rejects the image."""
        return self.verification is not None and self.verification.accepted is not None

    @property
    def probability(self) -> float | None:
        """Probability of meeting the prompt; None if the verifier gives none."""
        return None if self.verification is None else self.verification.probability

    def to_dict(self) -> dict[str, JSON]:
        """Returns the case and the answer as JSON values, without the image."""
        case = {each.name: getattr(self.case, each.name) for each in dataclasses.fields(Case) if each.name != "image"}
        answer = None if self.verification is None else self.verification.to_dict()
        verdict = {"accepted": None if self.verification is None else self.verification.accepted}
        return {**case, **verdict, "probability": self.probability, "verification": answer, "problem": self.problem}


def roc_auc(labels: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Area under the ROC curve: the probability that a right case scores higher than a wrong one; ties count half.

    Returns: None if all labels are equal.
    Source: Mann and Whitney 1947; Hanley and McNeil 1982.
    """
    if len(labels) != len(scores):
        raise ClvrError(f"ROC AUC: {len(labels)} labels but {len(scores)} scores")
    right = np.asarray(labels, dtype=bool)
    positives = int(right.sum())
    negatives = len(right) - positives
    if not positives or not negatives:
        return None
    ranks = rankdata(np.asarray(scores, dtype=np.float64))
    return float((ranks[right].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def calibration_error(
    labels: Sequence[bool], probabilities: Sequence[float], bins: int = CALIBRATION_BINS
) -> float | None:
    """Expected calibration error: mean distance of probability and share of right cases over bins of equal width.

    Args:
      labels: whether each case is right.
      probabilities: of being right, in [0, 1].
      bins: number of bins of [0, 1]; 1 belongs to the last.
    Returns: None without cases.
    Source: Naeini, Cooper and Hauskrecht 2015; Guo et al. 2017.
    """
    if len(labels) != len(probabilities):
        raise ClvrError(f"calibration error: {len(labels)} labels but {len(probabilities)} probabilities")
    if not len(labels):
        return None
    right, values = np.asarray(labels, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ClvrError("calibration error: probabilities must lie between 0 and 1")
    which = np.minimum((values * bins).astype(int), bins - 1)
    gaps = np.bincount(which, values - right, bins)
    return float(np.abs(gaps).sum() / len(right))


class ShareResult(TypedDict):
    """The JSON value of a share without an interval."""

    count: int
    of: int
    rate: float
    interval: None


class Metrics(TypedDict):
    """The metrics of a set of cases; None where nothing is counted."""

    images: int
    without_verdict: int
    false_accept: RateResult | None
    false_reject: RateResult | None
    read_exactly: RateResult | None
    cells_read: ShareResult | None
    roc_auc: float | None
    calibration_error: float | None
    with_probability: int


class GroupMetrics(Metrics):
    """The metrics of a group, also by kind, by number of objects, and for held-out and other pairs."""

    kinds: dict[str, Metrics]
    objects: dict[str, Metrics]
    held_out: dict[str, Metrics]


class RequirementMetrics(TypedDict):
    """How many prompts have exactly the right derived requirements, and for how many none could be derived."""

    exact: RateResult | None
    not_derived: int


class Summary(TypedDict):
    """The summary of results.json."""

    groups: dict[str, GroupMetrics]
    all: Metrics
    requirements: RequirementMetrics | None


# --- summary ----------------------------------------------------------------------------------------------------------


def summarize(checked: Sequence[CheckedCase], derived: Sequence[tuple[Case, Sequence[str] | None]]) -> Summary:
    """Computes the summary of results.json, ready for JSON.

    Args:
      checked: all cases.
      derived: one case for each prompt with exact requirements, and the requirements that the verifier derives from
        the prompt, None if it derives none.
    Returns: {"groups": {name: metrics}, "all": metrics, "requirements": {"exact": rate, "not_derived": number} or None}
      with metrics = {"images", "without_verdict", "false_accept": rate, "false_reject": rate, "read_exactly": rate,
      "cells_read": rate, "roc_auc", "calibration_error", "with_probability": number, "kinds": {kind: metrics},
      "objects": {number: metrics}, "held_out": {"held_out": metrics, "others": metrics}}, the last three for groups
      only, and rate = {"count", "of", "rate", "interval"}, None where nothing is counted. Intervals are 95 %: Wilson's,
      with the images of a prompt taken as a cluster.
    """
    groups = _by(checked, lambda each: each.case.group)
    return {
        "groups": {name: _group(members) for name, members in groups.items()},
        "all": _metrics(checked),
        "requirements": _requirements(derived),
    }


def _group(checked: Sequence[CheckedCase]) -> GroupMetrics:
    shapes = [each for each in checked if each.case.tier is not None]
    held_out = _by(shapes, lambda each: "held_out" if each.case.has_held_out else "others")
    objects = _by(sorted(shapes, key=lambda each: each.case.tier or 0), lambda each: str(each.case.tier))
    return {
        **_metrics(checked),
        "kinds": _each(_by(checked, lambda each: each.case.kind)),
        "objects": _each(objects),
        "held_out": _each({name: held_out[name] for name in ("held_out", "others") if name in held_out}),
    }


def _each(groups: dict[str, list[CheckedCase]]) -> dict[str, Metrics]:
    return {name: _metrics(members) for name, members in groups.items()}


def _metrics(checked: Sequence[CheckedCase]) -> Metrics:
    right = [each for each in checked if each.case.label]
    wrong = [each for each in checked if not each.case.label]
    known = [(each.case.label, each.probability) for each in checked if each.probability is not None]
    labels, probabilities = [label for label, _ in known], [value for _, value in known if value is not None]
    read = [
        (each.case.prompt, agreement(each.verification.description, each.case.description))
        for each in checked
        if each.case.description is not None and each.verification is not None and each.verification.mode == "describe"
    ]
    return {
        "images": len(checked),
        "without_verdict": sum(not each.has_verdict for each in checked),
        "false_accept": _rate((each.case.prompt, each.accepted) for each in wrong),
        "false_reject": _rate((each.case.prompt, not each.accepted) for each in right),
        "read_exactly": _rate((prompt, found.is_exact) for prompt, found in read),
        "cells_read": _share(sum(found.correct for _, found in read), sum(found.cells for _, found in read)),
        "roc_auc": roc_auc(labels, probabilities),
        "calibration_error": calibration_error(labels, probabilities),
        "with_probability": len(known),
    }


def _requirements(derived: Sequence[tuple[Case, Sequence[str] | None]]) -> RequirementMetrics | None:
    exact = [(case.prompt, found is not None and set(found) == set(case.requirements or ())) for case, found in derived]
    if not exact:
        return None
    return {"exact": _rate(exact), "not_derived": sum(found is None for _, found in derived)}


def _rate(outcomes: Iterable[tuple[str, bool]]) -> RateResult | None:
    """Returns the share of outcomes (prompt, whether it occurred), with an interval over prompts."""
    prompts: dict[str, list[float]] = {}
    for prompt, occurred in outcomes:
        prompts.setdefault(prompt, []).append(float(occurred))
    if not prompts:
        return None
    scores = [score for own in prompts.values() for score in own]
    return Rate(int(sum(scores)), len(scores), _interval(list(prompts.values()))).to_json()


def _interval(prompts: Sequence[Sequence[float]]) -> Interval:
    """Wilson's interval of a share, for the effective number of images; images of one prompt are not independent.

    Equals `clustered_interval` if all prompts have as many images, and is Wilson's own if they have one.

    Source: Kish 1965 (design effect).
    """
    images = sum(map(len, prompts))
    share = sum(map(sum, prompts)) / images
    most = sum(len(own) ** 2 for own in prompts) / images
    independent = share * (1 - share) * images
    between = sum((sum(own) - share * len(own)) ** 2 for own in prompts) * len(prompts) / max(len(prompts) - 1, 1)
    effect = min(max(between / independent, 1.0), most) if independent and between else most
    return wilson_interval(share * images / effect, images / effect)


def _share(count: int, total: int) -> ShareResult | None:
    return {"count": count, "of": total, "rate": count / total, "interval": None} if total else None


def _by(checked: Sequence[CheckedCase], key: Callable[[CheckedCase], str]) -> dict[str, list[CheckedCase]]:
    groups: dict[str, list[CheckedCase]] = {}
    for each in checked:
        groups.setdefault(key(each), []).append(each)
    return groups
