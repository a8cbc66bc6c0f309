"""GenEval++: 280 prompts, seven tags of 40, one image each, a judge with a checklist made of the metadata.

Source: Ye et al. 2025 (arXiv 2508.09987), yejy53/Echo-4o (Apache-2.0), test_scripts/.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.prompt_files import read_entries
from clvr_jax.evaluation.harness.benchmark import Item, Score
from clvr_jax.evaluation.harness.sources import Source, github
from clvr_jax.evaluation.judging.benchmark import JudgedBenchmark, JudgeQuestion, rubric
from clvr_jax.evaluation.judging.replies import json_score
from clvr_jax.files.json_input import UncheckedJSON
from clvr_jax.interfaces.answers import read_json_object

ECHO_4O = ("yejy53/Echo-4o", "28f36d76558e5f53b9deceda78bf025ef0d0ea24")
_FILES = {"test_scripts/Geneval++.jsonl": "6e9a53358cb78d21add55fe5b238cbd99828b86e"}
_WHERE = {"above": "upper", "below": "lower"}


class GenEvalPP(JudgedBenchmark[tuple[bool, str]]):
    """GenEval++: each image is correct or not by one judge; a reply without a verdict counts as not correct."""

    name: ClassVar = "genevalpp"
    title: ClassVar = "GenEval++"
    is_binary: ClassVar = True
    suffixes: ClassVar = (".jpg",)
    source: ClassVar = Source(github(*ECHO_4O, _FILES), license="Apache-2.0")
    rubrics: ClassVar = ("genevalpp",)
    prompts_hint: ClassVar = "test_scripts/Geneval++.jsonl of yejy53/Echo-4o"

    @override
    def read(self, path: Path) -> list[Item]:
        """Reads the prompts; images are numbered from 1."""
        items = []
        for number, (place, entry) in enumerate(read_entries(path, ("tag", "include", "prompt")), start=1):
            try:
                checklist(entry)
            except KeyError as error:
                raise ClvrError(f"{place}: a clause lacks {error}; each needs a class and a count") from error
            except (TypeError, AttributeError, ValueError, OverflowError) as error:
                raise ClvrError(f"{place}: include and exclude must be lists of clauses ({error})") from error
            items.append(Item(str(number), entry["prompt"].strip(), entry["tag"], entry))
        return items

    @override
    def questions(self, item: Item) -> list[JudgeQuestion[tuple[bool, str]]]:
        text = rubric("genevalpp").format(prompt=item.prompt, checklist="\n".join(checklist(item.record)))
        return [JudgeQuestion("verdict", text, _verdict, 200, is_json=True)]

    @override
    def score(self, item: Item, answers: Mapping[str, tuple[bool, str] | None]) -> Score:
        verdict = answers["verdict"]
        if verdict is None:
            return Score.binary(False, ("the judge gave no verdict",), readable=False)
        correct, reason = verdict
        return Score.binary(correct, () if correct else (reason,))


def checklist(metadata: UncheckedJSON) -> list[str]:
    """Returns the requirements of the metadata, one line each: classes, counts, colors, sizes, regions and limits."""
    lines = []
    include, exclude = metadata["include"], metadata.get("exclude", [])
    if not isinstance(include, list) or not isinstance(exclude, list):
        raise TypeError("wrong type")
    for clause in include:
        name, count = clause["class"], int(clause["count"])
        words = [clause.get("size"), clause.get("color"), name]
        region = clause.get("region")
        where = f" in the {_WHERE.get(region, region)} part of the picture" if region else ""
        lines.append(f"- {count} x {' '.join(word for word in words if word)}{where}")
    for clause in exclude:
        lines.append(f"- at most {int(clause['count']) - 1} x {clause['class']} in the whole picture")
    return lines


def _verdict(reply: str) -> tuple[bool, str]:
    correct = json_score(reply, "correct", 0, 1, whole=True) == 1
    return correct, str(read_json_object(reply).get("reason") or "the judge gave no reason")
