"""The interface of a benchmark: prompts in the official file format, file layout of its images, weights of tags."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from clvr_jax.evaluation.harness.run_directory import FileLayout, FlatLayout, RunDirectory
from clvr_jax.evaluation.harness.sources import Source
from clvr_jax.files.file_names import file_name
from clvr_jax.files.json_input import JSON, JsonObject, UncheckedJSON


@dataclass(frozen=True)
class Item:
    """A prompt of a benchmark.

    Attributes:
      id: the name of its images.
      prompt: the text from which images are generated.
      tag: the group in which its score counts.
      record: the entry of the official file.
      tier: its complexity tier; None if the benchmark has none.
    """

    id: str
    prompt: str
    tag: str
    record: UncheckedJSON = field(repr=False)
    tier: int | None = None


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

    @classmethod
    def binary(cls, correct: bool, reasons: tuple[str, ...] = (), readable: bool = True) -> Self:
        """Returns the score of an image that is either correct, 1, or not, 0."""
        return cls(float(correct), correct, reasons=reasons, readable=readable)


class Benchmark(abc.ABC):
    """One benchmark under one set of rules.

    Attributes:
      name: of the prompts and their layout.
      title: the name in tables and messages.
      unit: of its scores, e.g. "0 to 1".
      is_binary: whether an image is either correct or not.
      counts_images: whether summaries also count the correct images, and give the share over all images.
      samples: images of each prompt in the official protocol.
      suffixes: of its image files; the first is written, all are accepted for external images.
      source: the source of the prompts if --prompts is not given; None if it must be given.
      prompts_hint: description of the file or directory that --prompts expects.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str] = "0 to 1"
    is_binary: ClassVar[bool] = False
    counts_images: ClassVar[bool] = False
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

    def metadata(self, item: Item) -> dict[str, JSON]:
        """Converts an item to the JSON value that is stored in the run directory."""
        return {"id": item.id, "prompt": item.prompt, "tag": item.tag, "record": dict(item.record)}

    def item(self, metadata: UncheckedJSON, index: int) -> Item:
        """Converts the stored JSON value of a prompt back to its item."""
        entry = JsonObject(metadata, f"prompt {index}")
        return Item(entry.text("id"), entry.text("prompt"), entry.text("tag"), entry.nested("record").content)

    def weights(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Returns the weight of each tag in the overall score; weights are normalized by their sum.

        Args:
          counts: tag -> number of its prompts in this run. There is no overall score if a tag with a weight has none.
        """
        return dict.fromkeys(counts, 1.0)
