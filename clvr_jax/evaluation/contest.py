"""Several systems on the same prompts: scores with intervals, each held against the first, cost, complexity."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation.compare import by_prompt, compare, load_results, named
from clvr_jax.evaluation.complexity import power_law, probe, task_of
from clvr_jax.evaluation.layout import Folder
from clvr_jax.evaluation.report import COSTS, mean_cost, tags_in_order
from clvr_jax.evaluation.statistics import clustered_interval, holm


@dataclass(frozen=True)
class Contestant:
    """One system: the results of all its runs.

    Attributes:
      name: for people.
      folders: of its runs, which differ in their seed only.
      runs: the contents of their results.json.
    """

    name: str
    folders: tuple[Path, ...]
    runs: tuple[Mapping[str, Any], ...]

    @property
    def pooled(self) -> dict[str, Any]:
        """The runs as one result: more pictures of the same prompts."""
        pictures = [entry for run in self.runs for entry in run["pictures"]]
        return {"benchmark": self.runs[0]["benchmark"], "judge": self.runs[0]["judge"], "pictures": pictures}


def gather(words: Sequence[str]) -> list[Contestant]:
    """Reads results; runs of the same system with other seeds become one contestant.

    Args:
      words: folders (or files results.json), as PATH or NAME=PATH; without a name the folder's own is taken.
    Raises: UsageError if they are fewer than two systems or two runs are the same; ClvrError for what cannot be read.
    """
    groups: dict[str, list[tuple[str, Path, dict[str, Any]]]] = {}
    for word in words:
        name, path = named(word)
        results = load_results(path)
        folder = path if path.is_dir() else path.parent
        key = json.dumps([results["benchmark"], results["judge"], results.get("settings")], sort_keys=True)
        group = groups.setdefault(key, [])
        if any(other.get("seed") == results.get("seed") for _, _, other in group):
            raise UsageError(f"{path}: the same system with the same seed as {group[0][1]}; give each run once")
        group.append((name, folder, results))
    if len(groups) < 2:
        raise UsageError(f"compare: {len(words)} results of {len(groups)} system; give two systems at least")
    contestants = []
    for group in groups.values():
        name = group[0][0] + (f" ({len(group)} seeds)" if len(group) > 1 else "")
        contestants.append(Contestant(name, tuple(row[1] for row in group), tuple(row[2] for row in group)))
    twice = {one.name for one in contestants if sum(one.name == other.name for other in contestants) > 1}
    if twice:
        raise UsageError(f"compare: two systems are called {', '.join(sorted(twice))}; give them names, NAME=DIR")
    return contestants


def hold(contestants: Sequence[Contestant], seed: int = 0) -> dict[str, Any]:
    """Compares all systems, prompt by prompt, each with the first.

    Args:
      contestants: two or more, on the same benchmark, judge and prompts.
      seed: of the bootstraps.
    Returns: {"benchmark", "judge", "unit", "prompts", "tags", "systems", "against_first", "complexity"}, for JSON.
      "systems": {"name", "folders", "seeds", "settings", "overall": group, "mean_of_tags", "reported": the benchmark's
      own overall score, mean over the seeds, "tags": {tag: group}, "cost"} with group = {"score", "interval",
      "prompts", "pictures"}, 95 %. "against_first": for all but the first, `compare.compare`'s content with "name" and
      "holm", the p-value of all prompts corrected for the number of systems. "complexity": see `complexity_of`.
    Raises: ClvrError if benchmark, judge or prompts differ.
    """
    pooled = [one.pooled for one in contestants]
    pairs = [compare(pooled[0], other, seed) for other in pooled[1:]]
    corrected = holm([pair["overall"]["p_value"] for pair in pairs])
    tags = tags_in_order(entry["tag"] for entry in pooled[0]["pictures"])
    return {
        "benchmark": pooled[0]["benchmark"],
        "judge": pooled[0]["judge"],
        "unit": contestants[0].runs[0].get("unit", "0 to 1"),
        "prompts": len(by_prompt(pooled[0])),
        "tags": tags,
        "systems": [_system(one, tags, seed) for one in contestants],
        "against_first": [
            {"name": one.name, "holm": p_value, **pair}
            for one, pair, p_value in zip(contestants[1:], pairs, corrected, strict=True)
        ],
        "complexity": complexity_of(contestants),
    }


def complexity_of(contestants: Sequence[Contestant]) -> dict[str, Any] | None:
    """The complexity probe of all systems; None if the prompts' metadata are not in GenEval's form, or not there.

    Returns: {"systems": {name: `complexity.probe`}, "law": the power law of what is lacking to an area of 100 against
      network evaluations per picture, over the systems, or None}.
    """
    if contestants[0].runs[0].get("unit", "0 to 1") != "0 to 1":
        return None
    tasks = _tasks(contestants[0].folders[0])
    systems: dict[str, Any] = {}
    spent, lacking = [], []
    for one in contestants:
        rows = by_prompt(one.pooled)
        if tasks is None or any(key not in tasks for key in rows):
            return None
        systems[one.name] = probe([tasks[key] for key in rows], [row["scores"] for row in rows.values()])
        nfe = _cost(one)["nfe_per_picture"]
        if nfe and systems[one.name]["area"] < 100:
            spent.append(nfe)
            lacking.append(100 - systems[one.name]["area"])
    law = power_law(spent, lacking)
    return {"systems": systems, "law": asdict(law) if law else None}


def _tasks(folder: Path) -> dict[tuple[int, str], float] | None:
    """(index, prompt) -> complexity, for prompts in GenEval's form."""
    try:
        entries = Folder(folder).metadata()
    except ClvrError:  # results without their pictures
        return None
    if not all(_has_clauses(entry) for entry in entries):
        return None
    return {(index, entry["prompt"]): task_of(entry).complexity() for index, entry in enumerate(entries)}


def _has_clauses(entry: Mapping[str, Any]) -> bool:
    include = entry.get("include")
    return isinstance(include, list) and all(
        isinstance(item, dict) and type(item.get("count")) is int and item["count"] > 0 for item in include
    )


def _system(one: Contestant, tags: Sequence[str], seed: int) -> dict[str, Any]:
    rows = list(by_prompt(one.pooled).values())
    groups = {tag: _group([row["scores"] for row in rows if row["tag"] == tag], seed) for tag in tags}
    return {
        "name": one.name,
        "folders": [str(folder) for folder in one.folders],
        "seeds": [run.get("seed") for run in one.runs],
        "settings": one.runs[0].get("settings"),
        "overall": _group([row["scores"] for row in rows], seed),
        "mean_of_tags": float(np.mean([group["score"] for group in groups.values()])),
        "reported": _reported(one),
        "tags": groups,
        "cost": _cost(one),
    }


def _group(scores: Sequence[Sequence[float]], seed: int) -> dict[str, Any]:
    interval = clustered_interval(scores, seed)
    return {
        "score": interval.estimate,
        "interval": [interval.low, interval.high],
        "prompts": len(scores),
        "pictures": sum(map(len, scores)),
    }


def _reported(one: Contestant) -> float | None:
    """The benchmark's own overall score, which may weigh tags; None if a run has none."""
    overall = [run.get("summary", {}).get("overall", {}) for run in one.runs]
    scores = [part.get("mean_of_tags", part.get("score")) for part in overall]
    return None if any(score is None for score in scores) else float(np.mean(scores))


def _cost(one: Contestant) -> dict[str, Any]:
    return mean_cost([SimpleNamespace(**{name: entry.get(name) for name in COSTS}) for entry in one.pooled["pictures"]])
