"""Scoring of all images of a run, and results.json."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from clvr_jax.evaluation.harness.benchmark import Score
from clvr_jax.evaluation.harness.cost import mean_cost
from clvr_jax.evaluation.harness.generation import Progress
from clvr_jax.evaluation.harness.images import BenchmarkImages, SampleIndex
from clvr_jax.evaluation.harness.results import Results
from clvr_jax.evaluation.harness.run_directory import adapted_requests
from clvr_jax.evaluation.harness.summary import ScoredImage, summarize
from clvr_jax.files.atomic_io import write_json
from clvr_jax.interfaces import Usage
from clvr_jax.reasoning.trajectories.trajectory import package_versions


@dataclass(frozen=True)
class Scores:
    """The scores of the images of a run.

    Attributes:
      by_image: the score of each image that exists; None for images that the rules leave out.
      judge: JSON values that identify the scorer; scores of different scorers are never compared.
      usage: the usage of a judge.
      adapted: fields that requests to a judge lacked because its server refuses them, in words.
    """

    by_image: Mapping[SampleIndex, Score | None]
    judge: Mapping[str, str | None]
    usage: Usage = Usage()
    adapted: tuple[str, ...] = ()


class Scorer(abc.ABC):
    """Scores the images of a run: a program, a detector, or a vision-language model that judges them."""

    @abc.abstractmethod
    def score(self, images: BenchmarkImages, on_progress: Progress | None = None) -> Scores:
        """Scores all images that exist (`images.existing`).

        Raises: ClvrError, one line. What was computed so far is kept on disk if it is expensive.
        """


def score_images(images: BenchmarkImages, scorer: Scorer, on_progress: Progress | None = None) -> Results:
    """Scores the images of a run and writes results.json; it can score a run again with another scorer.

    Args:
      images: all images of the run; one that was not generated, because a closed loop ended without an image or an
        endpoint refused the prompt, has the lowest score.
      scorer: scores the others.
      on_progress: called with (images done, all images).
    Returns: the content of results.json: {"benchmark", "judge", "adapted", "generator_adapted", "settings", "seed",
      "samples", "unit", "faults", "summary", "pictures", "versions"}. "generator_adapted" is as `Scores.adapted`, of
      requests for images; "summary" is the content of `summary.summarize` with "cost", "left_out" and "judging";
      "pictures" has an entry for each image, as `ScoredImage.to_json` returns it.
    Raises: ClvrError, one line; then nothing is written.
    """
    benchmark, scores = images.benchmark, scorer.score(images, on_progress)
    scored, left_out = [], set()
    for (index, sample), path in images.files.items():
        item, record = images.items[index], images.records.get((index, sample))
        score = scores.by_image[index, sample] if path is not None else _score_without_image(images, (index, sample))
        if score is None:
            left_out.add(item.id)
        else:
            scored.append(ScoredImage(index, sample, item, score, record))
    content: Results = {
        "benchmark": benchmark.scored_as,
        "judge": dict(scores.judge),
        "adapted": list(scores.adapted),
        "generator_adapted": adapted_requests(images.records.values()),
        **images.provenance,
        "samples": images.samples,
        "unit": benchmark.unit,
        "faults": list(benchmark.faults),
        "summary": {
            **summarize(benchmark, scored),
            "cost": mean_cost([record.cost() for record in images.records.values()]),
            "left_out": sorted(left_out),
            "judging": {name: value for name, value in asdict(scores.usage).items() if value},
        },
        "pictures": [image.to_json() for image in scored],
        "versions": package_versions(),
    }
    write_json(images.directory.root / "results.json", content)
    return content


def _score_without_image(images: BenchmarkImages, index: SampleIndex) -> Score:
    """Returns the score of a prompt without an image, which is the lowest one."""
    correct = False if images.benchmark.is_binary else None
    return Score(0.0, correct, reasons=(f"no image was generated ({images.records[index].outcome})",))
