"""A comparison of several systems on the same prompts: scores with intervals, paired tests, cost and complexity."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation.comparison.complexity import PowerLawResult, Probe, power_law, probe, task_from_metadata
from clvr_jax.evaluation.comparison.pairs import (
    Comparison,
    PromptKey,
    PromptScores,
    by_prompt,
    compare,
    load_results,
    parse_named_path,
)
from clvr_jax.evaluation.harness.cost import mean_cost
from clvr_jax.evaluation.harness.results import CostSummary, GroupResult, PooledResults, StoredResults
from clvr_jax.evaluation.harness.run_directory import RunDirectory
from clvr_jax.evaluation.harness.summary import GroupScore, tags_in_order
from clvr_jax.evaluation.statistics import holm
from clvr_jax.files.json_input import JSON, UncheckedJSON


@dataclass(frozen=True)
class SystemResults:
    """The results of all runs of one system.

    Attributes:
      name: the name in tables.
      directories: of the runs, which differ in their seed only.
      runs: the contents of their results.json.
    """

    name: str
    directories: tuple[Path, ...]
    runs: tuple[StoredResults, ...]

    @property
    def pooled(self) -> PooledResults:
        """All runs as one result, with the images of every run."""
        images = [entry for run in self.runs for entry in run["pictures"]]
        return {"benchmark": self.runs[0]["benchmark"], "judge": self.runs[0]["judge"], "pictures": images}


class SystemSummary(TypedDict):
    """The scores and the cost of one system; `reported` is the benchmark's own overall score."""

    name: str
    folders: list[str]
    seeds: list[int | None]
    settings: Mapping[str, JSON] | None
    overall: GroupResult
    mean_of_tags: float
    reported: float | None
    tags: dict[str, GroupResult]
    cost: CostSummary


class ComparisonWithFirst(Comparison):
    """The comparison of a system with the first one; `holm` is the corrected p-value over all prompts."""

    name: str
    holm: float


class ComplexityProbes(TypedDict):
    """The complexity probe of each system, and the power law over the systems."""

    systems: dict[str, Probe]
    law: PowerLawResult | None


class SystemsComparison(TypedDict):
    """The comparison of all systems, which is the content of comparison.json."""

    benchmark: str
    judge: Mapping[str, str | None]
    unit: str
    prompts: int
    tags: list[str]
    systems: list[SystemSummary]
    against_first: list[ComparisonWithFirst]
    complexity: ComplexityProbes | None


def load_systems(words: Sequence[str]) -> list[SystemResults]:
    """Reads results and groups them by system; runs that differ in their seed only belong to one system.

    Args:
      words: directories (or files results.json), as PATH or NAME=PATH; the default name is that of the directory.
    Raises: UsageError for fewer than two systems, or the same run duplicates; ClvrError for a file that cannot be read.
    """
    groups: dict[str, list[tuple[str, Path, StoredResults]]] = {}
    for word in words:
        name, path = parse_named_path(word)
        results = load_results(path)
        directory = path if path.is_dir() else path.parent
        key = json.dumps([results["benchmark"], results["judge"], results.get("settings")], sort_keys=True)
        group = groups.setdefault(key, [])
        if any(other.get("seed") == results.get("seed") for _, _, other in group):
            raise UsageError(f"{path}: the same system with the same seed as {group[0][1]}; give each run once")
        group.append((name, directory, results))
    if len(groups) < 2:
        raise UsageError(f"compare: {len(words)} results of {len(groups)} system; give at least two systems")
    systems = []
    for group in groups.values():
        name = group[0][0] + (f" ({len(group)} seeds)" if len(group) > 1 else "")
        systems.append(SystemResults(name, tuple(row[1] for row in group), tuple(row[2] for row in group)))
    duplicates = {system.name for system in systems if sum(system.name == other.name for other in systems) > 1}
    if duplicates:
        raise UsageError(f"compare: two systems are called {', '.join(sorted(duplicates))}; give them names, NAME=DIR")
    return systems


