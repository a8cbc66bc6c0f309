"""The cost of images: means per image, and one line for tables."""

from __future__ import annotations

import statistics as descriptive
from collections.abc import Mapping, Sequence
from typing import Any

COSTS = ("nfe", "seconds", "steps", "outcome", "input_tokens", "output_tokens", "dollars", "device")
"""The fields of `Record.cost`, and of the images in results.json."""


def mean_cost(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns means per image and total dollars. The mean time includes compilation, the median time hardly does.

    costs: for each image the fields of COSTS; those that are missing or None were not recorded.
    """
    seconds = _recorded(costs, "seconds")
    means = {
        f"{name}_per_picture": descriptive.fmean(values) if (values := _recorded(costs, name)) else None
        for name in ("nfe", "seconds", "input_tokens", "output_tokens")
    }
    dollars = _recorded(costs, "dollars")
    return {
        **means,
        "median_seconds_per_picture": descriptive.median(seconds) if seconds else None,
        "dollars": sum(dollars) if dollars else None,
        "steps": _counts(costs, "steps"),
        "outcomes": _counts(costs, "outcome"),
        "devices": _counts(costs, "device"),
    }


def cost_line(cost: Mapping[str, Any]) -> str:
    """Returns one line on network evaluations, time, tokens, dollars, steps, outcomes and devices."""
    parts = []
    if cost["nfe_per_picture"] is not None:
        parts.append(f"{cost['nfe_per_picture']:.1f} NFE per image")
    if cost["seconds_per_picture"] is not None:
        parts.append(
            f"{cost['seconds_per_picture']:.2f} s per image (median {cost['median_seconds_per_picture']:.2f} s)"
        )
    tokens = [cost.get(f"{side}_tokens_per_picture") for side in ("input", "output")]
    if any(tokens):
        parts.append(" + ".join(f"{count or 0:.0f}" for count in tokens) + " tokens per image (input + output)")
    if cost.get("dollars"):
        parts.append(f"${cost['dollars']:.2f} in total")
    for name in ("steps", "outcomes", "devices"):
        if cost.get(name):
            parts.append(f"{name}: " + ", ".join(f"{key} x {count}" for key, count in cost[name].items()))
    return "; ".join(parts) or "cost not recorded"


def _recorded(costs: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return [value for cost in costs if (value := cost.get(name)) is not None]


def _counts(costs: Sequence[Mapping[str, Any]], name: str) -> dict[str, int]:
    values = _recorded(costs, name)
    return {str(value): values.count(value) for value in sorted(set(values))}
