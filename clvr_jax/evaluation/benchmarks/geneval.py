"""GenEval: 553 prompts with six tags, four images each, scored by an object detector and CLIP.

Source: Ghosh et al. 2023 (arXiv 2310.11513), djghosh13/geneval (MIT).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from typing_extensions import override

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.geneval_rules import Detection, check, check_metadata, keep_confident
from clvr_jax.evaluation.benchmarks.prompt_files import read_entries
from clvr_jax.evaluation.harness.benchmark import Benchmark, Item, Score
from clvr_jax.evaluation.harness.generation import Progress
from clvr_jax.evaluation.harness.images import BenchmarkImages, SampleIndex
from clvr_jax.evaluation.harness.run_directory import FileLayout, GenEvalLayout
from clvr_jax.evaluation.harness.scoring import Scorer, Scores
from clvr_jax.evaluation.harness.sources import Source, github
from clvr_jax.files.atomic_io import read_json, write_json
from clvr_jax.files.image_io import EncodedImage, read_encoded
from clvr_jax.files.json_input import JSON, JsonObject, UncheckedJSON

_FILES = {"prompts/evaluation_metadata.jsonl": "efc21c7e639cd45554a1e44fac87157211f16d51"}


class GenEvalFormat(Benchmark):
    """A benchmark with GenEval's metadata and layout, in which images are correct or not."""

    is_binary: ClassVar = True

    @override
    def layout(self, items: Sequence[Item]) -> FileLayout:
        return GenEvalLayout()

    @override
    def external_paths(self, root: Path, item: Item, sample: int) -> list[Path]:
        return [root / item.id / "samples" / f"{sample:04d}.png"]

    @override
    def check_external(self, root: Path, items: Sequence[Item]) -> None:
        """Raises ClvrError for metadata.jsonl of another prompt, because the official scorer relies on that file."""
        for item in items:
            path = root / item.id / "metadata.jsonl"
            if (found := read_json(path).get("prompt")) != item.prompt:
                raise ClvrError(f"{path}: has the prompt {found!r}, but prompt {item.id} is {item.prompt!r}")

    @override
    def metadata(self, item: Item) -> dict[str, JSON]:
        """Returns the record that the official scorer reads."""
        return dict(item.record)

    @override
    def item(self, metadata: UncheckedJSON, index: int) -> Item:
        entry = JsonObject(metadata, f"prompt {index}")
        tier = entry.optional("tier", entry.integer) if "tier" in metadata else None
        return Item(f"{index:05d}", entry.text("prompt"), entry.text("tag"), metadata, tier)


class GenEval(GenEvalFormat):
    """GenEval: each image is correct or not by rules over detections; the overall score is the mean over tags."""

    name: ClassVar = "geneval"
    title: ClassVar = "GenEval"
    samples: ClassVar = 4
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


class Detector(Protocol):
    """An object detector. The name and the revision of its models are recorded in results."""

    @property
    def name(self) -> str:
        """The name of the models."""
        ...

    @property
    def revision(self) -> str:
        """The digest of the models' weights."""
        ...

    def find(self, image: EncodedImage, metadata: UncheckedJSON) -> dict[str, list[Detection]]:
        """Returns the detected objects by class, with colors for the classes whose color the metadata names."""
        ...


@dataclass(frozen=True)
class DetectorScorer(Scorer):
    """Scores GenEval's images by the objects that a detector finds; detections on disk are not computed again.

    detector: the models that find objects.
    """

    detector: Detector

    @override
    def score(self, images: BenchmarkImages, on_progress: Progress | None = None) -> Scores:
        scores: dict[SampleIndex, Score | None] = {}
        for number, ((index, sample), path) in enumerate(images.existing.items()):
            if on_progress:
                on_progress(number, len(images.existing))
            record = images.directory.prompt_dir(index) / "detections" / f"{sample:04d}.json"
            scores[index, sample] = recorded_score(record, read_encoded(path), images.items[index], self.detector)
        if on_progress:
            on_progress(len(images.existing), len(images.existing))
        return Scores(scores, {"name": self.detector.name, "revision": self.detector.revision})


def recorded_score(path: Path, image: EncodedImage, item: Item, detector: Detector) -> Score:
    """Returns the score of an image by its detections, which are read from a record or computed and recorded.

    Args:
      path: of the record.
      image: the image.
      item: its prompt.
      detector: called if there is no record by these models for this image.
    """
    digest = hashlib.sha256(image.content).hexdigest()
    owner = {"detector": detector.name, "revision": detector.revision, "picture": digest}
    record = read_json(path) if path.exists() else {}
    if {name: record.get(name) for name in owner} != owner:
        found = detector.find(image, item.record)
        record = {**owner, "found": {name: [asdict(one) for one in each] for name, each in found.items()}}
        write_json(path, record)
    return score_detections(_found(path, record), item)


def score_detections(found: Mapping[str, Sequence[Detection]], item: Item) -> Score:
    """Returns the score of detections by GenEval's rules."""
    correct, reasons = check(keep_confident(found, item.tag), item.record)
    return Score.binary(correct, reasons)


def _found(path: Path, record: UncheckedJSON) -> dict[str, list[Detection]]:
    try:
        return {
            name: [Detection(tuple(one["box"]), one["confidence"], one["color"]) for one in each]
            for name, each in record["found"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ClvrError(f"{path}: not a record of detections ({error}); remove the file") from error
