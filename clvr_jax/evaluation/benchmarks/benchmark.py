"""What a benchmark is: prompts in its official file format, places of its pictures, marks, and one score of all."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.sources import Source
from clvr_jax.evaluation.layout import FlatPlaces, Folder, Places
from clvr_jax.file_names import file_name
from clvr_jax.json_input import JsonObject, check_unicode, parse_json, read_text
from clvr_jax.reasoning.images import EncodedPicture, read_encoded


@dataclass(frozen=True)
class Item:
    """A prompt of a benchmark.

    id: names its pictures. prompt: what is drawn. tag: the group in which its score counts. record: the official entry.
    """

    id: str
    prompt: str
    tag: str
    record: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Mark:
    """What one picture scores.

    score: in the benchmark's own unit. correct: where a picture is right or wrong, else None. parts: what the score is
    made of, by name. reasons: for less than the best. readable: False if the judge's answers were no scores.
    refused: whether the judge's policy refused to answer.
    """

    score: float
    correct: bool | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    readable: bool = True
    refused: bool = False


@dataclass(frozen=True)
class Asked:
    """A question to a judge about one picture.

    name: among the questions about the picture. text: the question. read: reply -> what it says; raises AnswerError.
    max_tokens: of the reply. is_json: whether one JSON object is due.
    """

    name: str
    text: str
    read: Callable[[str], Any]
    max_tokens: int
    is_json: bool = False


class Benchmark(abc.ABC):
    """One benchmark under one set of rules.

    Attributes:
      name: of the prompts and their layout.
      title: as people call it.
      unit: of its scores, e.g. "0 to 1".
      is_binary: whether a picture is either right or wrong.
      samples: pictures of each prompt in the official protocol.
      suffixes: of its picture files; the first is written, all are read from folders made elsewhere.
      source: where its prompts come from if nobody gives them; None if they must be given.
      prompts_hint: what --prompts must point at.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str] = "0 to 1"
    is_binary: ClassVar[bool] = False
    samples: ClassVar[int] = 1
    suffixes: ClassVar[tuple[str, ...]] = (".png",)
    source: ClassVar[Source | None] = None
    prompts_hint: ClassVar[str]

    @property
    def scored_as(self) -> str:
        """The name in results: what is scored by other rules is another benchmark, and never compared."""
        return self.name

    @property
    def faults(self) -> tuple[str, ...]:
        """Of the official script, where the rules reproduce them."""
        return ()

    @abc.abstractmethod
    def read(self, path: Path) -> list[Item]:
        """The prompts of the official file, or folder of files.

        Raises: ClvrError, one line with file and line, for entries that lack a field and ids that occur twice.
        """

    def check_samples(self, samples: int) -> None:
        """Raises UsageError for a number of pictures per prompt that the layout has no place for."""
        return

    def places(self, items: Sequence[Item]) -> Places:
        """Where pictures that we draw lie."""
        return FlatPlaces(tuple(self.image_name(item) for item in items), self.suffixes[0])

    def image_name(self, item: Item) -> str:
        """The file name of an item's image without suffix; ids are outside data, so it is never the id as a path."""
        return file_name(item.id)

    def scored_file(self, folder: Folder, items: Sequence[Item], index: int, sample: int) -> Path:
        """The file in which a picture that we drew is scored."""
        return folder.picture_path(index, sample)

    def made_elsewhere(self, root: Path, item: Item, sample: int) -> list[Path]:
        """Where a picture may lie in a folder in the official layout; the first of these that exists is taken."""
        return [root / f"{self.image_name(item)}{suffix}" for suffix in self.suffixes]

    def check_elsewhere(self, root: Path, items: Sequence[Item]) -> None:
        """Raises ClvrError for a folder made elsewhere that says it was made for other prompts."""
        return

    def finish(self, folder: Folder, items: Sequence[Item], samples: int) -> None:
        """Makes what the official layout needs besides single pictures, once all are drawn."""
        return

    def metadata(self, item: Item) -> dict[str, Any]:
        """An item as JSON, as it lies in the folder of pictures."""
        return asdict(item)

    def item(self, metadata: Mapping[str, Any], index: int) -> Item:
        """The item that `metadata` came from."""
        entry = JsonObject(metadata, f"metadata of prompt {index}")
        return Item(entry.text("id"), entry.text("prompt"), entry.text("tag"), entry.nested("record").content)

    def weights(self, counts: Mapping[str, int]) -> dict[str, float]:
        """The weight of each tag in the overall score; they are divided by their sum.

        Args:
          counts: tag -> number of its prompts in this run. A tag with a weight and no prompt leaves no overall score.
        """
        return dict.fromkeys(counts, 1.0)


