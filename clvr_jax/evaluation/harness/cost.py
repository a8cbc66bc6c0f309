"""The cost of images: means per image, and one line for tables."""

from __future__ import annotations

import statistics as descriptive
from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

from clvr_jax.evaluation.harness.results import CostSummary, ImageCost

T = TypeVar("T")
K = TypeVar("K", int, str)

COSTS = ("nfe", "seconds", "steps", "outcome", "input_tokens", "output_tokens", "dollars", "device")
"""The fields of `Record.cost`, and of the images in results.json."""


def mean_cost(costs: Sequence[ImageCost]) -> CostSummary:
    """Returns means per image and total dollars. The mean time includes compilation, the median time hardly does.

    costs: for each image the fields of COSTS; those that are missing or None were not recorded.
    """
    seconds = _recorded(cost.get("seconds") for cost in costs)
    dollars = _recorded(cost.get("dollars") for cost in costs)
    return {
        "nfe_per_picture": _mean(costs, "nfe"),
        "seconds_per_picture": _mean(costs, "seconds"),
        "input_tokens_per_picture": _mean(costs, "input_tokens"),
        "output_tokens_per_picture": _mean(costs, "output_tokens"),
        "median_seconds_per_picture": descriptive.median(seconds) if seconds else None,
        "dollars": sum(dollars) if dollars else None,
        "steps": _counts(_recorded(cost.get("steps") for cost in costs)),
        "outcomes": _counts(_recorded(cost.get("outcome") for cost in costs)),
        "devices": _counts(_recorded(cost.get("device") for cost in costs)),
    }


def cost_line(cost: CostSummary) -> str:
    """Returns one line on network evaluations, time, tokens, dollars, steps, outcomes and devices."""
    parts = []
    if cost["nfe_per_picture"] is not None:
        parts.append(f"{cost['nfe_per_picture']:.1f} NFE per image")
    if cost["seconds_per_picture"] is not None:
        parts.append(
            f"{cost['seconds_per_picture']:.2f} s per image (median {cost['median_seconds_per_picture']:.2f} s)"
        )
    tokens = [cost.get("input_tokens_per_picture"), cost.get("output_tokens_per_picture")]
    if any(tokens):
        parts.append(" + ".join(f"{count or 0:.0f}" for count in tokens) + " tokens per image (input + output)")
    if dollars := cost.get("dollars"):
        parts.append(f"${dollars:.2f} in total")
    for name, counts in (
        ("steps", cost.get("steps")),
        ("outcomes", cost.get("outcomes")),
        ("devices", cost.get("devices")),
    ):
        if counts:
            parts.append(f"{name}: " + ", ".join(f"{key} x {count}" for key, count in counts.items()))
    return "; ".join(parts) or "cost not recorded"


def _mean(costs: Sequence[ImageCost], name: Literal["nfe", "seconds", "input_tokens", "output_tokens"]) -> float | None:
    values = _recorded(cost.get(name) for cost in costs)
    return descriptive.fmean(values) if values else None


def _recorded(values: Iterable[T | None]) -> list[T]:
    return [value for value in values if value is not None]


def _counts(values: Sequence[K]) -> dict[str, int]:
    return {str(value): values.count(value) for value in sorted(set(values))}
