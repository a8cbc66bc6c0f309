"""A scorer that asks a judge, a vision-language model, questions about every image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import partial

from typing_extensions import override

from clvr_jax.errors import UsageError
from clvr_jax.evaluation.harness.benchmark import Score
from clvr_jax.evaluation.harness.generation import Progress
from clvr_jax.evaluation.harness.images import BenchmarkImages, SampleIndex
from clvr_jax.evaluation.harness.scoring import Scorer, Scores
from clvr_jax.evaluation.judging.benchmark import JudgedBenchmark, rubric
from clvr_jax.evaluation.judging.questions import JudgeModel, JudgeTask, ReplyFile, judge_images
from clvr_jax.interfaces import Usage


@dataclass(frozen=True)
class JudgeScorer(Scorer):
    """Scores images by the replies of a judge; replies that are on disk are not requested again.

    judge: the model that judges.
    """

    judge: JudgeModel

    @override
    def score(self, images: BenchmarkImages, on_progress: Progress | None = None) -> Scores:
        benchmark = images.benchmark
        if not isinstance(benchmark, JudgedBenchmark):
            raise UsageError(f"{benchmark.title}: a judge does not score it")
        tasks: list[JudgeTask[object]] = []
        indices: list[SampleIndex] = []
        for (index, sample), path in images.existing.items():
            item = images.items[index]
            if questions := benchmark.questions(item):
                load = partial(benchmark.judge_image, path, sample, images.samples)
                tasks.append(JudgeTask(f"{item.id}/{sample}", load, questions))
                indices.append((index, sample))
        reply_file = ReplyFile(images.directory.root / "replies", self.judge)
        try:
            judged = judge_images(self.judge, tasks, reply_file, benchmark.attempts, on_progress)
        finally:
            reply_file.close()
        scores: dict[SampleIndex, Score | None] = dict.fromkeys(images.existing)
        for index_and_sample, about in zip(indices, judged, strict=True):
            score = benchmark.score(images.items[index_and_sample[0]], about.found)
            scores[index_and_sample] = replace(score, refused=about.is_refused)
        # A judge with another wording of a rubric is another judge: their scores are never compared.
        texts = "".join(rubric(name) for name in benchmark.rubrics)
        identity = {
            "name": self.judge.model.name,
            "revision": self.judge.revision,
            "rubric": hashlib.sha256(texts.encode()).hexdigest()[:16],
        }
        usage = sum((about.usage for about in judged), Usage())
        adapted = frozenset[str]().union(*(about.adapted for about in judged))
        return Scores(scores, identity, usage, tuple(sorted(adapted)))