def compare_systems(systems: Sequence[SystemResults], seed: int = 0) -> SystemsComparison:
    """Compares each system with the first one, paired by prompt.

    Args:
      systems: two or more, with results on the same benchmark, judge and prompts.
      seed: of the bootstraps.
    Returns: {"benchmark", "judge", "unit", "prompts", "tags", "systems", "against_first", "complexity"}, for JSON.
      "systems": {"name", "folders", "seeds", "settings", "overall": group, "mean_of_tags", "reported": the benchmark's
      own overall score, mean over the seeds, "tags": {tag: group}, "cost"} with group = {"score", "interval",
      "prompts", "pictures"} and 95 % intervals. "against_first": for all systems but the first, the content of
      `compare.compare` with "name" and "holm", the p-value over all prompts, corrected for the number of systems.
      "complexity": the content of `compare_complexity`.
    Raises: ClvrError if benchmark, judge or prompts differ.
    """
    pooled = [system.pooled for system in systems]
    pairs = [compare(pooled[0], other, seed) for other in pooled[1:]]
    corrected = holm([pair["overall"]["p_value"] for pair in pairs])
    tags = tags_in_order(entry["tag"] for entry in pooled[0]["pictures"])
    return {
        "benchmark": pooled[0]["benchmark"],
        "judge": pooled[0]["judge"],
        "unit": systems[0].runs[0].get("unit", "0 to 1"),
        "prompts": len(by_prompt(pooled[0])),
        "tags": tags,
        "systems": [_system(system, tags, seed) for system in systems],
        "against_first": [
            {"name": system.name, "holm": p_value, **pair}
            for system, pair, p_value in zip(systems[1:], pairs, corrected, strict=True)
        ],
        "complexity": compare_complexity(systems),
    }


def compare_complexity(systems: Sequence[SystemResults]) -> ComplexityProbes | None:
    """Returns the complexity probe of all systems; None if the prompts' metadata are missing or not in GenEval's form.

    Returns: {"systems": {name: `complexity.probe`}, "law": the power law, over the systems, of 100 - area against
      network evaluations per image, or None}.
    """
    if systems[0].runs[0].get("unit", "0 to 1") != "0 to 1":
        return None
    complexities = _complexities(systems[0].directories[0])
    probes: dict[str, Probe] = {}
    nfe_per_image, failures = [], []
    for system in systems:
        rows = by_prompt(system.pooled)
        if complexities is None or any(key not in complexities for key in rows):
            return None
        probes[system.name] = probe([complexities[key] for key in rows], [row.scores for row in rows.values()])
        nfe = _cost(system)["nfe_per_picture"]
        if nfe and probes[system.name]["area"] < 100:
            nfe_per_image.append(nfe)
            failures.append(100 - probes[system.name]["area"])
    law = power_law(nfe_per_image, failures)
    return {"systems": probes, "law": law.to_json() if law else None}


def _complexities(directory: Path) -> dict[PromptKey, float] | None:
    """Returns (index, prompt) -> complexity; None if the metadata are missing or not in GenEval's form."""
    try:
        entries = RunDirectory(directory).metadata()
    except ClvrError:  # results.json without the rest of its run directory
        return None
    if not all(_has_clauses(entry) for entry in entries):
        return None
    return {(index, entry["prompt"]): task_from_metadata(entry).complexity() for index, entry in enumerate(entries)}


def _has_clauses(entry: UncheckedJSON) -> bool:
    include = entry.get("include")
    return isinstance(include, list) and all(
        isinstance(item, dict) and type(item.get("count")) is int and item["count"] > 0 for item in include
    )


def _system(system: SystemResults, tags: Sequence[str], seed: int) -> SystemSummary:
    rows = list(by_prompt(system.pooled).values())

    def group(own: Sequence[PromptScores]) -> GroupResult:
        return GroupScore.from_scores([row.scores for row in own], seed=seed).to_json()

    groups = {tag: group([row for row in rows if row.tag == tag]) for tag in tags}
    return {
        "name": system.name,
        "folders": [str(directory) for directory in system.directories],
        "seeds": [run.get("seed") for run in system.runs],
        "settings": system.runs[0].get("settings"),
        "overall": group(rows),
        "mean_of_tags": float(np.mean([each["score"] for each in groups.values()])),
        "reported": _reported(system),
        "tags": groups,
        "cost": _cost(system),
    }


def _reported(system: SystemResults) -> float | None:
    """Returns the benchmark's own overall score, which may weight tags; None if a run has none."""
    scores = [score for run in system.runs if (score := _overall_score(run)) is not None]
    return float(np.mean(scores)) if len(scores) == len(system.runs) else None


def _overall_score(run: StoredResults) -> float | None:
    overall = run["summary"].get("overall") if "summary" in run else None
    return None if overall is None else overall.get("mean_of_tags", overall.get("score"))


def _cost(system: SystemResults) -> CostSummary:
    return mean_cost(system.pooled["pictures"])
