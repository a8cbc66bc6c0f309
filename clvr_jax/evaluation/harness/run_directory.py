"""The directory of a benchmark run, in the benchmark's own layout, written so that a killed run can resume.

<root>/benchmark.json               the identity of the run: benchmark, settings, seed, samples, hash of the prompts
<root>/00000/metadata.jsonl         one line, GenEval's metadata
<root>/00000/samples/0000.png       the images, for GenEval's own scorer
<root>/00000/records/0000.json      prompt, seed and cost; written last, so an image with a record is complete
<root>/00000/trajectories/0000/     the trajectory that led to the image (closed loop only)
<root>/results.json                 the scores

Benchmarks with flat layouts have their images in <root>/images/, and the rest in <root>/prompts/00000/.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Protocol, Self, TypeVar, cast

import numpy as np
from PIL import Image
from typing_extensions import override

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.harness.results import Identity, ImageCost
from clvr_jax.evaluation.systems.system import SystemOutput
from clvr_jax.files.atomic_io import write_atomically, write_json, write_text
from clvr_jax.files.file_names import has_entry
from clvr_jax.files.image_io import ImageLike, encode_png, pixels, read_image
from clvr_jax.files.json_input import JSON, JsonObject, UncheckedJSON, check_unicode, read_object
from clvr_jax.reasoning.trajectories.trajectory import Trajectory

T = TypeVar("T")

_IDENTITY = "benchmark.json"
_KEYS = {"has_image": "has_picture"}
"""Fields of a record that have another name in its file, for directories that earlier versions wrote."""
_JPEG_QUALITY = 95
_MAX_SAMPLES, _MAX_PROMPTS = 10**4, 10**7


class FileLayout(Protocol):
    """Paths of the files of a run, relative to its root."""

    def prompt_dir(self, index: int) -> Path:
        """Returns the directory for the metadata, records and trajectories of a prompt."""
        ...

    def image(self, index: int, sample: int) -> Path:
        """Returns the file of an image, .png or .jpg."""
        ...


@dataclass(frozen=True)
class GenEvalLayout(FileLayout):
    """The layout of GenEval: a directory for each prompt, numbered from 0."""

    @override
    def prompt_dir(self, index: int) -> Path:
        return Path(f"{index:05d}")

    @override
    def image(self, index: int, sample: int) -> Path:
        return self.prompt_dir(index) / "samples" / f"{sample:04d}.png"


@dataclass(frozen=True)
class FlatLayout(FileLayout):
    """A layout with images named by the ids of their prompts; the second sample of each prompt is in images_1."""

    ids: tuple[str, ...]
    suffix: str = ".png"

    @override
    def prompt_dir(self, index: int) -> Path:
        return Path("prompts", f"{index:05d}")

    @override
    def image(self, index: int, sample: int) -> Path:
        return Path(f"images_{sample}" if sample else "images", self.ids[index] + self.suffix)


@dataclass(frozen=True)
class Record:
    """The record of one image: its prompt, its seed and its cost. JSON files name `has_image` "has_picture".

    Attributes:
      prompt: as in the metadata.
      seed: the seed that generated the image.
      has_image: False if the closed loop ended without an image, or an endpoint refused the prompt.
      nfe: network evaluations, None if not recorded.
      seconds: wall time of its batch divided by the size of the batch; for endpoints, from its request to its response.
      steps: number of images in its trajectory; None for one-shot generation.
      outcome: how the trajectory ended; None for one-shot generation.
      input_tokens, output_tokens: of the language model, None if not recorded; an equal share of a batch of prompts.
      dollars: the cost by the endpoints' price list.
      device: the device that generated the image.
      adapted: as in SystemOutput; files have it only where it is not empty.
    """

    prompt: str
    seed: int
    has_image: bool
    nfe: int | None
    seconds: float | None
    steps: int | None
    outcome: str | None
    input_tokens: int | None = None
    output_tokens: int | None = None
    dollars: float | None = None
    device: str | None = None
    adapted: tuple[str, ...] = ()

    @classmethod
    def from_output(cls, output: SystemOutput, prompt: str, seed: int, seconds: float, device: str | None) -> Self:
        """Returns the record of an image that was just generated."""
        trajectory, usage = output.trajectory, output.usage
        return cls(
            prompt=prompt,
            seed=seed,
            has_image=output.image is not None,
            nfe=output.nfe,
            seconds=seconds,
            steps=None if trajectory is None else len(trajectory.generated),
            outcome=output.outcome if trajectory is None else trajectory.outcome,
            input_tokens=None if usage is None else usage.input_tokens,
            output_tokens=None if usage is None else usage.output_tokens,
            dollars=None if usage is None else usage.dollars,
            device=device,
            adapted=output.adapted,
        )

    @classmethod
    def from_json(cls, entry: JsonObject) -> Self:
        """Reads a record file. Raises: ClvrError for a missing or unknown field, or a value of wrong type or range."""
        if unknown := sorted(entry.content.keys() - {_KEYS.get(each.name, each.name) for each in fields(cls)}):
            raise ClvrError(f"{entry.where}: malformed, has unknown fields {', '.join(unknown):.200}")
        count, amount = partial(entry.integer, low=0), partial(entry.number, low=0)
        return cls(
            prompt=entry.text("prompt"),
            seed=entry.integer("seed"),
            has_image=entry.boolean(_KEYS["has_image"]),
            nfe=_optional(entry, "nfe", count),
            seconds=_optional(entry, "seconds", amount),
            steps=_optional(entry, "steps", count),
            outcome=_optional(entry, "outcome", entry.text),
            input_tokens=_optional(entry, "input_tokens", count),
            output_tokens=_optional(entry, "output_tokens", count),
            dollars=_optional(entry, "dollars", amount),
            device=_optional(entry, "device", entry.text),
            adapted=entry.texts("adapted") if "adapted" in entry.content else (),
        )

    def to_json(self) -> dict[str, JSON]:
        """Returns the content of the record file."""
        content = {_KEYS.get(name, name): value for name, value in asdict(self).items()}
        adapted = content.pop("adapted")
        return {**content, "adapted": list(adapted)} if adapted else content

    def cost(self) -> ImageCost:
        """Returns the cost of the image: the fields of `cost.COSTS`."""
        return {
            "nfe": self.nfe,
            "seconds": self.seconds,
            "steps": self.steps,
            "outcome": self.outcome,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "dollars": self.dollars,
            "device": self.device,
        }


def adapted_requests(records: Iterable[Record]) -> list[str]:
    """Returns how the requests of a run differ from those to other servers, each difference once, in order."""
    return sorted({note for record in records for note in record.adapted})


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one benchmark run: reads and writes its files.

    Attributes:
      root: the directory.
      layout: the paths of the files in it.
    """

    root: Path
    layout: FileLayout = GenEvalLayout()

    def prepare(self, identity: Mapping[str, JSON], metadata: Sequence[UncheckedJSON]) -> None:
        """Starts a run, or checks that the directory can resume it.

        Args:
          identity: JSON values that are the same for all images of the run: benchmark, settings, seed, samples.
          metadata: one entry per prompt, with the key "prompt"; GenEval's own in the shapes world.
        Raises: ClvrError if the directory has images of another run; it names every difference.
        """
        identity = json.loads(json.dumps({**identity, **_fingerprint(metadata)}))
        path = self.root / _IDENTITY
        try:
            exists = has_entry(path)
            unidentified = not exists and self.root.is_dir() and any(map(_has_images, self.root.iterdir()))
        except OSError as error:
            raise ClvrError(f"{self.root}: cannot be read ({error.strerror or error})") from error
        if unidentified:
            raise ClvrError(
                f"{self.root}: has images but no {_IDENTITY}, so their run is unknown; choose another directory"
            )
        if exists:
            found = self.identity()
            differences = _differences(found, identity)
            if differences:
                raise ClvrError(
                    f"{self.root}: belongs to another run ({'; '.join(differences)}); choose another directory"
                )
        else:
            write_json(path, identity)
        for index, entry in enumerate(metadata):
            line = json.dumps(entry, ensure_ascii=False) + "\n"
            path = self.prompt_dir(index) / "metadata.jsonl"
            if not has_entry(path):
                write_text(path, line)

    def identity(self) -> Identity:
        """Returns the content of benchmark.json. Raises: ClvrError if it is missing or malformed."""
        found = read_object(self.root / _IDENTITY)
        lacking = [key for key in ("benchmark", "settings", "seed", "samples", "prompts") if key not in found.content]
        if lacking:
            raise ClvrError(f"{found.where}: malformed, lacks {', '.join(lacking)}")
        check_unicode(found.content, found.where)
        found.text("benchmark")
        found.nested("settings")
        found.integer("seed")
        found.integer("samples", low=1, high=_MAX_SAMPLES)
        found.integer("prompts", low=1, high=_MAX_PROMPTS)
        return cast(Identity, dict(found.content))

    def metadata(self) -> list[UncheckedJSON]:
        """Returns the metadata of all prompts, in order."""
        return [_metadata(self.prompt_dir(index) / "metadata.jsonl") for index in range(self.identity()["prompts"])]

    def add(self, index: int, sample: int, output: SystemOutput, record: Record) -> None:
        """Writes one image; its record is written last, so that an interrupted write is generated again."""
        if output.image is not None:
            path = self.image_path(index, sample)
            write_atomically(path, _encode(output.image, path.suffix))
        if output.trajectory is not None:
            output.trajectory.save(self._sample_path(index, "trajectories", sample))
        write_json(self._sample_path(index, "records", sample, ".json"), record.to_json())

    def is_complete(self, index: int, sample: int, prompt: str, seed: int) -> bool:
        """Returns whether this image exists and was generated for this prompt with this seed."""
        if not self.has_record(index, sample):
            return False
        record = self.record(index, sample)
        return (
            record.prompt == prompt
            and record.seed == seed
            and (not record.has_image or self.image_path(index, sample).exists())
        )

    def has_record(self, index: int, sample: int) -> bool:
        """Returns whether the generation of this image has ended, with or without an image."""
        return self._sample_path(index, "records", sample, ".json").exists()

    def record(self, index: int, sample: int) -> Record:
        """Returns the record of one image. Raises: ClvrError if it is missing or malformed."""
        return Record.from_json(read_object(self._sample_path(index, "records", sample, ".json")))

    def image(self, index: int, sample: int) -> np.ndarray:
        """Reads one image, uint8 (height, width, 3). Raises: ClvrError if it is missing."""
        return read_image(self.image_path(index, sample))

    def trajectory(self, index: int, sample: int) -> Trajectory | None:
        """Reads the trajectory of one image; None if the loop did not generate it.

        Raises: ClvrError if the trajectory is malformed.
        """
        path = self._sample_path(index, "trajectories", sample)
        return Trajectory.load(path) if path.is_dir() else None

    def prompt_dir(self, index: int) -> Path:
        """Returns the directory for the metadata, records and trajectories of a prompt."""
        return self.root / self.layout.prompt_dir(index)

    def image_path(self, index: int, sample: int) -> Path:
        """Returns the file of one image."""
        return self.root / self.layout.image(index, sample)

    def _sample_path(self, index: int, kind: str, sample: int, suffix: str = "") -> Path:
        return self.prompt_dir(index) / kind / f"{sample:04d}{suffix}"