class JudgedBenchmark(Benchmark):
    """A benchmark whose pictures a vision-language model looks at. rubrics: names of the texts that tell it how."""

    rubrics: ClassVar[tuple[str, ...]]

    @property
    def attempts(self) -> int:
        """How often a question is asked at most, until the reply can be read."""
        return 3

    @abc.abstractmethod
    def questions(self, item: Item) -> list[Asked]:
        """What is asked about each picture of a prompt; nothing if the rules leave the prompt out."""

    @abc.abstractmethod
    def mark(self, item: Item, answers: Mapping[str, Any]) -> Mark:
        """The mark of a picture from what was read, by name of the question; None for what could not be read."""

    def shown(self, path: Path, sample: int, samples: int) -> EncodedPicture:
        """What the judge sees of a picture file."""
        return read_encoded(path)


def rubric(name: str) -> str:
    """The text of a rubric, with its fields in braces."""
    return resources.files(__package__).joinpath("rubrics", f"{name}.md").read_text(encoding="utf-8")


_TEXTS = ("prompt", "Prompt", "instruction", "tag", "note", "Explanation", "type")
"""Fields that the official formats have as texts; they become prompts, groups, and what a judge is asked."""


def read_entries(path: Path, fields: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """The entries of a JSON array or of JSON lines, each with its place for messages ("file:3").

    fields: that every entry must have. Raises: ClvrError, one line.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        entries = [(f"{path}: entry {number}", entry) for number, entry in enumerate(parse_json(text, str(path)), 1)]
    else:
        lines = enumerate(text.split("\n"), start=1)
        places = [(f"{path}:{number}", line) for number, line in lines if line.strip()]
        entries = [(place, parse_json(line, place)) for place, line in places]
    if not entries:
        raise ClvrError(f"{path}: no prompts in this file")
    for place, entry in entries:
        lacking = [name for name in fields if not isinstance(entry, dict) or entry.get(name) in (None, "")]
        if lacking:
            raise ClvrError(f"{place}: lacks {', '.join(lacking)}")
        check_unicode(entry, place)
        if wrong := [name for name in _TEXTS if not isinstance(entry.get(name, ""), str)]:
            raise ClvrError(f"{place}: {' and '.join(wrong)} must be a text")
    return entries


def without_twins(items: Sequence[tuple[str, Item]]) -> list[Item]:
    """The items, given with their places. Raises: ClvrError for an id that occurs twice."""
    seen: dict[str, str] = {}
    for place, item in items:
        if item.id in seen:
            raise ClvrError(f"{place}: id {item.id} is already that of {seen[item.id]}; ids name the pictures")
        seen[item.id] = place
    return [item for _, item in items]


def files_of(path: Path, names: Sequence[str]) -> list[Path]:
    """The files of a benchmark: `path` itself if it is a file, else those of these names in the folder.

    Raises: ClvrError that says which are expected.
    """
    if not path.is_dir():
        return [path]
    if missing := [name for name in names if not (path / name).is_file()]:
        raise ClvrError(f"{path}: lacks {', '.join(missing)}; expected are {', '.join(names)}")
    return [path / name for name in names]
