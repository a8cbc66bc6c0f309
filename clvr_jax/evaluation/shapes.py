"""Runs a benchmark whose pictures a program can check: the shapes world with GenEval's tags, layout and score."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clvr_jax.errors import UsageError
from clvr_jax.evaluation.drawing import all_drawn, draw_missing
from clvr_jax.evaluation.drawn import DrawAll
from clvr_jax.evaluation.layout import Folder
from clvr_jax.evaluation.report import PictureScore, summarize
from clvr_jax.evaluation.statistics import spread
from clvr_jax.files import write_json
from clvr_jax.json_input import JsonObject
from clvr_jax.reasoning.trajectory import package_versions

if TYPE_CHECKING:
    from clvr_jax.evaluation.systems import System

Metadata = Mapping[str, Any]

SHAPES_JUDGE_VERSION = "1"
"""Goes up when the detector or the checker of the shapes world changes a verdict: old scores are of the old judge."""


@dataclass(frozen=True)
class Judgment:
    """Whether a picture shows what its metadata asks for, and if not, why not."""

    correct: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judge:
    """Who decides. Name and version stand in every result: scores of different judges are never compared.

    Attributes:
      name, version: of the judge.
      check: (picture, uint8 (height, width, 3); metadata) -> Judgment.
    """

    name: str
    version: str
    check: Callable[[np.ndarray, Metadata], Judgment]


def shapes_judge() -> Judge:
    """The shapes world's own judge: its detector reads the picture, its checker applies GenEval's rules."""
    from clvr_jax.worlds.shapes.check import check
    from clvr_jax.worlds.shapes.detect import detect
    from clvr_jax.worlds.shapes.metadata import parse_metadata

    def judge(image: np.ndarray, metadata: Metadata) -> Judgment:
        # Read back from the directory of a run, which anyone may have written.
        verdict = check(detect(image), parse_metadata(metadata))
        return Judgment(verdict.correct, verdict.reasons)

    return Judge("shapes detector", SHAPES_JUDGE_VERSION, judge)


def shapes_prompts(split: str = "eval", path: Path | None = None, limit: int | None = None) -> list[dict[str, Any]]:
    """The prompts of the shapes world's benchmark.

    Args:
      split: one of the world's evaluation sets; not used if `path` is given.
      path: JSONL file in GenEval's metadata format.
      limit: at most so many, evenly spaced, so that a short run still meets every tag.
    Raises: ClvrError for a file that is none.
    """
    from clvr_jax.worlds.shapes.prompts import evaluation_prompts, read_prompts

    return spread(read_prompts(path) if path else evaluation_prompts(split), limit)


def run(
    metadata: Sequence[Metadata],
    draw_all: DrawAll,
    out: str | os.PathLike[str],
    judge: Judge,
    *,
    settings: Mapping[str, Any],
    benchmark: str = "shapes",
    seed: int = 0,
    samples: int = 1,
    batch_size: int = 16,
    versions: Mapping[str, str] | None = None,
    device: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Draws what is missing in `out`, scores everything and writes results.json.

    Args:
      metadata: one GenEval metadata per prompt.
      draw_all: draws a batch; never called for pictures that are there already.
      out: folder; see layout.py for its content.
      judge: scores the pictures as they are on disk.
      settings: JSON values that say how the pictures are made (model, steps, guidance, budget ...). A folder drawn with
        other settings, prompts, seed or number of samples is an error.
      benchmark: its name.
      seed: each picture's seed follows from this, its prompt and its sample number only.
      samples: pictures per prompt; GenEval's own number is 4.
      batch_size: prompts per call of `draw_all`; a run that is killed loses at most that many pictures.
      versions: recorded in results.json next to package_versions().
      device: what draws, recorded with each picture.
      on_progress: called with (pictures done, pictures in all).
    Returns: the content of results.json.
    Raises: ClvrError, one line.
    """
    if not metadata:
        raise UsageError(f"{benchmark}: no prompts to draw")
    if samples < 1 or batch_size < 1:
        raise UsageError(f"{benchmark}: samples and batch_size must be at least 1, got {samples} and {batch_size}")
    folder = Folder(Path(out))
    identity = {"benchmark": benchmark, "settings": dict(settings), "seed": seed, "samples": samples}
    folder.prepare(identity, metadata)
    prompts = [entry["prompt"] for entry in metadata]
    draw_missing(folder, prompts, draw_all, seed, samples, batch_size, device, on_progress)
    return score(out, judge, versions)


def measure(
    system: System,
    metadata: Sequence[Metadata],
    out: str | os.PathLike[str],
    *,
    prompts: str,
    limit: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Runs the shapes world's benchmark with a system.

    Args:
      system: draws.
      metadata: what, from `shapes_prompts`.
      out, seed, on_progress: see `run`.
      prompts, limit: recorded, what `metadata` is.
    Returns: the content of results.json.
    Raises: ClvrError, one line.
    """
    return run(
        metadata,
        system.draw_all,
        out,
        shapes_judge(),
        settings={**system.settings, "prompts": prompts, "limit": limit},
        seed=seed,
        batch_size=system.batch_size,
        device=system.device,
        on_progress=on_progress,
    )


def score(out: str | os.PathLike[str], judge: Judge, versions: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Scores a folder whose pictures are all drawn and writes results.json; also to score it again with another judge.

    Returns: {"benchmark", "judge", "settings", "seed", "samples", "summary", "pictures", "versions"}; "summary" is
      report.summarize's, "pictures" holds one PictureScore each.
    Raises: ClvrError if a picture is missing: a score over fewer pictures would be another score.
    """
    folder = Folder(Path(out))
    identity = folder.identity()
    entries = folder.metadata()
    for index, entry in enumerate(entries):
        JsonObject(entry, str(folder.home(index) / "metadata.jsonl")).text("tag")
    places = all_drawn(folder, [entry["prompt"] for entry in entries], identity["seed"], identity["samples"])
    scores = [_score_picture(folder, index, sample, entries[index], judge) for index, sample in places]
    results = {
        "benchmark": identity["benchmark"],
        "judge": {"name": judge.name, "version": judge.version},
        "settings": identity["settings"],
        "seed": identity["seed"],
        "samples": identity["samples"],
        "summary": summarize(scores),
        "pictures": [{**asdict(entry), "reasons": list(entry.reasons)} for entry in scores],
        "versions": {**package_versions(), **(versions or {})},
    }
    write_json(Path(out) / "results.json", results)
    return results


def _score_picture(folder: Folder, index: int, sample: int, metadata: Metadata, judge: Judge) -> PictureScore:
    record = folder.record(index, sample)
    if record.has_picture:
        judgment = judge.check(folder.picture(index, sample), metadata)
    else:
        judgment = Judgment(False, (f"no picture was drawn ({record.outcome})",))
    return PictureScore(
        index=index,
        sample=sample,
        prompt=metadata["prompt"],
        tag=metadata["tag"],
        tier=metadata.get("tier"),
        correct=judgment.correct,
        reasons=judgment.reasons,
        **record.cost(),
    )