def _optional(entry: JsonObject, name: str, read: Callable[[str], T]) -> T | None:
    """Reads a field that earlier versions did not write, or wrote as null."""
    return entry.optional(name, read) if name in entry.content else None


def _metadata(path: Path) -> UncheckedJSON:
    entry = read_object(path)
    check_unicode(entry.content, entry.where)
    entry.text("prompt")
    return entry.content


def _has_images(entry: Path) -> bool:
    return entry.name.isdigit() or entry.name in ("images", "prompts")


def _encode(image: ImageLike, suffix: str) -> bytes:
    if suffix == ".png":
        return encode_png(image)
    buffer = io.BytesIO()
    Image.fromarray(pixels(image)).save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _fingerprint(metadata: Sequence[UncheckedJSON]) -> dict[str, JSON]:
    text = "\n".join(json.dumps(entry, sort_keys=True) for entry in metadata)
    return {"prompts": len(metadata), "metadata_sha256": hashlib.sha256(text.encode()).hexdigest()}


def _differences(found: Mapping[str, object], asked: Mapping[str, object], prefix: str = "") -> list[str]:
    """Lists every key in which two nested objects differ, with both values."""
    lines = []
    for key in sorted({*found, *asked}):
        there, here = found.get(key), asked.get(key)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            lines += _differences(there, here, f"{prefix}{key}.")
        elif there != here or (key in found) != (key in asked):
            lines.append(f"{prefix}{key}: {json.dumps(there)} on disk, {json.dumps(here)} requested")
    return lines
