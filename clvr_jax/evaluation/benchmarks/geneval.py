"""GenEval: 553 prompts with six tags, four pictures each, scored by an object detector and CLIP.

Source: Ghosh et al. 2023 (arXiv 2310.11513), djghosh13/geneval (MIT).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol

from typing_extensions import override

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.benchmark import Benchmark, Item, Mark, read_entries
from clvr_jax.evaluation.benchmarks.geneval_rules import Found, check, check_metadata, kept
from clvr_jax.evaluation.benchmarks.sources import Source, github
from clvr_jax.evaluation.layout import GenEvalPlaces, Places
from clvr_jax.files import read_json, write_json
from clvr_jax.json_input import JsonObject
from clvr_jax.reasoning.images import EncodedPicture

_FILES = {"prompts/evaluation_metadata.jsonl": "efc21c7e639cd45554a1e44fac87157211f16d51"}


class GenEval(Benchmark):
    """Right or wrong by rules over detections; overall the mean of the tags' accuracies."""

    name: ClassVar = "geneval"
    title: ClassVar = "GenEval"
    samples: ClassVar = 4
    is_binary: ClassVar = True
    source: ClassVar = Source(
        github("djghosh13/geneval", "af4902f24d3ca90ebbb446dd9891a59e0f82725f", _FILES), license="MIT"
    )
    prompts_hint: ClassVar = "evaluation_metadata.jsonl of djghosh13/geneval"

    @override
    def read(self, path: Path) -> list[Item]:
        items = []
        for number, (place, entry) in enumerate(read_entries(path, ("tag", "include", "prompt"))):
            try:
                check_metadata(entry)
            except ClvrError as error:
                raise ClvrError(f"{place}: {error}") from error
            items.append(self.item(entry, number))
        return items

    @override
    def places(self, items: Sequence[Item]) -> Places:
        return GenEvalPlaces()

    @override
    def made_elsewhere(self, root: Path, item: Item, sample: int) -> list[Path]:
        return [root / item.id / "samples" / f"{sample:04d}.png"]

    @override
    def check_elsewhere(self, root: Path, items: Sequence[Item]) -> None:
        """Refuses metadata.jsonl of another prompt, because the official scorer relies on it."""
        for item in items:
            path = root / item.id / "metadata.jsonl"
            if (said := read_json(path).get("prompt")) != item.prompt:
                raise ClvrError(f"{path}: made for the prompt {said!r}, prompt {item.id} is {item.prompt!r}")

    @override
    def metadata(self, item: Item) -> dict[str, Any]:
        """Returns the record that the official scorer reads."""
        return dict(item.record)

    @override
    def item(self, metadata: Mapping[str, Any], index: int) -> Item:
        entry = JsonObject(metadata, f"metadata of prompt {index}")
        return Item(f"{index:05d}", entry.text("prompt"), entry.text("tag"), metadata)


class Detector(Protocol):
    """Finds objects. name and revision of its models stand in the result."""

    @property
    def name(self) -> str:
        """Of the models."""
        ...

    @property
    def revision(self) -> str:
        """Digest of the models' weights."""
        ...

    def find(self, picture: EncodedPicture, metadata: Mapping[str, Any]) -> dict[str, list[Found]]:
        """What is to be seen, by class, with the colors that the metadata asks for."""
        ...


def recorded_mark(path: Path, picture: EncodedPicture, item: Item, detector: Detector) -> Mark:
    """The mark of a picture by what was detected in it; what was recorded before is not detected again.

    Args:
      path: of the record.
      picture: to look at.
      item: its prompt.
      detector: called if there is no record of these models about this picture.
    """
    digest = hashlib.sha256(picture.content).hexdigest()
    owner = {"detector": detector.name, "revision": detector.revision, "picture": digest}
    record = read_json(path) if path.exists() else {}
    if {name: record.get(name) for name in owner} != owner:
        found = detector.find(picture, item.record)
        record = {**owner, "found": {name: [asdict(one) for one in each] for name, each in found.items()}}
        write_json(path, record)
    return mark_of(_found(path, record), item)


def mark_of(found: Mapping[str, Sequence[Found]], item: Item) -> Mark:
    """The mark by GenEval's rules."""
    correct, reasons = check(kept(found, item.tag), item.record)
    return Mark(float(correct), correct, reasons=reasons)


def _found(path: Path, record: Mapping[str, Any]) -> dict[str, list[Found]]:
    try:
        return {
            name: [Found(tuple(one["box"]), one["confidence"], one["color"]) for one in each]
            for name, each in record["found"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ClvrError(f"{path}: not a record of detections ({error}); remove it") from error
