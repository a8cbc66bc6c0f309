"""Scoring of all images of a benchmark by a judge or a detector, and results.json."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from clvr_jax.atomic_io import write_json
from clvr_jax.evaluation.benchmarks.geneval import Detector, recorded_score
from clvr_jax.evaluation.harness.benchmark import Benchmark, JudgedBenchmark, Score, rubric
from clvr_jax.evaluation.harness.images import BenchmarkImages, SampleIndex
from clvr_jax.evaluation.harness.run_directory import adapted_requests
from clvr_jax.evaluation.harness.summary import summarize
from clvr_jax.evaluation.judging.questions import JudgeModel, JudgeTask, ReplyFile, judge_images
from clvr_jax.evaluation.reporting.run import mean_cost
from clvr_jax.image_io import read_encoded
from clvr_jax.interfaces import Usage
from clvr_jax.reasoning.trajectory import package_versions

Progress = Callable[[int, int], None]


def score_judged(
    benchmark: JudgedBenchmark, images: BenchmarkImages, judge: JudgeModel, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Scores all images by the replies of a judge; replies that are on disk are not requested again.

    Args:
      benchmark: the rules; its prompts are those of `images`.
      images: the images.
      judge: the model that judges.
      on_progress: called with (images done, all images).
    Returns: the content of results.json, as `results` returns it.
    Raises: ClvrError, one line; earlier replies are kept on disk.
    """
    tasks, indices = [], []
    for (index, sample), path in images.files.items():
        item = images.items[index]
        questions = benchmark.questions(item)
        if path is not None and questions:
            load = partial(benchmark.judge_image, path, sample, images.samples)
            tasks.append(JudgeTask(f"{item.id}/{sample}", load, questions))
            indices.append((index, sample))
    reply_file = ReplyFile(images.directory.root / "replies", judge)
    try:
        judged = judge_images(judge, tasks, reply_file, benchmark.attempts, on_progress)
    finally:
        reply_file.close()
    judgments = dict(zip(indices, judged, strict=True))
    scores: dict[SampleIndex, Score | None] = {}
    for (index, sample), path in images.files.items():
        if path is None:
            scores[index, sample] = _score_without_image(images, (index, sample))
        elif (about := judgments.get((index, sample))) is not None:
            score = benchmark.score(images.items[index], about.found)
            scores[index, sample] = replace(score, refused=about.is_refused)
        else:
            scores[index, sample] = None
    # A judge with another wording of a rubric is another judge: their scores are never compared.
    texts = "".join(rubric(name) for name in benchmark.rubrics)
    identity = {
        "name": judge.model.name,
        "revision": judge.revision,
        "rubric": hashlib.sha256(texts.encode()).hexdigest()[:16],
    }
    usage = sum((about.usage for about in judged), Usage())
    adapted = sorted(frozenset[str]().union(*(about.adapted for about in judged)))
    return results(benchmark, images, scores, identity, usage, adapted)


def score_detected(images: BenchmarkImages, detector: Detector, on_progress: Progress | None = None) -> dict[str, Any]:
    """Scores GenEval's images by the objects that a detector finds; detections on disk are not computed again.

    Args:
      images: the images.
      detector: the models that find objects.
      on_progress: called with (images done, all images).
    Returns: the content of results.json, as `results` returns it.
    Raises: ClvrError, one line.
    """
    scores: dict[SampleIndex, Score | None] = {}
    for number, (index, path) in enumerate(images.files.items()):
        if on_progress:
            on_progress(number, len(images.files))
        if path is None:
            scores[index] = _score_without_image(images, index)
            continue
        record = images.directory.prompt_dir(index[0]) / "detections" / f"{index[1]:04d}.json"
        scores[index] = recorded_score(record, read_encoded(path), images.items[index[0]], detector)
    if on_progress:
        on_progress(len(images.files), len(images.files))
    identity = {"name": detector.name, "revision": detector.revision}
    return results(images.benchmark, images, scores, identity, Usage())


def results(
    benchmark: Benchmark,
    images: BenchmarkImages,
    scores: Mapping[SampleIndex, Score | None],
    judge: Mapping[str, Any],
    usage: Usage,
    adapted: Sequence[str] = (),
) -> dict[str, Any]:
    """Summarizes scores and writes results.json.

    Args:
      benchmark: the rules.
      images: the images that were scored.
      scores: the score of each image; None for images that the rules leave out.
      judge: the identity of the judge; scores of different judges are never compared.
      usage: the usage of the judge.
      adapted: fields that requests to the judge lacked because its server refuses them, in words.
    Returns: {"benchmark", "judge", "adapted", "generator_adapted", "settings", "seed", "samples", "unit", "faults",
      "summary", "pictures", "versions"}; "generator_adapted" is as `adapted`, of requests for images; "summary" is
      {"tags": {tag: group}, "overall": group or {"score": None, "reason"}, "parts", "unreadable", "refused",
      "left_out", "cost", "judging"} with group = {"score", "interval", "prompts", "pictures"}; intervals are 95 %.
    """
    rows = []
    for (index, sample), score in scores.items():
        if score is None:
            continue
        item, record = images.items[index], images.records.get((index, sample))
        rows.append(
            {
                "index": index,
                "sample": sample,
                "id": item.id,
                "prompt": item.prompt,
                "tag": item.tag,
                "tier": None,
                **asdict(score),
                "reasons": list(score.reasons),
                **({} if record is None else record.cost()),
            }
        )
    content = {
        "benchmark": benchmark.scored_as,
        "judge": dict(judge),
        "adapted": list(adapted),
        "generator_adapted": adapted_requests(images.records.values()),
        **images.provenance,
        "samples": images.samples,
        "unit": benchmark.unit,
        "faults": list(benchmark.faults),
        "summary": {
            **summarize(benchmark, rows),
            "cost": mean_cost(list(images.records.values())),
            "left_out": sorted({images.items[index].id for (index, _), score in scores.items() if score is None}),
            "judging": {name: value for name, value in asdict(usage).items() if value},
        },
        "pictures": rows,
        "versions": package_versions(),
    }
    write_json(images.directory.root / "results.json", content)
    return content


def _score_without_image(images: BenchmarkImages, index: SampleIndex) -> Score:
    """Returns the score of a prompt without an image, which is the lowest one."""
    correct = False if images.benchmark.is_binary else None
    return Score(0.0, correct, reasons=(f"no image was generated ({images.records[index].outcome})",))
