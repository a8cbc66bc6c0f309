"""Paired comparison of two results on the same prompts: differences with intervals and paired tests."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict, cast

from clvr_jax.display.tables import Table
from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.harness.cost import COSTS
from clvr_jax.evaluation.harness.results import ImageResult, PooledResults, StoredResults
from clvr_jax.evaluation.statistics import paired_bootstrap, sign_test
from clvr_jax.files.json_input import JsonObject, check_unicode, read_object

PromptKey = tuple[int, str]
"""The index and the text of a prompt."""
_COST_TEXTS = {"outcome", "device"}
_COST_NUMBERS = set(COSTS) - _COST_TEXTS


@dataclass(frozen=True)
class PromptScores:
    """The tag and the tier of a prompt, and the scores of its images."""

    tag: str
    tier: int | None
    scores: list[float]

    @property
    def mean(self) -> float:
        """The score of the prompt."""
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class PairedPrompt:
    """The scores of two systems on one prompt."""

    tag: str
    tier: int | None
    first: float
    second: float


class Difference(TypedDict):
    """A difference of mean scores, positive if the second system is better, and its 95 % bootstrap interval."""

    difference: float
    interval: list[float]


class Part(Difference):
    """The comparison of two systems on a group of prompts: means, difference, and a paired test."""

    prompts: int
    first: float
    second: float
    first_wins: int
    second_wins: int
    p_value: float


class Comparison(TypedDict):
    """The comparison of two systems, over all prompts and by tag and tier."""

    overall: Part
    mean_of_tags: Difference
    tags: dict[str, Part]
    tiers: dict[str, Part]


def load_results(path: str | os.PathLike[str]) -> StoredResults:
    """Reads results.json, given the file or its directory. Raises: ClvrError if it is not a benchmark result."""
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    found = read_object(path)
    lacking = [key for key in ("benchmark", "judge", "pictures") if key not in found.content]
    if lacking:
        raise ClvrError(f"{path}: not a benchmark result, lacks {', '.join(lacking)}")
    _check_results(found)
    return cast(StoredResults, dict(found.content))


def _check_results(found: JsonObject) -> None:
    """Raises ClvrError for a field whose type or range is wrong."""
    check_unicode(found.content, found.where)
    found.text("benchmark")
    found.nested("judge")
    found.text("unit", "")
    overall = found.nested("summary", JsonObject({}, "")).nested("overall", JsonObject({}, ""))
    for key in {"mean_of_tags", "score"} & overall.content.keys():
        overall.optional(key, overall.number)
    entries = found.objects("pictures")
    if not entries:
        raise ClvrError(f"{found.where}: the list 'pictures' is empty; score the run first")
    for entry in entries:
        _check_entry(entry)


def _check_entry(entry: JsonObject) -> None:
    entry.integer("index", low=0)
    entry.text("prompt")
    entry.text("tag")
    entry.optional("tier", entry.integer)
    for key in _COST_NUMBERS & entry.content.keys():
        entry.optional(key, partial(entry.number, low=0))
    for key in _COST_TEXTS & entry.content.keys():
        entry.optional(key, entry.text)
    if entry.content.get("score") is None:
        entry.boolean("correct")
    else:
        entry.number("score")


def parse_named_path(word: str) -> tuple[str, Path]:
    """Parses NAME=PATH, or a path alone, whose name is that of its directory. Returns: name and path."""
    name, _, text = ("", "", word) if Path(word).exists() else word.rpartition("=")
    path = Path(text)
    return name or (path if path.is_dir() else path.parent).resolve().name, path


def compare(first: PooledResults, second: PooledResults, seed: int = 0) -> Comparison:
    """Compares two results; a positive difference means that the second is better.

    The unit is the prompt: the score of a prompt with several images is their mean, because they are not independent.

    Args:
      first, second: contents of two results.json, of the same benchmark, judge and prompts.
      seed: of the bootstrap.
    Returns: {"overall": part, "tags": {tag: part}, "tiers": {tier: part}, "mean_of_tags": {"difference", "interval"}}
      with part = {"prompts", "first", "second", "difference", "interval": [low, high], "first_wins", "second_wins",
      "p_value"}; 95 % bootstrap interval over prompts, p-value of McNemar's exact test (the sign test if prompts have
      several images).
      P-values are not corrected for the number of tags and tiers.
    Raises: ClvrError if benchmark, judge or prompts differ.
    """
    for key, own, other in (
        ("benchmark", first["benchmark"], second["benchmark"]),
        ("judge", first["judge"], second["judge"]),
    ):
        if own != other:
            raise ClvrError(f"compare: {key} differs ({own} and {other}); such scores cannot be compared")
    rows = _pair(by_prompt(first), by_prompt(second))
    a, b = [row.first for row in rows], [row.second for row in rows]
    mean = paired_bootstrap(a, b, [row.tag for row in rows], seed)
    tags = list(dict.fromkeys(row.tag for row in rows))
    tiers = sorted({row.tier for row in rows if row.tier is not None})
    return {
        "overall": _part(rows, seed),
        "mean_of_tags": {"difference": mean.estimate, "interval": [mean.low, mean.high]},
        "tags": {tag: _part([row for row in rows if row.tag == tag], seed) for tag in tags},
        "tiers": {str(tier): _part([row for row in rows if row.tier == tier], seed) for tier in tiers},
    }


def comparison_table(
    comparison: Comparison, first_name: str = "first", second_name: str = "second", title: str = ""
) -> Table:
    """Returns a comparison as a table, whose columns have the names of the two systems."""
    header = ("", first_name, second_name, *_COLUMNS)
    return Table(header, [_rows(comparison)], title=title, caption="p: McNemar's exact test, not corrected")


_COLUMNS = ("difference", "95 %", "wins", "p")


def _rows(comparison: Comparison) -> list[list[str]]:
    parts = [*comparison["tags"].items(), *((f"tier {tier}", part) for tier, part in comparison["tiers"].items())]
    rows = []
    for name, part in [*parts, ("all prompts", comparison["overall"])]:
        wins = f"{part['first_wins']} : {part['second_wins']}"
        means = [f"{part['first']:.3f}", f"{part['second']:.3f}"]
        rows.append([name, *means, *_difference(part), wins, f"{part['p_value']:.2g}"])
    return [*rows, ["mean of tags", "", "", *_difference(comparison["mean_of_tags"]), "", ""]]


def _difference(part: Difference) -> list[str]:
    low, high = part["interval"]
    return [f"{part['difference']:+.3f}", f"{low:+.3f} .. {high:+.3f}"]


def score_of(entry: ImageResult) -> float:
    """Returns the score of an image: in the unit of its benchmark, or 1 if it is correct and 0 if not."""
    score = entry.get("score")
    return float(bool(entry["correct"]) if score is None else score)


def by_prompt(results: PooledResults) -> dict[PromptKey, PromptScores]:
    """Groups images by prompt: (index, prompt) -> tag, tier and the scores of the prompt's images."""
    prompts: dict[PromptKey, PromptScores] = {}
    for entry in results["pictures"]:
        row = prompts.setdefault((entry["index"], entry["prompt"]), PromptScores(entry["tag"], entry["tier"], []))
        row.scores.append(score_of(entry))
    return prompts


def _pair(first: Mapping[PromptKey, PromptScores], second: Mapping[PromptKey, PromptScores]) -> list[PairedPrompt]:
    only = [("first", first.keys() - second.keys()), ("second", second.keys() - first.keys())]
    if any(keys for _, keys in only):
        example = next(f"{min(keys)} in the {side} only" for side, keys in only if keys)
        counts = " and ".join(str(len(keys)) for _, keys in only)
        raise ClvrError(
            f"compare: {counts} prompts are in one result only ({example}); give two results on the same prompts"
        )
    return [PairedPrompt(first[key].tag, first[key].tier, first[key].mean, second[key].mean) for key in sorted(first)]


def _part(rows: Sequence[PairedPrompt], seed: int) -> Part:
    a, b = [row.first for row in rows], [row.second for row in rows]
    test = sign_test(a, b)
    difference = paired_bootstrap(a, b, seed=seed)
    return {
        "prompts": len(rows),
        "first": sum(a) / len(a),
        "second": sum(b) / len(b),
        "difference": difference.estimate,
        "interval": [difference.low, difference.high],
        "first_wins": test.first_wins,
        "second_wins": test.second_wins,
        "p_value": test.p_value,
    }
