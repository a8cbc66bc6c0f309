"""Summaries of image scores: one score per tag and one overall, with intervals, and a table for the terminal."""

from __future__ import annotations

import math
import statistics as descriptive
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clvr_jax.evaluation.harness.benchmark import Benchmark
from clvr_jax.evaluation.reporting.run import cost_line
from clvr_jax.evaluation.statistics import Interval, paired_bootstrap, wilson_interval

if TYPE_CHECKING:
    from rich.console import RenderableType

_LISTED = 10


def summarize(benchmark: Benchmark, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Computes the scores of tags and the overall score.

    The unit is the prompt: the score of a prompt with several images is their mean, because they are not independent.

    Args:
      benchmark: defines the weights of tags.
      rows: one per image, with "index", "id", "tag", "score", "parts", "readable" and optionally "refused".
    Returns: the summary of `scoring.results`; intervals are Wilson's if prompts score 0 or 1, else from the bootstrap,
      and are combined by their squared distances, with the weights (Zou and Donner 2008).
    """
    prompts: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        prompts.setdefault(row["index"], []).append(row)
    scores: dict[str, list[float]] = {}
    for own in prompts.values():
        scores.setdefault(own[0]["tag"], []).append(descriptive.fmean(row["score"] for row in own))
    estimates = {tag: _estimate(values) for tag, values in scores.items()}
    names = dict.fromkeys(name for row in rows for name in row["parts"])
    return {
        "tags": {
            tag: {
                "score": estimate.estimate,
                "interval": [estimate.low, estimate.high],
                "prompts": len(scores[tag]),
                "pictures": sum(row["tag"] == tag for row in rows),
            }
            for tag, estimate in estimates.items()
        },
        "overall": _overall(benchmark.weights({tag: len(values) for tag, values in scores.items()}), estimates),
        "parts": {
            name: descriptive.fmean(row["parts"][name] for row in rows if name in row["parts"]) for name in names
        },
        "unreadable": [_named(row) for row in rows if not (row["readable"] or row.get("refused"))],
        "refused": [_named(row) for row in rows if row.get("refused")],
    }


def table(results: Mapping[str, Any], title: str) -> RenderableType:
    """Returns results as a table for the terminal, with notes on the judge, faults and excluded images."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    summary, overall = results["summary"], results["summary"]["overall"]
    shown = Table(title=title, caption=cost_line(summary["cost"]))
    shown.add_column("")
    for column in (f"score, {results['unit']}", "95 %", "prompts", "images"):
        shown.add_column(column, justify="right")
    for tag, group in summary["tags"].items():
        shown.add_row(tag, *_numbers(group), str(group["prompts"]), str(group["pictures"]))
    shown.add_section()
    if overall["score"] is None:
        shown.add_row("overall", "none", overall["reason"], "", "")
    else:
        shown.add_row("overall", *_numbers(overall), "", "")
    return Group(shown, Text("\n".join(_notes(results))))


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['id']}/{row['sample']}"


def _notes(results: Mapping[str, Any]) -> list[str]:
    judge, summary, judging = results["judge"], results["summary"], results["summary"]["judging"]
    lines = [f"judged by {judge['name']}" + (f", revision {judge['revision']}" if judge["revision"] else "")]
    if judging:
        lines[0] += f": {judging['calls']} replies"
        if "dollars" in judging:
            lines[0] += f", ${judging['dollars']:.2f}"
    lines += [f"fault of the official rules, reproduced: {fault}" for fault in results["faults"]]
    if adapted := results["adapted"] + results["generator_adapted"]:
        lines.append(f"requests differ from those to other servers: {'; '.join(adapted)}")
    kinds = {
        "unreadable": "no readable reply, counted as failed",
        "refused": "refused by the judge's policy, counted as failed",
        "left_out": "left out by the rules",
    }
    for name, what in kinds.items():
        if found := summary[name]:
            more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
            lines.append(f"{what}: {', '.join(found[:_LISTED])}{more}")
    return lines


def _estimate(values: Sequence[float]) -> Interval:
    """Returns the mean of prompts' scores with its interval."""
    if set(values) <= {0.0, 1.0}:
        return wilson_interval(int(sum(values)), len(values))
    return paired_bootstrap([0.0] * len(values), values)


def _overall(weights: Mapping[str, float], estimates: Mapping[str, Interval]) -> dict[str, Any]:
    if missing := [tag for tag in weights if tag not in estimates]:
        return {"score": None, "reason": f"no prompt of {', '.join(missing)}"}
    total = sum(weights.values())
    shares = [(weight / total, estimates[tag]) for tag, weight in weights.items()]
    score = sum(share * one.estimate for share, one in shares)
    below = math.sqrt(sum((share * (one.estimate - one.low)) ** 2 for share, one in shares))
    above = math.sqrt(sum((share * (one.high - one.estimate)) ** 2 for share, one in shares))
    return {"score": score, "interval": [score - below, score + above]}


def _numbers(group: Mapping[str, Any]) -> tuple[str, str]:
    low, high = group["interval"]
    return f"{group['score']:.3f}", f"{low:.3f} .. {high:.3f}"
