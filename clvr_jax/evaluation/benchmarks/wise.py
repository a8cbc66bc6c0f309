"""WISE: 1,000 prompts that require world knowledge. Its two editions are two benchmarks.

Legacy (2025): three scores of 0, 1 or 2 by GPT-4o. Verified (2026): other prompts, one score of 0 or 1 by a Qwen judge.
There is no license, so the prompts are fetched and not distributed, and the rubrics are ours.

Source: Niu et al. 2025 (arXiv 2503.07265), PKU-YuanGroup/WISE.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.prompt_files import benchmark_files, check_unique_ids, read_entries
from clvr_jax.evaluation.harness.benchmark import Item, Score
from clvr_jax.evaluation.harness.sources import Source, github
from clvr_jax.evaluation.judging.benchmark import Answer, JudgedBenchmark, JudgeQuestion, rubric
from clvr_jax.evaluation.judging.official import OfficialPrompt
from clvr_jax.evaluation.judging.replies import labeled_scores

LEGACY_AXES = ("Consistency", "Realism", "Aesthetic Quality")
_REPOSITORY = ("PKU-YuanGroup/WISE", "eb51174483a5de2e34e8614cf9dfb3319ee7fcd0")
_LEGACY_FILES = {
    "WISE_legacy/data/cultural_common_sense.json": "49d1c3d0fb2df4b599725a458241f8b113dfbf53",
    "WISE_legacy/data/spatio-temporal_reasoning.json": "0a175dc324d60563d83af9da307ed62b48cc8d47",
    "WISE_legacy/data/natural_science.json": "e2ea67e8fd9b58667dac4587a3103c725e714680",
}
_VERIFIED_FILES = {"data_verified/merge.json": "b8506419ab24e836585a74f3359341115e33a5ab"}
_LEGACY_SCRIPT = {"WISE_legacy/gpt_eval.py": "56ee5937fff82d0253b70f76059602b6d2537862"}
_VERIFIED_SCRIPT = {"vllm_eval.py": "82db1108f40bf21c5a5065dba8ee6ec169168fb6"}
_FUNCTION = "build_evaluation_messages"
"""Function of the scripts that contains the prompt of the judge."""
_FIELDS = ("prompt_id", "Prompt", "Explanation")


class _Wise(JudgedBenchmark[Answer]):
    """The common part of both editions. last_ids: the last id of each category, in order. shares: their weights."""

    files: ClassVar[tuple[str, ...]]
    last_ids: ClassVar[Mapping[str, int]]
    shares: ClassVar[Mapping[str, float]]
    license_note: ClassVar = "none given; fetched for evaluation, not distributed"

    @override
    def read(self, path: Path) -> list[Item]:
        items = []
        for file in benchmark_files(path, self.files):
            for place, entry in read_entries(file, _FIELDS):
                id = entry["prompt_id"]
                if type(id) is not int or not 1 <= id <= 1000:
                    raise ClvrError(f"{place}: prompt_id must be a number from 1 to 1000, got {id!r}")
                category = next(name for name, last in self.last_ids.items() if id <= last)
                items.append((place, Item(str(id), entry["Prompt"], category, entry)))
        return check_unique_ids(items)

    @override
    def weights(self, counts: Mapping[str, int]) -> dict[str, float]:
        return dict(self.shares)

    def _text(self, item: Item) -> str:
        return rubric(self.rubrics[0]).format(prompt=item.prompt, explanation=item.record["Explanation"])


class WiseLegacy(_Wise[dict[str, float]]):
    """WISE legacy: (.7 consistency + .2 realism + .1 aesthetics) / 2."""

    name: ClassVar = "wise-legacy"
    title: ClassVar = "WISE (legacy)"
    source: ClassVar = Source(github(*_REPOSITORY, _LEGACY_FILES), license=_Wise.license_note)
    prompts_hint: ClassVar = "the directory WISE_legacy/data of PKU-YuanGroup/WISE, or one of its files"
    rubrics: ClassVar = ("wise_legacy",)
    official: ClassVar = OfficialPrompt(
        Source(github(*_REPOSITORY, _LEGACY_SCRIPT), license=_Wise.license_note), _FUNCTION, max_tokens=2000
    )
    files: ClassVar = tuple(path.rpartition("/")[2] for path in _LEGACY_FILES)
    last_ids: ClassVar = {"CULTURE": 400, "TIME": 567, "SPACE": 700, "BIOLOGY": 800, "PHYSICS": 900, "CHEMISTRY": 1000}
    shares: ClassVar = {"CULTURE": 0.4, "TIME": 0.167, "SPACE": 0.133, "BIOLOGY": 0.1, "PHYSICS": 0.1, "CHEMISTRY": 0.1}

    @override
    def questions(self, item: Item) -> list[JudgeQuestion[dict[str, float]]]:
        return [JudgeQuestion("scores", self._text(item), legacy_scores, 2000)]

    @override
    def score(self, item: Item, answers: Mapping[str, dict[str, float] | None]) -> Score:
        scores = answers["scores"]
        if scores is None:
            return Score(0.0, reasons=("the judge gave no readable scores",), readable=False)
        consistency, realism, aesthetics = (scores[axis] for axis in LEGACY_AXES)
        return Score((0.7 * consistency + 0.2 * realism + 0.1 * aesthetics) / 2, parts=scores)


class WiseVerified(_Wise[float]):
    """WISE verified: each image is correct or not."""

    name: ClassVar = "wise-verified"
    title: ClassVar = "WISE_Verified"
    is_binary: ClassVar = True
    source: ClassVar = Source(github(*_REPOSITORY, _VERIFIED_FILES), license=_Wise.license_note)
    prompts_hint: ClassVar = "data_verified/merge.json of PKU-YuanGroup/WISE"
    rubrics: ClassVar = ("wise_verified",)
    official: ClassVar = OfficialPrompt(
        Source(github(*_REPOSITORY, _VERIFIED_SCRIPT), license=_Wise.license_note), _FUNCTION, max_tokens=500
    )
    files: ClassVar = tuple(path.rpartition("/")[2] for path in _VERIFIED_FILES)
    last_ids: ClassVar = {"CULTURE": 400, "TIME": 520, "SPACE": 640, "BIOLOGY": 760, "PHYSICS": 880, "CHEMISTRY": 1000}
    shares: ClassVar = {
        "CULTURE": 0.4,
        "TIME": 0.12,
        "SPACE": 0.12,
        "BIOLOGY": 0.12,
        "PHYSICS": 0.12,
        "CHEMISTRY": 0.12,
    }

    @override
    def questions(self, item: Item) -> list[JudgeQuestion[float]]:
        return [JudgeQuestion("score", self._text(item), verified_score, 2000)]

    @override
    def score(self, item: Item, answers: Mapping[str, float | None]) -> Score:
        score = answers["score"]
        if score is None:
            return Score.binary(False, ("the judge gave no readable score",), readable=False)
        return Score.binary(score == 1)


def legacy_scores(reply: str) -> dict[str, float]:
    """Parses three scores, each 0, 1 or 2; a reply of three bare numbers is accepted. Raises: AnswerError."""
    bare = reply.split()
    if len(bare) == len(LEGACY_AXES) and all(one in ("0", "1", "2") for one in bare):
        return dict(zip(LEGACY_AXES, map(float, bare), strict=True))
    return labeled_scores(reply, LEGACY_AXES, 0, 2, whole=True)


def verified_score(reply: str) -> float:
    """Parses a score, 0 or 1; a reply of a bare number is accepted. Raises: AnswerError."""
    bare = reply.strip()
    return float(bare) if bare in ("0", "1") else labeled_scores(reply, ("Score",), 0, 1, whole=True)["Score"]
