"""A scorer that asks a judge, a vision-language model, questions about every image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from typing_extensions import override

from clvr_jax.errors import UsageError
from clvr_jax.evaluation.harness.benchmark import Item, Score
from clvr_jax.evaluation.harness.generation import Progress
from clvr_jax.evaluation.harness.images import BenchmarkImages, SampleIndex
from clvr_jax.evaluation.harness.scoring import Scorer, Scores
from clvr_jax.evaluation.judging.benchmark import Answer, JudgedBenchmark, JudgeQuestion, rubric
from clvr_jax.evaluation.judging.official import ScriptPrompt
from clvr_jax.evaluation.judging.questions import JudgeModel, JudgeTask, ReplyFile, judge_images
from clvr_jax.interfaces import Usage

Rubric = Literal["ours", "official"]
"""Whose words the judge reads."""


@dataclass(frozen=True)
class JudgeScorer(Scorer):
    """Scores images by the replies of a judge; replies that are on disk are not requested again.

    judge: the model that judges. rubric: "ours", the texts of this package, or "official", the prompt of the
    benchmark's own script, with which published scores were made.
    """

    judge: JudgeModel
    rubric: Rubric = "ours"

    @override
    def score(self, images: BenchmarkImages, on_progress: Progress | None = None) -> Scores:
        benchmark = images.benchmark
        if not isinstance(benchmark, JudgedBenchmark):
            raise UsageError(f"{benchmark.title}: a judge does not score it")
        prompt = official_prompt(benchmark) if self.rubric == "official" else None
        tasks: list[JudgeTask[object]] = []
        indices: list[SampleIndex] = []
        for (index, sample), path in images.existing.items():
            item = images.items[index]
            if questions := [_reworded(benchmark, item, asked, prompt) for asked in benchmark.questions(item)]:
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
        words = hashlib.sha256("".join(rubric(name) for name in benchmark.rubrics).encode()).hexdigest()[:16]
        if prompt and benchmark.official:
            words = f"official, {benchmark.official.identity}"
        identity = {
            "name": self.judge.model.name,
            "revision": self.judge.revision,
            "rubric": words,
        }
        usage = sum((about.usage for about in judged), Usage())
        adapted = frozenset[str]().union(*(about.adapted for about in judged))
        return Scores(scores, identity, usage, tuple(sorted(adapted)))


def official_prompt(benchmark: JudgedBenchmark[Answer]) -> ScriptPrompt:
    """Returns the prompt of a benchmark's own script.

    Raises: UsageError if the script has none that can be used; ClvrError if the script cannot be fetched.
    """
    if benchmark.official is None:
        raise UsageError(
            f"{benchmark.title}: its script has no text of a prompt for the judge; leave --rubric official out"
        )
    return benchmark.official.fetch(benchmark.name)


def _reworded(
    benchmark: JudgedBenchmark[Answer], item: Item, question: JudgeQuestion[Answer], prompt: ScriptPrompt | None
) -> JudgeQuestion[Answer]:
    """Returns a question in the words of the official prompt; as it is if that is None."""
    if prompt is None or benchmark.official is None:
        return question
    wording = prompt.wording(benchmark.official_names(item, question))
    return replace(
        question,
        text=wording.text,
        system=wording.system,
        image_first=wording.image_first,
        max_tokens=benchmark.official.max_tokens,
    )
