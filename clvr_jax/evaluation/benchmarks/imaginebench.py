"""ImagineBench: 270 fantastic variants of known things, three scores from 0 to 10 by a judge.

Source: Ye et al. 2025 (arXiv 2508.09987), yejy53/Echo-4o (Apache-2.0), test_scripts/Eval-gpt-4.1-Imagine.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from typing_extensions import override

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.genevalpp import ECHO_4O
from clvr_jax.evaluation.benchmarks.prompt_files import check_unique_ids, read_entries
from clvr_jax.evaluation.harness.benchmark import Item, Score
from clvr_jax.evaluation.harness.sources import Source, github
from clvr_jax.evaluation.judging.benchmark import JudgedBenchmark, JudgeQuestion, rubric
from clvr_jax.evaluation.judging.official import OfficialPrompt
from clvr_jax.evaluation.judging.replies import labeled_scores
from clvr_jax.files.json_input import shown
from clvr_jax.interfaces.answers import AnswerError

Rules = Literal["official", "fixed"]

AXES = ("Fantasy Fulfillment", "Identity Preservation", "Aesthetic Quality")
_NO_SCORE = -1.0
"""The official script's score where a reply has none."""
_FILES = {"test_scripts/Imagine.jsonl": "1ce2e29424077821b1820525224ca9d7f98e0331"}
_SCRIPT = {"test_scripts/Eval-gpt-4.1-Imagine.py": "12414350233adad5cbcded819a0f561aa0493f94"}
_GROUPS = {
    "COLOR": "Attribute shift",
    "SHAPE": "Attribute shift",
    "SIZE": "Attribute shift",
    "MATERIAL": "Hybridization",
    "COMBINATION": "Hybridization",
    "TIME": "Spatiotemporal",
    "ENVIRONMENT": "Spatiotemporal",
    "Multi-Object": "Multi-Object",
}
_WEIGHTS = {"Attribute shift": 3.0, "Hybridization": 2.0, "Spatiotemporal": 2.0, "Multi-Object": 2.0}


@dataclass(frozen=True)
class ImagineBench(JudgedBenchmark[dict[str, float]]):
    """ImagineBench: .8 min(fantasy, identity) + .2 aesthetics, with weights 3 : 2 : 2 : 2 of the groups.

    rules: "official" parses replies and averages as the official script does, including its faults; "fixed" parses
    strictly and counts all groups.
    """

    rules: Rules = "fixed"

    name: ClassVar = "imaginebench"
    title: ClassVar = "ImagineBench"
    unit: ClassVar = "0 to 10"
    suffixes: ClassVar = (".png", ".jpg", ".jpeg", ".webp")
    source: ClassVar = Source(github(*ECHO_4O, _FILES), license="Apache-2.0")
    rubrics: ClassVar = ("imaginebench",)
    prompts_hint: ClassVar = "test_scripts/Imagine.jsonl of yejy53/Echo-4o"
    official: ClassVar = OfficialPrompt(
        Source(github(*ECHO_4O, _SCRIPT), license="Apache-2.0"), "build_messages", max_tokens=1024
    )

    @property
    @override
    def scored_as(self) -> str:
        return f"{self.name}-{self.rules}"

    @property
    def attempts(self) -> int:
        """The number of attempts per question; 1 by the official rules."""
        return 3 if self.rules == "fixed" else 1

    @property
    @override
    def faults(self) -> tuple[str, ...]:
        if self.rules == "fixed":
            return ()
        return (
            "Multi-Object is left out of the overall score (the script weighs it under another name)",
            "a label in bold, or none, is read as -1",
            "of several scores for a label the last counts, and what is above 10 counts as 10",
        )

    @override
    def read(self, path: Path) -> list[Item]:
        items = []
        for place, entry in read_entries(path, ("id", "instruction", "note", "type")):
            if entry["type"] not in _GROUPS:
                raise ClvrError(f"{place}: type {entry['type']!r} must be one of {', '.join(_GROUPS)}")
            if not isinstance(entry["id"], str | int):
                raise ClvrError(f"{place}: id must be a string or an integer, got {shown(entry['id'])}")
            items.append((place, Item(str(entry["id"]), entry["instruction"], _GROUPS[entry["type"]], entry)))
        return check_unique_ids(items)

    @override
    def questions(self, item: Item) -> list[JudgeQuestion[dict[str, float]]]:
        text = rubric("imaginebench").format(prompt=item.prompt, explanation=item.record["note"])
        return [JudgeQuestion("scores", text, official_reply if self.rules == "official" else fixed_scores, 1024)]

    @override
    def score(self, item: Item, answers: Mapping[str, dict[str, float] | None]) -> Score:
        scores = answers["scores"]
        if scores is None:
            reasons = ("the judge gave no readable scores",)
            if self.rules == "official":
                return Score(-1.0, parts=dict.fromkeys(AXES, _NO_SCORE), reasons=reasons, readable=False)
            return Score(0.0, reasons=reasons, readable=False)
        fantasy, identity, aesthetics = (scores[axis] for axis in AXES)
        score = 0.8 * min(fantasy, identity) + 0.2 * aesthetics
        return Score(round(score, 3) if self.rules == "official" else score, parts=scores)

    @override
    def weights(self, counts: Mapping[str, int]) -> dict[str, float]:
        left_out = {"Multi-Object"} if self.rules == "official" else set()
        return {group: weight for group, weight in _WEIGHTS.items() if group not in left_out}


def fixed_scores(reply: str) -> dict[str, float]:
    """Parses the three scores, each of which must occur once and be from 0 to 10. Raises: AnswerError."""
    return labeled_scores(reply, AXES, 0, 10)


def official_reply(reply: str) -> dict[str, float]:
    """Parses a judge's reply as `official_scores`.

    Raises: AnswerError for a reply that names no axis. Its scores are -1 by the official rules too, but a judge that
      replies so about every image is one that is down, and scores nothing.
    """
    if not any(axis in reply for axis in AXES):
        raise AnswerError(f"no line {AXES[0]}: <score>")
    return official_scores(reply)


def official_scores(reply: str) -> dict[str, float]:
    """Parses the three scores as the official script does, with -1 for a score that it does not find."""
    scores = dict.fromkeys(AXES, _NO_SCORE)
    for axis, value in re.findall(rf"({'|'.join(AXES)})\s*[:\uff1a]?\s*(\d{{1,2}})", reply):
        scores[axis] = min(float(value), 10.0)
    return scores
