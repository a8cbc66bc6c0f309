"""PRISM-Bench: seven tracks of 100 prompts, alignment and aesthetics from 0 to 10 by a judge, reported times 10.

The captions have no license and no pinned URL, so the user must provide them.

Source: Fang et al. 2025 (arXiv 2509.09680), official directory layout and evaluation/eval_gpt41.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.prompt_files import benchmark_files, read_entries
from clvr_jax.evaluation.harness.benchmark import Item, Score
from clvr_jax.evaluation.judging.benchmark import JudgedBenchmark, JudgeQuestion, rubric
from clvr_jax.evaluation.judging.replies import json_score
from clvr_jax.files.file_names import file_name

TRACKS = ("imagination", "entity", "text_rendering", "style", "affection", "composition", "long_text")
_FOCUS = {
    "imagination": "Is the impossible or invented idea of the prompt really there, whole, and not made ordinary?",
    "entity": "Is the named person, place, work or species the right one, recognizable by its own scores?",
    "text_rendering": "Is every word asked for there, letter for letter, readable, where and as it should be?",
    "style": "First the content; then, is the style the one that was asked for, in every part of the picture?",
    "affection": "First the content; then, do light, color and composition carry the mood, without a mere cliche?",
    "composition": "Are all objects there, in their numbers, each with its own attributes, in the relations asked for?",
    "long_text": "Go through the text detail by detail: the main things first, then every lesser one.",
}


class Prism(JudgedBenchmark[float]):
    """PRISM-Bench: the mean of alignment and aesthetics over all images, times 10."""

    name: ClassVar = "prism"
    title: ClassVar = "PRISM-Bench"
    unit: ClassVar = "0 to 100"
    rubrics: ClassVar = ("prism_alignment", "prism_aesthetic")
    prompts_hint: ClassVar = (
        "the directory captions/en of the official repository (linked from flux-reason-6m.github.io) with "
        + ", ".join(f"{track}.jsonl" for track in TRACKS)
    )

    @override
    def read(self, path: Path) -> list[Item]:
        """Reads the prompts; a single file is named after its track, and images are numbered from 0 in each track."""
        items = []
        for file in benchmark_files(path, [f"{track}.jsonl" for track in TRACKS]):
            track = _track(file)
            for number, (_, entry) in enumerate(read_entries(file, ("prompt",))):
                items.append(Item(f"{track}/{number}", entry["prompt"], track, entry))
        return items

    def image_name(self, item: Item) -> str:
        """Returns the file name in the official layout, which has a directory for each track."""
        track, _, number = item.id.partition("/")
        return f"{file_name(track)}/{file_name(number)}"

    @override
    def questions(self, item: Item) -> list[JudgeQuestion[float]]:
        alignment = rubric("prism_alignment").format(prompt=item.prompt, focus=_FOCUS[item.tag])
        aesthetic = rubric("prism_aesthetic").format(prompt=item.prompt)
        return [
            JudgeQuestion("alignment", alignment, _score, 4096, is_json=True),
            JudgeQuestion("aesthetic", aesthetic, _score, 4096, is_json=True),
        ]

    @override
    def score(self, item: Item, answers: Mapping[str, float | None]) -> Score:
        unread = [name for name, score in answers.items() if score is None]
        parts = {name: score or 0.0 for name, score in answers.items()}
        reasons = tuple(f"the judge gave no readable score for {name}" for name in unread)
        return Score(10 * sum(parts.values()) / len(parts), parts=parts, reasons=reasons, readable=not unread)

    def weights(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Returns weights for the mean over all images, as in the official script."""
        return {tag: float(count) for tag, count in counts.items()}


def _score(reply: str) -> float:
    return json_score(reply, "score", 0, 10)


def _track(file: Path) -> str:
    if file.stem not in TRACKS:
        raise ClvrError(f"{file}: a file of PRISM-Bench must have the name of its track: {', '.join(TRACKS)}")
    return file.stem
