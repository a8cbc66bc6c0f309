"""Summaries of image scores per tag and tier, for results.json, Markdown and the terminal."""

from __future__ import annotations

import statistics as descriptive
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.statistics import mean_of_proportions, wilson_interval
from clvr_jax.tables import table_lines

if TYPE_CHECKING:
    from rich.table import Table

TAG_ORDER = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "complex")
COSTS = ("nfe", "seconds", "steps", "outcome", "input_tokens", "output_tokens", "dollars", "device")
"""The fields of an ImageScore on the cost of the image."""
_COLUMNS = ("accuracy", "95 %", "correct")


@dataclass(frozen=True)
class ImageScore:
    """The score of one image.

    Attributes:
      index: index of its prompt in the benchmark, from 0.
      sample: index among the images of the prompt, from 0.
      prompt, tag: of the metadata.
      tier: the complexity tier of the metadata, None if it has none.
      correct: the checker's verdict.
      reasons: why the image is not correct.
      nfe: network evaluations, None if not recorded.
      seconds: wall time of its batch divided by the size of the batch; for endpoints, from its request to its response.
      steps: number of images in its trajectory; None for one-shot generation.
      outcome: how the trajectory ended; None for one-shot generation.
      input_tokens, output_tokens: of the language model, None if not recorded; an equal share of a batch of prompts.
      dollars: the cost by the endpoints' price list.
      device: the device that generated the image.
    """

    index: int
    sample: int
    prompt: str
    tag: str
    tier: int | None
    correct: bool
    reasons: tuple[str, ...] = ()
    nfe: int | None = None
    seconds: float | None = None
    steps: int | None = None
    outcome: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    dollars: float | None = None
    device: str | None = None


def summarize(scores: Sequence[ImageScore]) -> dict[str, Any]:
    """Summarizes scores for results.json.

    Returns: {"tags": {tag: group}, "tiers": {tier: group}, "overall": {"mean_of_tags": .., "interval": [low, high],
      "over_pictures": group}, "cost": {...}} with group = {"correct", "pictures", "accuracy", "interval"}.
      `mean_of_tags` is GenEval's overall score, the unweighted mean of the tags' accuracies. Intervals are 95 %.
    Raises: ClvrError if there are no scores.
    """
    if not scores:
        raise ClvrError("report: there are no scored images")
    tags = {
        tag: _group(score for score in scores if score.tag == tag)
        for tag in tags_in_order(score.tag for score in scores)
    }
    tiers = sorted({score.tier for score in scores if score.tier is not None})
    mean = mean_of_proportions([(group["correct"], group["pictures"]) for group in tags.values()])
    return {
        "tags": tags,
        "tiers": {str(tier): _group(score for score in scores if score.tier == tier) for tier in tiers},
        "overall": {
            "mean_of_tags": mean.estimate,
            "interval": [mean.low, mean.high],
            "over_pictures": _group(scores),
        },
        "cost": mean_cost(scores),
    }


def markdown(summary: Mapping[str, Any], title: str = "") -> str:
    """Returns the summary as a Markdown table with a line on cost."""
    lines = [f"## {title}", ""] if title else []
    rows = [("", *_COLUMNS), *(row for section in _sections(summary) for row in section)]
    return "\n".join([*lines, *table_lines(rows), "", cost_line(summary["cost"])]) + "\n"


def rich_table(summary: Mapping[str, Any], title: str = "") -> Table:
    """Returns the summary as a table for the terminal."""
    from rich.table import Table

    table = Table(title=title or None, caption=cost_line(summary["cost"]))
    table.add_column("")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for section in _sections(summary):
        for row in section:
            table.add_row(*row)
        table.add_section()
    return table


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


def _sections(summary: Mapping[str, Any]) -> list[list[tuple[str, str, str, str]]]:
    """Returns rows (name, accuracy, interval, correct / images) of three sections: tags, overall, tiers."""
    overall = summary["overall"]
    sections = [
        [_row(tag, group) for tag, group in summary["tags"].items()],
        [
            ("overall, mean of tags", f"{overall['mean_of_tags']:.3f}", _interval(overall["interval"]), ""),
            _row("overall, over images", overall["over_pictures"]),
        ],
        [_row(f"tier {tier}", group) for tier, group in summary["tiers"].items()],
    ]
    return [section for section in sections if section]


def _row(name: str, group: Mapping[str, Any]) -> tuple[str, str, str, str]:
    counts = f"{group['correct']} / {group['pictures']}"
    return name, f"{group['accuracy']:.3f}", _interval(group["interval"]), counts


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.3f} .. {bounds[1]:.3f}"


def tags_in_order(tags: Iterable[str]) -> list[str]:
    """Returns the distinct tags: those of GenEval in its order, then the others in alphabetical order."""
    found = set(tags)
    return [tag for tag in TAG_ORDER if tag in found] + sorted(found - set(TAG_ORDER))


def _group(scores: Iterable[ImageScore]) -> dict[str, Any]:
    verdicts = [score.correct for score in scores]
    interval = wilson_interval(sum(verdicts), len(verdicts))
    return {
        "correct": sum(verdicts),
        "pictures": len(verdicts),
        "accuracy": interval.estimate,
        "interval": [interval.low, interval.high],
    }


def mean_cost(scores: Sequence[Any]) -> dict[str, Any]:
    """Returns means per image and total dollars. The mean time includes compilation, the median time hardly does.

    scores: ImageScores, or other objects with the fields of COSTS.
    """
    seconds = _recorded(scores, "seconds")
    means = {
        f"{name}_per_picture": descriptive.fmean(values) if (values := _recorded(scores, name)) else None
        for name in ("nfe", "seconds", "input_tokens", "output_tokens")
    }
    dollars = _recorded(scores, "dollars")
    return {
        **means,
        "median_seconds_per_picture": descriptive.median(seconds) if seconds else None,
        "dollars": sum(dollars) if dollars else None,
        "steps": _counts(scores, "steps"),
        "outcomes": _counts(scores, "outcome"),
        "devices": _counts(scores, "device"),
    }


def _recorded(scores: Sequence[Any], name: str) -> list[Any]:
    return [value for score in scores if (value := getattr(score, name)) is not None]


def _counts(scores: Sequence[Any], name: str) -> dict[str, int]:
    values = _recorded(scores, name)
    return {str(value): values.count(value) for value in sorted(set(values))}
