"""Benchmark of the shapes world, whose images a program checks; tags, layout and score are GenEval's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clvr_jax.atomic_io import write_json
from clvr_jax.errors import UsageError
from clvr_jax.evaluation.harness.generation import complete_samples, generate_missing
from clvr_jax.evaluation.harness.run_directory import RunDirectory, adapted_requests
from clvr_jax.evaluation.reporting.run import ImageScore, summarize
from clvr_jax.evaluation.statistics import spread
from clvr_jax.evaluation.systems.system import GenerateFn
from clvr_jax.json_input import JsonObject
from clvr_jax.reasoning.trajectory import package_versions

if TYPE_CHECKING:
    from clvr_jax.evaluation.systems.system import System

Metadata = Mapping[str, Any]

SHAPES_JUDGE_VERSION = "1"
"""Version of the judge: increase it when the detector or the checker of the shapes world changes a verdict."""


@dataclass(frozen=True)
class Judgment:
    """A verdict on one image: whether it is correct by its metadata, and the reasons why not."""

    correct: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judge:
    """A function that decides whether an image is correct.

    Attributes:
      name, version: recorded in every result, because scores of different judges are never compared.
      check: (image, uint8 (height, width, 3); metadata) -> Judgment.
    """

    name: str
    version: str
    check: Callable[[np.ndarray, Metadata], Judgment]


def shapes_judge() -> Judge:
    """Returns the judge of the shapes world, which applies GenEval's rules to the objects that its detector finds."""
    from clvr_jax.worlds.shapes.check import check
    from clvr_jax.worlds.shapes.detect import detect
    from clvr_jax.worlds.shapes.metadata import parse_metadata

    def judge(image: np.ndarray, metadata: Metadata) -> Judgment:
        # The metadata come from the directory of a run, which any program may have written.
        verdict = check(detect(image), parse_metadata(metadata))
        return Judgment(verdict.correct, verdict.reasons)

    return Judge("shapes detector", SHAPES_JUDGE_VERSION, judge)


def shapes_prompts(split: str = "eval", path: Path | None = None, limit: int | None = None) -> list[dict[str, Any]]:
    """Returns the metadata of the prompts of the shapes world's benchmark.

    Args:
      split: one of the world's evaluation sets; not used if `path` is given.
      path: JSONL file in GenEval's metadata format.
      limit: maximum number of prompts, evenly spaced over the set, so that a short run has every tag; None for all.
    Raises: ClvrError for a file that does not have this format.
    """
    from clvr_jax.worlds.shapes.prompts import evaluation_prompts, read_prompts

    return spread(read_prompts(path) if path else evaluation_prompts(split), limit)


def run(
    metadata: Sequence[Metadata],
    generate: GenerateFn,
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
    """Generates the images that are missing in `out`, scores all images and writes results.json.

    Args:
      metadata: one GenEval metadata per prompt.
      generate: generates a batch of images; called only for images that do not exist yet.
      out: directory with the layout of `run_directory`.
      judge: scores the images as they are on disk.
      settings: JSON values that identify the system (model, steps, guidance, budget ...). A directory with images of
        other settings, prompts, seed or number of samples is an error.
      benchmark: name of the benchmark.
      seed: of the run; the seed of an image depends only on it, the prompt and the sample index.
      samples: images per prompt; GenEval's own number is 4.
      batch_size: prompts per call of `generate`; a run that is killed loses at most that many images.
      versions: recorded in results.json next to package_versions().
      device: the device that generates, recorded with each image.
      on_progress: called with (images done, all images).
    Returns: the content of results.json.
    Raises: ClvrError, one line.
    """
    if not metadata:
        raise UsageError(f"{benchmark}: there are no prompts; give at least one")
    if samples < 1 or batch_size < 1:
        raise UsageError(f"{benchmark}: samples and batch_size must be at least 1, got {samples} and {batch_size}")
    directory = RunDirectory(Path(out))
    identity = {"benchmark": benchmark, "settings": dict(settings), "seed": seed, "samples": samples}
    directory.prepare(identity, metadata)
    prompts = [entry["prompt"] for entry in metadata]
    generate_missing(directory, prompts, generate, seed, samples, batch_size, device, on_progress)
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
      system: generates the images.
      metadata: the prompts, from `shapes_prompts`.
      out, seed, on_progress: as in `run`.
      prompts: name of the set of prompts, recorded in the settings.
      limit: maximum number of prompts, recorded in the settings.
    Returns: the content of results.json.
    Raises: ClvrError, one line.
    """
    return run(
        metadata,
        system.generate,
        out,
        shapes_judge(),
        settings={**system.settings, "prompts": prompts, "limit": limit},
        seed=seed,
        batch_size=system.batch_size,
        device=system.device,
        on_progress=on_progress,
    )


def score(out: str | os.PathLike[str], judge: Judge, versions: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Scores the images of a finished run and writes results.json; it can score a run again with another judge.

    Returns: {"benchmark", "judge", "generator_adapted", "settings", "seed", "samples", "summary", "pictures",
      "versions"}; "summary" is the content of report.summarize, "pictures" is a list of ImageScore.
    Raises: ClvrError if an image is missing, because a score over fewer images is not comparable.
    """
    directory = RunDirectory(Path(out))
    identity = directory.identity()
    entries = directory.metadata()
    for index, entry in enumerate(entries):
        JsonObject(entry, str(directory.prompt_dir(index) / "metadata.jsonl")).text("tag")
    indices = complete_samples(directory, [entry["prompt"] for entry in entries], identity["seed"], identity["samples"])
    scores = [_score_image(directory, index, sample, entries[index], judge) for index, sample in indices]
    results = {
        "benchmark": identity["benchmark"],
        "judge": {"name": judge.name, "version": judge.version},
        "generator_adapted": adapted_requests(directory.record(*each) for each in indices),
        "settings": identity["settings"],
        "seed": identity["seed"],
        "samples": identity["samples"],
        "summary": summarize(scores),
        "pictures": [{**asdict(entry), "reasons": list(entry.reasons)} for entry in scores],
        "versions": {**package_versions(), **(versions or {})},
    }
    write_json(Path(out) / "results.json", results)
    return results


def _score_image(directory: RunDirectory, index: int, sample: int, metadata: Metadata, judge: Judge) -> ImageScore:
    record = directory.record(index, sample)
    if record.has_image:
        judgment = judge.check(directory.image(index, sample), metadata)
    else:
        judgment = Judgment(False, (f"no image was generated ({record.outcome})",))
    return ImageScore(
        index=index,
        sample=sample,
        prompt=metadata["prompt"],
        tag=metadata["tag"],
        tier=metadata.get("tier"),
        correct=judgment.correct,
        reasons=judgment.reasons,
        **record.cost(),
    )
