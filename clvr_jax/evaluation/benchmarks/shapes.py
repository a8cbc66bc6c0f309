"""Benchmark of the shapes world, whose images a program checks; tags, layout and score are GenEval's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from typing_extensions import override

from clvr_jax.evaluation.benchmarks.geneval import GenEvalFormat
from clvr_jax.evaluation.harness.benchmark import Item, Score
from clvr_jax.evaluation.harness.generation import Progress
from clvr_jax.evaluation.harness.images import BenchmarkImages, SampleIndex
from clvr_jax.evaluation.harness.results import Results
from clvr_jax.evaluation.harness.run import run
from clvr_jax.evaluation.harness.scoring import Scorer, Scores
from clvr_jax.evaluation.statistics import spread
from clvr_jax.evaluation.systems.system import System
from clvr_jax.files.image_io import read_image
from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.worlds.shapes.metadata import Metadata

SHAPES_JUDGE_VERSION = "1"
"""Version of the checker: increase it when the detector or the rules of the shapes world change a verdict."""


class Shapes(GenEvalFormat):
    """The shapes world: each image is correct or not by its objects; the overall score is the mean over tags."""

    name: ClassVar = "shapes"
    title: ClassVar = "shapes"
    counts_images: ClassVar = True
    prompts_hint: ClassVar = "a JSONL file in the format of GenEval's metadata"

    @override
    def read(self, path: Path) -> list[Item]:
        return self.items(shapes_prompts(path=path))

    def items(self, metadata: Sequence[UncheckedJSON]) -> list[Item]:
        """Returns the prompts of metadata in GenEval's format."""
        return [self.item(entry, index) for index, entry in enumerate(metadata)]


@dataclass(frozen=True)
class ImageChecker(Scorer):
    """A scorer that decides with a program whether each image is correct.

    Attributes:
      name, version: recorded in every result, because scores of different checkers are never compared.
      check: (image, uint8 (height, width, 3); metadata) -> score, which is binary.
    """

    name: str
    version: str
    check: Callable[[np.ndarray, UncheckedJSON], Score]

    @property
    def identity(self) -> dict[str, str]:
        """The JSON value that identifies the checker in results."""
        return {"name": self.name, "version": self.version}

    def is_correct(self, image: np.ndarray, metadata: UncheckedJSON) -> bool:
        """Returns whether an image, uint8 (height, width, 3), is correct."""
        return bool(self.check(image, metadata).correct)

    @override
    def score(self, images: BenchmarkImages, on_progress: Progress | None = None) -> Scores:
        scores: dict[SampleIndex, Score | None] = {}
        for (index, sample), path in images.existing.items():
            scores[index, sample] = self.check(read_image(path), images.items[index].record)
            if on_progress:
                on_progress(len(scores), len(images.existing))
        return Scores(scores, self.identity)


def shapes_checker() -> ImageChecker:
    """Returns the checker of the shapes world, which applies GenEval's rules to the objects that its detector finds."""
    from clvr_jax.worlds.shapes.check import check
    from clvr_jax.worlds.shapes.detect import detect
    from clvr_jax.worlds.shapes.metadata import parse_metadata

    def check_image(image: np.ndarray, metadata: UncheckedJSON) -> Score:
        # The metadata come from the directory of a run, which any program may have written.
        verdict = check(detect(image), parse_metadata(metadata))
        return Score.binary(verdict.correct, verdict.reasons)

    return ImageChecker("shapes detector", SHAPES_JUDGE_VERSION, check_image)


def shapes_prompts(split: str = "eval", path: Path | None = None, limit: int | None = None) -> list[Metadata]:
    """Returns the metadata of the prompts of the shapes world's benchmark.

    Args:
      split: one of the world's evaluation sets; not used if `path` is given.
      path: JSONL file in GenEval's metadata format.
      limit: maximum number of prompts, evenly spaced over the set, so that a short run has every tag; None for all.
    Raises: ClvrError for a file that does not have this format.
    """
    from clvr_jax.worlds.shapes.prompts import evaluation_prompts, read_prompts

    return spread(read_prompts(path) if path else evaluation_prompts(split), limit)


def run_shapes(
    system: System,
    metadata: Sequence[UncheckedJSON],
    out: str | os.PathLike[str],
    *,
    prompts: str,
    limit: int | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Results:
    """Runs the shapes world's benchmark with a system, one image for each prompt.

    Args:
      system: generates the images.
      metadata: the prompts, from `shapes_prompts`.
      out, seed, on_progress: as in `harness.run.run`.
      prompts: name of the set of prompts, recorded in the settings.
      limit: maximum number of prompts, recorded in the settings.
    Returns: the content of results.json.
    Raises: ClvrError, one line.
    """
    benchmark, settings = Shapes(), dict[str, JSON](prompts=prompts, limit=limit)
    items = benchmark.items(metadata)
    scorer = shapes_checker()
    return run(benchmark, items, system, out, scorer, settings=settings, seed=seed, on_progress=on_progress)
