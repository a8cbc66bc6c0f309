"""DPG-Bench: 1,065 dense prompts, four images each as one 2 x 2 grid, and yes/no questions to a judge.

Questions depend on others: if the answer to a parent is no, the answers to its children are no.

Source: Hu et al. 2024 (arXiv 2403.05135), TencentQQGYLab/ELLA (Apache-2.0), dpg_bench/. The official judge is
mPLUG-large; a vision-language model is another judge with other scores.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypedDict

from PIL import Image
from typing_extensions import override

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation.benchmarks.imaginebench import Rules
from clvr_jax.evaluation.harness.benchmark import Item, Score
from clvr_jax.evaluation.harness.run_directory import FileLayout, RunDirectory
from clvr_jax.evaluation.harness.sources import Source, github
from clvr_jax.evaluation.judging.benchmark import JudgedBenchmark, JudgeQuestion, rubric
from clvr_jax.evaluation.judging.replies import yes_or_no
from clvr_jax.files.atomic_io import write_atomically
from clvr_jax.files.file_names import file_name
from clvr_jax.files.image_io import EncodedImage, as_pil, encode_png, read_encoded, read_image
from clvr_jax.files.json_input import read_text

_FILES = {"dpg_bench/dpg_bench.csv": "98457fc9901943f51ff9a30367250fc292533bed"}
_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
_GRID = 2


class _Question(TypedDict):
    id: int
    text: str
    parents: list[int]
    category: str


@dataclass(frozen=True)
class _SamplesByPrompt(FileLayout):
    """A layout with single images in the directories of their prompts, from which `finish` makes grids."""

    @override
    def prompt_dir(self, index: int) -> Path:
        return Path("prompts", f"{index:05d}")

    @override
    def image(self, index: int, sample: int) -> Path:
        return self.prompt_dir(index) / "samples" / f"{sample:04d}.png"


@dataclass(frozen=True)
class DPG(JudgedBenchmark[bool]):
    """DPG-Bench: the share of questions answered with yes, averaged over images, times 100.

    rules: "official" leaves out the questions that the official script leaves out; "fixed" asks every question.
    """

    rules: Rules = "fixed"

    name: ClassVar = "dpg"
    title: ClassVar = "DPG-Bench"
    unit: ClassVar = "0 to 100"
    samples: ClassVar = _GRID * _GRID
    source: ClassVar = Source(
        github("TencentQQGYLab/ELLA", "3c228f1dc6c4d3cad0a47493816151a419f14db3", _FILES), license="Apache-2.0"
    )
    rubrics: ClassVar = ("dpg",)
    prompts_hint: ClassVar = "dpg_bench/dpg_bench.csv of TencentQQGYLab/ELLA"

    @property
    @override
    def scored_as(self) -> str:
        return f"{self.name}-{self.rules}"

    @property
    @override
    def faults(self) -> tuple[str, ...]:
        if self.rules == "fixed":
            return ()
        return (
            "the first row of the questions is left out, and with it the first prompt if other questions depend on it",
        )

    @override
    def read(self, path: Path) -> list[Item]:
        """Reads the official CSV; each record is {"questions": [{"id", "text", "parents", "category"}], "is_first"}."""
        items: dict[str, Item] = {}
        for location, row in _rows(path):
            try:
                parents = [int(one) for one in row["dependency"].split(",")]
                question: _Question = {
                    "id": int(row["proposition_id"]),
                    "text": row["question_natural_language"],
                    "parents": [one for one in parents if one],
                    "category": row["tuple"].partition("(")[0].partition("-")[0].strip(),
                }
            except ValueError as error:
                raise ClvrError(f"{location}: proposition_id and dependency must be numbers ({error})") from error
            id, text = row["item_id"], row["text"].strip()
            item = items.setdefault(id, Item(id, text, "dense", {"questions": [], "is_first": not items}))
            if item.prompt != text:
                raise ClvrError(f"{location}: another prompt for {id} than before; each prompt needs its own id")
            if any(other["id"] == question["id"] for other in item.record["questions"]):
                raise ClvrError(f"{location}: question {question['id']} of {id} occurs twice")
            item.record["questions"].append(question)
        for item in items.values():
            if orphans := _orphans(item.record["questions"]):
                raise ClvrError(f"{path}: question {orphans[0]} of {item.id} depends on a missing question")
        return list(items.values())

    @override
    def check_samples(self, samples: int) -> None:
        if samples not in (1, self.samples):
            raise UsageError(f"{self.title}: an image is 1 sample or a grid of {self.samples} samples, not {samples}")

    @override
    def layout(self, items: Sequence[Item]) -> FileLayout:
        return _SamplesByPrompt()

    def finish(self, directory: RunDirectory, items: Sequence[Item], samples: int) -> None:
        """Writes images/<id>.png: the samples of a prompt as a square grid, row by row; black for a missing image."""
        side = 1 if samples == 1 else _GRID
        for index, item in enumerate(items):
            path = _grid_path(directory, item)
            if path.exists() or not all(directory.has_record(index, sample) for sample in range(samples)):
                continue
            files = [directory.image_path(index, sample) for sample in range(samples)]
            images = {number: Image.fromarray(read_image(file)) for number, file in enumerate(files) if file.exists()}
            if not images:
                continue
            width, height = next(iter(images.values())).size
            grid = Image.new("RGB", (side * width, side * height))
            for number, image in images.items():
                grid.paste(image, (number % side * width, number // side * height))
            write_atomically(path, encode_png(grid))

    @override
    def judge_image(self, path: Path, sample: int, samples: int) -> EncodedImage:
        """Returns the part of the grid that the question is about."""
        if samples == 1:
            return read_encoded(path)
        grid = as_pil(read_encoded(path))
        width, height = grid.width // _GRID, grid.height // _GRID
        left, top = sample % _GRID * width, sample // _GRID * height
        return EncodedImage(encode_png(grid.crop((left, top, left + width, top + height))), "png")

    @override
    def scored_file(self, directory: RunDirectory, items: Sequence[Item], index: int, sample: int) -> Path:
        return _grid_path(directory, items[index])

    @override
    def questions(self, item: Item) -> list[JudgeQuestion[bool]]:
        """Returns one question at a time, as the official judge is asked."""
        text = rubric("dpg")
        return [
            JudgeQuestion(str(question["id"]), text.format(question=question["text"]), yes_or_no, 16)
            for question in self._counted(item)
        ]

    @override
    def score(self, item: Item, answers: Mapping[str, bool | None]) -> Score:
        """Returns the score of an image; its parts are shares of yes by category, regardless of parents."""
        questions = self._counted(item)
        answered_yes = {question["id"]: bool(answers[str(question["id"])]) for question in questions}
        counted = dict(answered_yes)
        categories: dict[str, list[bool]] = {}
        for question in questions:
            # Questions are in the order of the file, so a no propagates to the children of children.
            counted[question["id"]] &= all(counted[parent] for parent in question["parents"])
            categories.setdefault(question["category"], []).append(answered_yes[question["id"]])
        return Score(
            100 * sum(counted.values()) / len(counted),
            parts={name: 100 * sum(each) / len(each) for name, each in categories.items()},
            reasons=tuple(question["text"] for question in questions if not counted[question["id"]]),
            readable=None not in answers.values(),
        )

    def _counted(self, item: Item) -> list[_Question]:
        """Returns the questions that count by the rules."""
        questions: list[_Question] = item.record["questions"]
        if self.rules == "fixed" or not item.record["is_first"]:
            return questions
        # The official script fails on a missing parent and skips the image.
        return [] if _orphans(questions[1:]) else questions[1:]


def _orphans(questions: Sequence[_Question]) -> list[int]:
    """Returns the ids of questions with a parent that is not among the questions."""
    known = {question["id"] for question in questions}
    return [question["id"] for question in questions if not known.issuperset(question["parents"])]


def _grid_path(directory: RunDirectory, item: Item) -> Path:
    return directory.root / "images" / f"{file_name(item.id)}.png"


def _rows(path: Path) -> list[tuple[str, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        return _checked_rows(path, reader)
    except csv.Error as error:  # a field of over 128 KiB, or a NUL character
        raise ClvrError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _checked_rows(path: Path, reader: csv.DictReader[str]) -> list[tuple[str, dict[str, str]]]:
    if lacking := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
        raise ClvrError(f"{path}: lacks the columns {', '.join(lacking)}")
    rows = []
    for row in reader:
        location = f"{path}:{reader.line_num}"
        if empty := [name for name in _COLUMNS if not row[name]]:
            raise ClvrError(f"{location}: lacks {', '.join(empty)}")
        rows.append((location, row))
    if not rows:
        raise ClvrError(f"{path}: no prompts in this file")
    return rows
