"""GenEval 2: 800 prompts with 3 to 10 atoms, and Soft-TIFA: how probable the judge finds the right answers.

An atom is an object, an attribute, a relation, a verb or a count. A question about each is asked by itself; its score
is the probability that the judge's reply begins with the right word.

Source: Kamath et al. 2025 (arXiv 2512.16853), facebookresearch/GenEval2 (CC BY-NC 4.0), evaluation.py and
soft_tifa_analysis.py. The official judge is Qwen3-VL-8B-Instruct.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.prompt_files import read_entries
from clvr_jax.evaluation.harness.benchmark import Item, Score
from clvr_jax.evaluation.harness.sources import Source, github
from clvr_jax.evaluation.judging.benchmark import JudgedBenchmark, JudgeQuestion, probability_question, rubric
from clvr_jax.evaluation.judging.official import OfficialPrompt
from clvr_jax.files.json_input import UncheckedJSON

_REPOSITORY = "facebookresearch/GenEval2"
_COMMIT = "a6e82d2289e8d418f27f0adee77908b07060eea3"
_FILES = {"geneval2_data.jsonl": "823f48414446157fe252f92e3c60c803c33c303c"}
_SCRIPT = {"evaluation.py": "0932a1420aed08f28b7e385810337239264ed7c9"}
_LICENSE = "CC BY-NC 4.0: for non-commercial use only"
SKILLS = ("object", "attribute", "count", "position", "verb")
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ATOMS = range(1, 101)
"""Numbers of atoms that a file may state."""


class GenEval2(JudgedBenchmark[float]):
    """GenEval 2: the geometric mean of the probabilities of one prompt, averaged over prompts, times 100.

    This is Soft-TIFA GM, the estimate for whole prompts. The parts are Soft-TIFA AM, the arithmetic mean, which
    estimates single atoms, of all atoms and of those of each skill. Tiers are numbers of atoms.
    """

    name: ClassVar = "geneval2"
    title: ClassVar = "GenEval 2"
    unit: ClassVar = "0 to 100"
    source: ClassVar = Source(github(_REPOSITORY, _COMMIT, _FILES), license=_LICENSE)
    rubrics: ClassVar = ("geneval2",)
    prompts_hint: ClassVar = "geneval2_data.jsonl of facebookresearch/GenEval2"
    official: ClassVar = OfficialPrompt(
        Source(github(_REPOSITORY, _COMMIT, _SCRIPT), license=_LICENSE), "soft_tifa", max_tokens=16
    )

    @property
    @override
    def attempts(self) -> int:
        return 1  # every reply has a first token

    @override
    def read(self, path: Path) -> list[Item]:
        """Reads the prompts; images are numbered from 0, in the order of the file."""
        items = []
        for number, (place, entry) in enumerate(read_entries(path, ("prompt", "atom_count", "vqa_list", "skills"))):
            _check(entry, place)
            items.append(_item(f"{number:03d}", entry["prompt"].strip(), entry))
        return items

    @override
    def item(self, metadata: UncheckedJSON, index: int) -> Item:
        item = super().item(metadata, index)
        _check(item.record, f"prompt {index}")
        return replace(item, tier=item.record["atom_count"])

    @override
    def weights(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Returns weights by which the overall score is the mean over prompts, as in the official script."""
        return {tag: float(count) for tag, count in counts.items()}

    @override
    def questions(self, item: Item) -> list[JudgeQuestion[float]]:
        text = rubric("geneval2")
        return [
            probability_question(str(number), text.format(question=question), accepted(question, answer))
            for number, (question, answer) in enumerate(item.record["vqa_list"])
        ]

    @override
    def official_names(self, item: Item, question: JudgeQuestion[float]) -> dict[str, object]:
        return {"question": item.record["vqa_list"][int(question.name)][0]}

    @override
    def score(self, item: Item, answers: Mapping[str, float | None]) -> Score:
        atoms = item.record["vqa_list"]
        given = [answers[str(number)] for number in range(len(atoms))]
        values = [value or 0.0 for value in given]
        by_skill: dict[str, list[float]] = {}
        for skill, value in zip(item.record["skills"], values, strict=True):
            by_skill.setdefault(skill, []).append(100 * value)
        return Score(
            100 * geometric_mean(values),
            parts={
                "all atoms": 100 * math.fsum(values) / len(values),
                **{skill: math.fsum(by_skill[skill]) / len(by_skill[skill]) for skill in SKILLS if skill in by_skill},
            },
            reasons=tuple(
                f"{question} {answer} ({value:.2f})"
                for (question, answer), value in zip(atoms, values, strict=True)
                if value < 0.5
            ),
            readable=None not in given,
        )


def accepted(question: str, answer: str) -> tuple[str, ...]:
    """Returns the words that answer a question, in lower case: yes, or a number as a word and as digits."""
    if not question.startswith("How many"):
        return ("yes",)
    word = answer.lower()
    return (word, str(_NUMBERS.index(word) + 1)) if word in _NUMBERS else (word,)


def geometric_mean(values: list[float]) -> float:
    """Returns the geometric mean of values of 0 or more; 0 if one of them is 0."""
    return 0.0 if min(values) <= 0 else math.exp(math.fsum(map(math.log, values)) / len(values))


def _item(id: str, prompt: str, record: UncheckedJSON) -> Item:
    atoms = record["atom_count"]
    return Item(id, prompt, f"{atoms} atoms", record, tier=atoms)


def _check(entry: UncheckedJSON, place: str) -> None:
    """Raises ClvrError for an entry whose questions, answers and skills do not fit together."""
    atoms, questions, skills = entry["atom_count"], entry["vqa_list"], entry["skills"]
    if type(atoms) is not int or atoms not in _ATOMS:
        raise ClvrError(f"{place}: atom_count must be a number from {_ATOMS[0]} to {_ATOMS[-1]}, got {atoms!r:.80}")
    is_list = isinstance(questions, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) and text for text in pair)
        for pair in questions
    )
    if not is_list or not questions:
        raise ClvrError(f"{place}: vqa_list must be a list of pairs of a question and its answer")
    if not isinstance(skills, list) or len(skills) != len(questions) or not all(skill in SKILLS for skill in skills):
        raise ClvrError(f"{place}: skills must name one of {', '.join(SKILLS)} for each question")
