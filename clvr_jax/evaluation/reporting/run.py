"""The results of a run as a table, with notes on the scorer, faults and excluded images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clvr_jax.display.tables import Row, Table
from clvr_jax.evaluation.harness.cost import cost_line
from clvr_jax.evaluation.harness.results import GroupResult, OverallResult, Results

if TYPE_CHECKING:
    from rich.console import Group

_LISTED = 10


def rich_results(results: Results, title: str) -> Group:
    """Returns the content of results.json for the terminal: a table, and notes below it."""
    from rich.console import Group
    from rich.text import Text

    return Group(results_table(results, title).rich(), Text("\n".join(notes(results))))


def results_table(results: Results, title: str = "") -> Table:
    """Returns the scores of tags, the overall score, and the scores of tiers, if the benchmark has some."""
    summary, overall = results["summary"], results["summary"]["overall"]
    if "over_pictures" in overall:
        header: Row = ("", "accuracy", "95 %", "correct")
        total = [
            ("overall, mean of tags", *_numbers(overall), ""),
            _row("overall, over images", overall["over_pictures"]),
        ]
    else:
        header = ("", f"score, {results['unit']}", "95 %", "prompts", "images")
        total = [("overall", *_numbers(overall), "", "")]
    tags = [_row(tag, group) for tag, group in summary["tags"].items()]
    tiers = [_row(f"tier {tier}", group) for tier, group in summary["tiers"].items()]
    return Table(header, [tags, total, tiers], title=title, caption=cost_line(summary["cost"]))


def notes(results: Results) -> list[str]:
    """Returns sentences on the scorer, on reproduced faults, on requests, and on images that were not read."""
    judge, summary, judging = results["judge"], results["summary"], results["summary"]["judging"]
    identity = [f"{name} {judge[name]}" for name in ("revision", "version") if judge.get(name)]
    lines = [f"judged by {', '.join([str(judge['name']), *identity])}"]
    if judging:
        lines[0] += f": {judging['calls']} replies"
        if "dollars" in judging:
            lines[0] += f", ${judging['dollars']:.2f}"
    lines += [f"fault of the official rules, reproduced: {fault}" for fault in results["faults"]]
    if adapted := results["adapted"] + results["generator_adapted"]:
        lines.append(f"requests differ from those to other servers: {'; '.join(adapted)}")
    for found, what in (
        (summary["unreadable"], "no readable reply, counted as failed"),
        (summary["refused"], "refused by the judge's policy, counted as failed"),
        (summary["left_out"], "left out by the rules"),
    ):
        if found:
            more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
            lines.append(f"{what}: {', '.join(found[:_LISTED])}{more}")
    return lines


def _row(name: str, group: GroupResult) -> tuple[str, ...]:
    if "correct" in group:
        return (name, *_numbers(group), f"{group['correct']} / {group['pictures']}")
    return (name, *_numbers(group), str(group["prompts"]), str(group["pictures"]))


def _numbers(group: GroupResult | OverallResult) -> Sequence[str]:
    """Returns a score and its interval; a score that does not exist has the reason in place of the interval."""
    if group["score"] is None:
        return "none", group["reason"]
    low, high = group["interval"]
    return f"{group['score']:.3f}", f"{low:.3f} .. {high:.3f}"
