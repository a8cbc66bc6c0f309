"""Tables of results in Markdown, with intervals over prompts and paired differences as in `clvr eval compare`."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from clvr_jax.display.tables import Table
from clvr_jax.evaluation.comparison.complexity import probe, task_from_metadata
from clvr_jax.evaluation.comparison.pairs import Difference, Part, by_prompt, compare
from clvr_jax.evaluation.comparison.systems import SystemResults
from clvr_jax.evaluation.harness.results import CostKey, ImageResult, PooledResults
from clvr_jax.evaluation.paper.rows import concatenate_splits
from clvr_jax.evaluation.statistics import Interval, clustered_interval, holm
from clvr_jax.files.json_input import UncheckedJSON

Found = Mapping[str, Mapping[str, SystemResults]]
"""Name of a row -> split -> its results."""


_COSTS: tuple[CostKey, CostKey] = ("nfe_per_picture", "median_seconds_per_picture")


def systems_table(labels: Mapping[str, str], found: Found, reference: str) -> list[str]:
    """Returns a table with a line per system: accuracy per split, difference to a reference system, and cost.

    Args:
      labels: name of a row -> its label, in the order of the lines.
      found: results of these rows, all on the same splits.
      reference: the name of the row with which the others are compared, over all prompts.
    """
    splits = list(found[reference])
    head = ("", *(f"`{split}`" for split in splits), f"minus {labels[reference]}", "p", "NFE", "seconds")
    rows = []
    for name, label in labels.items():
        accuracies = (format_interval(accuracy(found[name][split].pooled)) for split in splits)
        difference, p_value = "", ""
        if name != reference:
            part = compare(concatenate_splits(found[reference]), concatenate_splits(found[name]))["overall"]
            difference, p_value = format_difference(part), f"{part['p_value']:.2g}"
        nfe, seconds = (mean_cost(found[name][splits[-1]], key) for key in _COSTS)
        rows.append((label, *accuracies, difference, p_value, f"{nfe:.1f}", f"{seconds:.2f}"))
    return _markdown(head, rows)


def tiers_table(labels: Mapping[str, str], found: Found, metadata: Mapping[str, Sequence[UncheckedJSON]]) -> list[str]:
    """Returns accuracy by number of objects, and the area of the complexity probe, with a column per system.

    metadata: split -> prompts, in the order of the results.
    """
    curves = {name: by_tier(found[name]["complex"].pooled) for name in labels}
    rows = [
        (f"{tier} objects", *(format_interval(curve[tier]) for curve in curves.values()))
        for tier in next(iter(curves.values()))
    ]
    complexities = [task_from_metadata(entry).complexity() for split in metadata for entry in metadata[split]]
    areas = []
    for name in labels:
        scores = [
            row.scores
            for _, row in sorted(by_prompt(concatenate_splits(found[name])).items(), key=lambda item: item[0])
        ]
        areas.append(f"{probe(complexities, scores)['area']:.1f}")
    return _markdown(("", *labels.values()), [*rows, ("area of the probe", *areas)])


def accuracy(pooled: PooledResults) -> Interval:
    """Returns the accuracy, the share of correct images averaged over prompts, with its interval."""
    return clustered_interval([row.scores for row in by_prompt(pooled).values()])


def by_tier(pooled: PooledResults) -> dict[int, Interval]:
    """Returns number of objects -> accuracy, with its interval."""
    groups: dict[int, list[Sequence[float]]] = {}
    for row in by_prompt(pooled).values():
        if row.tier is not None:
            groups.setdefault(row.tier, []).append(row.scores)
    return {tier: clustered_interval(scores) for tier, scores in sorted(groups.items())}


def mean_cost(one: SystemResults, key: CostKey) -> float:
    """Returns a cost per image of `cost.mean_cost`, averaged over the seeds; NaN if it was not recorded."""
    costs = [cost for run in one.runs if (cost := run["summary"]["cost"][key]) is not None]
    return statistics.fmean(costs) if len(costs) == len(one.runs) else float("nan")


def groups_table(
    first: Mapping[str, SystemResults], second: Mapping[str, SystemResults], names: tuple[str, str]
) -> list[str]:
    """Returns a table of two systems by tag and number of objects. first, second: split -> results."""
    rows = []
    for split in first:
        comparison = compare(first[split].pooled, second[split].pooled)
        tiers = [(f"{tier} objects", part) for tier, part in comparison["tiers"].items()]
        for name, part in [*comparison["tags"].items(), *tiers]:
            means = format_score(part["first"]), format_score(part["second"])
            rows.append(
                (
                    name.replace("_", " "),
                    str(part["prompts"]),
                    *means,
                    format_difference(part),
                    f"{part['p_value']:.2g}",
                )
            )
    return _markdown(("", "prompts", *names, "difference", "p"), rows)


def by_phrasing(first: SystemResults, second: SystemResults, metadata: Sequence[UncheckedJSON]) -> dict[str, Part]:
    """Compares two systems for each tag and phrasing: {"counting, phrasing 3": part of `compare`}.

    metadata: of the prompts, in the order of the results.
    """

    def renamed(pooled: PooledResults) -> PooledResults:
        images: list[ImageResult] = [
            {**entry, "tag": f"{entry['tag']}, phrasing {metadata[entry['index']]['phrasing']}"}
            for entry in pooled["pictures"]
        ]
        return {**pooled, "pictures": images}

    return compare(renamed(first.pooled), renamed(second.pooled))["tags"]


def significant(parts: Mapping[str, Part], level: float = 0.05) -> list[str]:
    """Returns the names of parts whose p-value is at most `level` after Holm's correction for all parts."""
    corrected = holm([part["p_value"] for part in parts.values()])
    return [name for name, p_value in zip(parts, corrected, strict=True) if p_value <= level]


def format_interval(interval: Interval) -> str:
    """Formats an interval as `.935 [.907; .949]`."""
    return f"{format_score(interval.estimate)} [{format_score(interval.low)}; {format_score(interval.high)}]"


def format_difference(part: Difference) -> str:
    """Formats the difference of a part of `compare` as `+.036 [+.011; +.061]`."""
    low, high = part["interval"]
    return f"{format_score(part['difference'], '+')} [{format_score(low, '+')}; {format_score(high, '+')}]"


def format_score(value: float, sign: str = "") -> str:
    """Formats a score as `.935`."""
    return f"{np.float64(value) + 0.0:{sign}.3f}".replace("0.", ".", 1)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return Table(header, [rows], is_markdown=True).markdown()
