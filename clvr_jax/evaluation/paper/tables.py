"""Results as lines of Markdown; intervals over prompts, differences paired by prompt, as in `clvr eval compare`."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clvr_jax.convert.model_card import markdown_table
from clvr_jax.evaluation.compare import by_prompt, compare
from clvr_jax.evaluation.complexity import probe, task_of
from clvr_jax.evaluation.contest import Contestant
from clvr_jax.evaluation.paper.rows import joined
from clvr_jax.evaluation.statistics import Interval, clustered_interval, holm

Metadata = Mapping[str, Any]
Found = Mapping[str, Mapping[str, Contestant]]
"""Name of a row -> split -> its results."""


def systems_table(labels: Mapping[str, str], found: Found, reference: str) -> list[str]:
    """A line for each system: accuracy on each split, its difference to one of them on all prompts, and its cost.

    Args:
      labels: name of a row -> what it is called; the order of the lines.
      found: their results, all on the same splits.
      reference: the name of the row that the others are compared with.
    """
    splits = list(found[reference])
    head = ("", *(f"`{split}`" for split in splits), f"minus {labels[reference]}", "p", "NFE", "seconds")
    rows = []
    for name, label in labels.items():
        accuracies = (written(accuracy(found[name][split].pooled)) for split in splits)
        difference, p_value = "", ""
        if name != reference:
            part = compare(joined(found[reference]), joined(found[name]))["overall"]
            difference, p_value = signed(part), f"{part['p_value']:.2g}"
        nfe, seconds = (mean_cost(found[name][splits[-1]], key) for key in ("nfe", "median_seconds"))
        rows.append((label, *accuracies, difference, p_value, f"{nfe:.1f}", f"{seconds:.2f}"))
    return markdown_table(head, rows)


def tiers_table(labels: Mapping[str, str], found: Found, metadata: Mapping[str, Sequence[Metadata]]) -> list[str]:
    """Accuracy by number of objects, and the complexity probe's area on all prompts, a column for each system.

    metadata: split -> prompts, in the order of the results.
    """
    curves = {name: by_tier(found[name]["complex"].pooled) for name in labels}
    rows = [
        (f"{tier} objects", *(written(curve[tier]) for curve in curves.values()))
        for tier in next(iter(curves.values()))
    ]
    complexities = [task_of(entry).complexity() for split in metadata for entry in metadata[split]]
    areas = []
    for name in labels:
        scores = [row["scores"] for _, row in sorted(by_prompt(joined(found[name])).items())]
        areas.append(f"{probe(complexities, scores)['area']:.1f}")
    return markdown_table(("", *labels.values()), [*rows, ("area of the probe", *areas)])


def accuracy(pooled: Mapping[str, Any]) -> Interval:
    """The share of prompts that are drawn right."""
    return clustered_interval([row["scores"] for row in by_prompt(pooled).values()])


def by_tier(pooled: Mapping[str, Any]) -> dict[int, Interval]:
    """Number of objects -> `accuracy`."""
    groups: dict[int, list[Sequence[float]]] = {}
    for row in by_prompt(pooled).values():
        groups.setdefault(row["tier"], []).append(row["scores"])
    return {tier: clustered_interval(scores) for tier, scores in sorted(groups.items())}


def mean_cost(one: Contestant, key: str) -> float:
    """A cost per picture of `report.summarize`, mean over the seeds; NaN where it was not recorded."""
    costs = [run["summary"]["cost"][f"{key}_per_picture"] for run in one.runs]
    return float("nan") if None in costs else statistics.fmean(costs)


def groups_table(
    first: Mapping[str, Contestant], second: Mapping[str, Contestant], names: tuple[str, str]
) -> list[str]:
    """Two systems by tag and number of objects. first, second: split -> results."""
    rows = []
    for split in first:
        comparison = compare(first[split].pooled, second[split].pooled)
        tiers = [(f"{tier} objects", part) for tier, part in comparison["tiers"].items()]
        for name, part in [*comparison["tags"].items(), *tiers]:
            means = short(part["first"]), short(part["second"])
            rows.append((name.replace("_", " "), str(part["prompts"]), *means, signed(part), f"{part['p_value']:.2g}"))
    return markdown_table(("", "prompts", *names, "difference", "p"), rows)


def by_phrasing(first: Contestant, second: Contestant, metadata: Sequence[Metadata]) -> dict[str, dict[str, Any]]:
    """`compare`'s part for each tag and phrasing: {"counting, phrasing 3": part}.

    metadata: of the prompts, in the order of the results.
    """

    def renamed(pooled: Mapping[str, Any]) -> dict[str, Any]:
        pictures = [
            {**entry, "tag": f"{entry['tag']}, phrasing {metadata[entry['index']]['phrasing']}"}
            for entry in pooled["pictures"]
        ]
        return {**pooled, "pictures": pictures}

    return compare(renamed(first.pooled), renamed(second.pooled))["tags"]


def significant(parts: Mapping[str, Mapping[str, Any]], level: float = 0.05) -> list[str]:
    """Those whose p-value is at most `level` after Holm's correction for all of them."""
    corrected = holm([part["p_value"] for part in parts.values()])
    return [name for name, p_value in zip(parts, corrected, strict=True) if p_value <= level]


def written(interval: Interval) -> str:
    """`.935 [.907; .949]`."""
    return f"{short(interval.estimate)} [{short(interval.low)}; {short(interval.high)}]"


def signed(part: Mapping[str, Any]) -> str:
    """`+.036 [+.011; +.061]`, of a part of `compare`."""
    low, high = part["interval"]
    return f"{short(part['difference'], '+')} [{short(low, '+')}; {short(high, '+')}]"


def short(value: float, sign: str = "") -> str:
    """`.935`."""
    return f"{np.float64(value) + 0.0:{sign}.3f}".replace("0.", ".", 1)
