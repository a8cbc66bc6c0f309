"""The interface of a benchmark: prompts in the official file format, layout and scores of its images, tag weights."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.sources import Source
from clvr_jax.evaluation.harness.run_directory import FileLayout, FlatLayout, RunDirectory
from clvr_jax.file_names import file_name
from clvr_jax.image_io import EncodedImage, read_encoded
from clvr_jax.json_input import JsonObject, check_unicode, parse_json, read_text


@dataclass(frozen=True)
class Item:
    """A prompt of a benchmark.

    Attributes:
      id: the name of its images.
      prompt: the text from which images are generated.
      tag: the group in which its score counts.
      record: the entry of the official file.
    """

    id: str
    prompt: str
    tag: str
    record: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Score:
    """The score of one image.

    Attributes:
      score: in the unit of the benchmark.
      correct: whether the image is correct; None if the benchmark is not binary.
      parts: the components of the score, by name.
      reasons: why the score is not the best one.
      readable: False if the judge's replies could not be parsed.
      refused: whether the policy of the judge refused to reply.
    """

    score: float
    correct: bool | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    readable: bool = True
    refused: bool = False


@dataclass(frozen=True)
class JudgeQuestion:
    """A question to a judge about one image.

    Attributes:
      name: unique among the questions about the image.
      text: the question.
      read: parses a reply; raises AnswerError for one that it cannot parse.
      max_tokens: of the reply.
      is_json: whether the reply must be one JSON object.
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
      title: the name in tables and messages.
      unit: of its scores, e.g. "0 to 1".
      is_binary: whether an image is either correct or not.
      samples: images of each prompt in the official protocol.
      suffixes: of its image files; the first is written, all are accepted for external images.
      source: the source of the prompts if --prompts is not given; None if it must be given.
      prompts_hint: description of the file or directory that --prompts expects.
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
        """The name in results; other rules have another name, because their scores are never compared."""
        return self.name

    @property
    def faults(self) -> tuple[str, ...]:
        """The faults of the official script that these rules reproduce."""
        return ()

    @abc.abstractmethod
    def read(self, path: Path) -> list[Item]:
        """Reads the prompts from the official file, or from a directory of files.

        Raises: ClvrError, one line with file and line, for an entry that lacks a field or has the id of another one.
        """

    def check_samples(self, samples: int) -> None:
        """Raises UsageError for a number of images per prompt that the layout does not support."""
        return

    def layout(self, items: Sequence[Item]) -> FileLayout:
        """Returns the file layout of images that we generate."""
        return FlatLayout(tuple(self.image_name(item) for item in items), self.suffixes[0])

    def image_name(self, item: Item) -> str:
        """Returns the file name of an item's image without suffix; an id is untrusted and never used as a path."""
        return file_name(item.id)

    def scored_file(self, directory: RunDirectory, items: Sequence[Item], index: int, sample: int) -> Path:
        """Returns the file that is scored for an image that we generated."""
        return directory.image_path(index, sample)

    def external_paths(self, root: Path, item: Item, sample: int) -> list[Path]:
        """Returns possible paths of an external image in the official layout; the first one that exists is used."""
        return [root / f"{self.image_name(item)}{suffix}" for suffix in self.suffixes]

    def check_external(self, root: Path, items: Sequence[Item]) -> None:
        """Raises ClvrError if the metadata of external images name other prompts."""
        return

    def finish(self, directory: RunDirectory, items: Sequence[Item], samples: int) -> None:
        """Writes further files of the official layout, after all images are generated."""
        return

    def metadata(self, item: Item) -> dict[str, Any]:
        """Converts an item to the JSON value that is stored in the run directory."""
        return asdict(item)

    def item(self, metadata: Mapping[str, Any], index: int) -> Item:
        """Converts the stored JSON value of a prompt back to its item."""
        entry = JsonObject(metadata, f"metadata of prompt {index}")
        return Item(entry.text("id"), entry.text("prompt"), entry.text("tag"), entry.nested("record").content)

    def weights(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Returns the weight of each tag in the overall score; weights are normalized by their sum.

        Args:
          counts: tag -> number of its prompts in this run. There is no overall score if a tag with a weight has none.
        """
        return dict.fromkeys(counts, 1.0)


class JudgedBenchmark(Benchmark):
    """A benchmark whose images a vision-language model judges. rubrics: names of the judge's prompt templates."""

    rubrics: ClassVar[tuple[str, ...]]

    @property
    def attempts(self) -> int:
        """The maximum number of times that a question is asked until its reply can be parsed."""
        return 3

    @abc.abstractmethod
    def questions(self, item: Item) -> list[JudgeQuestion]:
        """Returns the questions about each image of a prompt; none if the rules leave the prompt out."""

    @abc.abstractmethod
    def score(self, item: Item, answers: Mapping[str, Any]) -> Score:
        """Returns the score of an image. answers: name of a question -> parsed reply, None if it has no valid reply."""

    def judge_image(self, path: Path, sample: int, samples: int) -> EncodedImage:
        """Returns the image that the judge sees for an image file."""
        return read_encoded(path)


def rubric(name: str) -> str:
    """Returns the text of a rubric, with its fields in braces."""
    return (
        resources.files("clvr_jax.evaluation.benchmarks").joinpath("rubrics", f"{name}.md").read_text(encoding="utf-8")
    )


_TEXTS = ("prompt", "Prompt", "instruction", "tag", "note", "Explanation", "type")
"""Fields that are strings in the official formats; they become prompts, tags, and questions to a judge."""


def read_entries(path: Path, fields: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Reads the entries of a JSON array or of JSON lines, each with its location for messages ("file:3").

    Args:
      path: the file.
      fields: names of the fields that every entry must have.
    Raises: ClvrError, one line, for an entry without these fields, or a file without entries.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        entries = [(f"{path}: entry {number}", entry) for number, entry in enumerate(parse_json(text, str(path)), 1)]
    else:
        lines = enumerate(text.split("\n"), start=1)
        located = [(f"{path}:{number}", line) for number, line in lines if line.strip()]
        entries = [(location, parse_json(line, location)) for location, line in located]
    if not entries:
        raise ClvrError(f"{path}: no prompts in this file")
    for location, entry in entries:
        lacking = [name for name in fields if not isinstance(entry, dict) or entry.get(name) in (None, "")]
        if lacking:
            raise ClvrError(f"{location}: lacks {', '.join(lacking)}")
        check_unicode(entry, location)
        if wrong := [name for name in _TEXTS if not isinstance(entry.get(name, ""), str)]:
            raise ClvrError(f"{location}: {' and '.join(wrong)} must be a string")
    return entries


def check_unique_ids(items: Sequence[tuple[str, Item]]) -> list[Item]:
    """Returns the items without their locations. Raises: ClvrError for an id that occurs twice."""
    seen: dict[str, str] = {}
    for location, item in items:
        if item.id in seen:
            raise ClvrError(f"{location}: id {item.id} is already that of {seen[item.id]}; each image needs its own id")
        seen[item.id] = location
    return [item for _, item in items]


def benchmark_files(path: Path, names: Sequence[str]) -> list[Path]:
    """Returns the files of a benchmark: `path` itself if it is a file, else the files with these names in it.

    Raises: ClvrError that lists missing and expected files.
    """
    if not path.is_dir():
        return [path]
    if missing := [name for name in names if not (path / name).is_file()]:
        raise ClvrError(f"{path}: lacks {', '.join(missing)}; the directory needs {', '.join(names)}")
    return [path / name for name in names]
