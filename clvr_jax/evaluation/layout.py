"""A folder of benchmark pictures in a benchmark's own layout, written so that a run that is killed can go on.

<root>/benchmark.json               what this folder holds: benchmark, settings, seed, samples, the prompts' hash
<root>/00000/metadata.jsonl         one line, GenEval's metadata
<root>/00000/samples/0000.png       the pictures, for GenEval's own scorer
<root>/00000/records/0000.json      prompt, seed and cost; written last: with it the picture is complete
<root>/00000/trajectories/0000/     how the picture came about (closed loop only)
<root>/results.json                 the scores

Benchmarks with flat layouts have their pictures in <root>/images/, and the rest in <root>/prompts/00000/.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from PIL import Image
from typing_extensions import override

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.drawn import Drawn
from clvr_jax.files import write_atomically, write_json, write_text
from clvr_jax.json_input import JsonObject, check_unicode, read_object
from clvr_jax.reasoning.images import Picture, encode_png, pixels, read_image
from clvr_jax.reasoning.trajectory import Trajectory

_IDENTITY = "benchmark.json"
_JPEG_QUALITY = 95
_MAX_SAMPLES, _MAX_PROMPTS = 10**4, 10**7


class Places(Protocol):
    """Where things lie, as paths below the root of a folder."""

    def home(self, index: int) -> Path:
        """The folder of what belongs to a prompt."""
        ...

    def picture(self, index: int, sample: int) -> Path:
        """The file of a picture, .png or .jpg."""
        ...


@dataclass(frozen=True)
class GenEvalPlaces(Places):
    """GenEval's: a folder for each prompt, numbered from 0."""

    @override
    def home(self, index: int) -> Path:
        return Path(f"{index:05d}")

    @override
    def picture(self, index: int, sample: int) -> Path:
        return self.home(index) / "samples" / f"{sample:04d}.png"


@dataclass(frozen=True)
class FlatPlaces(Places):
    """Pictures named by the ids of their prompts; the second sample of every prompt lies in images_1, and so on."""

    ids: tuple[str, ...]
    suffix: str = ".png"

    @override
    def home(self, index: int) -> Path:
        return Path("prompts", f"{index:05d}")

    @override
    def picture(self, index: int, sample: int) -> Path:
        return Path(f"images_{sample}" if sample else "images", self.ids[index] + self.suffix)


@dataclass(frozen=True)
class Record:
    """What is known about one picture besides its pixels.

    Attributes:
      prompt: as in the metadata.
      seed: it was drawn with.
      has_picture: False if the closed loop ended without any picture, or an endpoint refused to draw.
      nfe, seconds, steps, outcome, input_tokens, output_tokens, dollars, device: see report.PictureScore.
    """

    prompt: str
    seed: int
    has_picture: bool
    nfe: int | None
    seconds: float | None
    steps: int | None
    outcome: str | None
    input_tokens: int | None = None
    output_tokens: int | None = None
    dollars: float | None = None
    device: str | None = None

    @classmethod
    def of(cls, drawn: Drawn, prompt: str, seed: int, seconds: float, device: str | None) -> Self:
        """What is known about a picture that was just drawn."""
        trajectory, usage = drawn.trajectory, drawn.usage
        return cls(
            prompt=prompt,
            seed=seed,
            has_picture=drawn.image is not None,
            nfe=drawn.nfe,
            seconds=seconds,
            steps=None if trajectory is None else len(trajectory.drawings),
            outcome=drawn.outcome if trajectory is None else trajectory.outcome,
            input_tokens=None if usage is None else usage.input_tokens,
            output_tokens=None if usage is None else usage.output_tokens,
            dollars=None if usage is None else usage.dollars,
            device=device,
        )

    @classmethod
    def from_json(cls, entry: JsonObject) -> Self:
        """Reads what was written. Raises: ClvrError for missing or unknown fields, another type or range."""
        if unknown := sorted(entry.content.keys() - {each.name for each in fields(cls)}):
            raise ClvrError(f"{entry.where}: malformed, has unknown fields {', '.join(unknown):.200}")
        found: dict[str, Any] = {
            "prompt": entry.text("prompt"),
            "seed": entry.integer("seed"),
            "has_picture": entry.boolean("has_picture"),
        }
        for name in ("nfe", "steps", "input_tokens", "output_tokens"):
            found[name] = _optional(entry, name, partial(entry.integer, low=0))
        for name in ("seconds", "dollars"):
            found[name] = _optional(entry, name, partial(entry.number, low=0))
        for name in ("outcome", "device"):
            found[name] = _optional(entry, name, entry.text)
        return cls(**found)

    def cost(self) -> dict[str, Any]:
        """What a score also says of the picture, as keywords of PictureScore."""
        return {name: value for name, value in asdict(self).items() if name not in ("prompt", "seed", "has_picture")}


@dataclass(frozen=True)
class Folder:
    """The pictures of one benchmark run; places: where they lie."""

    root: Path
    places: Places = GenEvalPlaces()

    def prepare(self, identity: Mapping[str, Any], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Begins a run or goes on with one.

        Args:
          identity: JSON values that must be the same for all pictures here: benchmark, settings, seed, samples.
          metadata: of each prompt, with "prompt" among it; GenEval's own in the shapes world.
        Raises: ClvrError if the folder holds pictures of another run; it names every difference.
        """
        identity = json.loads(json.dumps({**identity, **_fingerprint(metadata)}))
        path = self.root / _IDENTITY
        try:
            exists = path.exists()
            strangers = not exists and self.root.is_dir() and any(map(_holds_pictures, self.root.iterdir()))
        except OSError as error:
            raise ClvrError(f"{self.root}: cannot be read ({error.strerror or error})") from error
        if strangers:
            raise ClvrError(
                f"{self.root}: holds pictures but no {_IDENTITY}, so whose is unknown; choose another folder"
            )
        if exists:
            found = self.identity()
            differences = _differences(found, identity)
            if differences:
                raise ClvrError(f"{self.root}: holds another run ({'; '.join(differences)}); choose another folder")
        else:
            write_json(path, identity)
        for index, entry in enumerate(metadata):
            line = json.dumps(entry, ensure_ascii=False) + "\n"
            path = self.home(index) / "metadata.jsonl"
            if not path.exists():
                write_text(path, line)

    def identity(self) -> dict[str, Any]:
        """The content of benchmark.json; ClvrError if it is missing or malformed."""
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
        return dict(found.content)

    def metadata(self) -> list[dict[str, Any]]:
        """The metadata of all prompts, in order."""
        return [_metadata(self.home(index) / "metadata.jsonl") for index in range(self.identity()["prompts"])]

    def add(self, index: int, sample: int, drawn: Drawn, record: Record) -> None:
        """Writes one picture; its record comes last, so that what is cut short is drawn again."""
        if drawn.image is not None:
            path = self.picture_path(index, sample)
            write_atomically(path, _encode(drawn.image, path.suffix))
        if drawn.trajectory is not None:
            drawn.trajectory.save(self._of(index, "trajectories", sample))
        write_json(self._of(index, "records", sample, ".json"), asdict(record))

    def is_complete(self, index: int, sample: int, prompt: str, seed: int) -> bool:
        """Whether this picture is there and was drawn for this prompt with this seed."""
        if not self.has_record(index, sample):
            return False
        record = self.record(index, sample)
        return (
            record.prompt == prompt
            and record.seed == seed
            and (not record.has_picture or self.picture_path(index, sample).exists())
        )

    def has_record(self, index: int, sample: int) -> bool:
        """Whether this picture was drawn, or tried and given up."""
        return self._of(index, "records", sample, ".json").exists()

    def record(self, index: int, sample: int) -> Record:
        """The record of one picture; ClvrError if it is missing or malformed."""
        return Record.from_json(read_object(self._of(index, "records", sample, ".json")))

    def picture(self, index: int, sample: int) -> np.ndarray:
        """One picture, uint8 (height, width, 3); ClvrError if it is missing."""
        return read_image(self.picture_path(index, sample))

    def trajectory(self, index: int, sample: int) -> Trajectory | None:
        """How one picture came about, None if it was drawn without the loop; ClvrError if it is malformed."""
        path = self._of(index, "trajectories", sample)
        return Trajectory.load(path) if path.is_dir() else None

    def home(self, index: int) -> Path:
        """The folder of what belongs to a prompt."""
        return self.root / self.places.home(index)

    def picture_path(self, index: int, sample: int) -> Path:
        """The file of one picture."""
        return self.root / self.places.picture(index, sample)

    def _of(self, index: int, kind: str, sample: int, suffix: str = "") -> Path:
        return self.home(index) / kind / f"{sample:04d}{suffix}"


def _optional(entry: JsonObject, name: str, read: Callable[[str], Any]) -> Any:
    """A field that older versions did not write, or wrote as null."""
    return entry.optional(name, read) if name in entry.content else None


def _metadata(path: Path) -> dict[str, Any]:
    entry = read_object(path)
    check_unicode(entry.content, entry.where)
    entry.text("prompt")
    return dict(entry.content)


def _holds_pictures(entry: Path) -> bool:
    return entry.name.isdigit() or entry.name in ("images", "prompts")


def _encode(picture: Picture, suffix: str) -> bytes:
    if suffix == ".png":
        return encode_png(picture)
    buffer = io.BytesIO()
    Image.fromarray(pixels(picture)).save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _fingerprint(metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    text = "\n".join(json.dumps(entry, sort_keys=True) for entry in metadata)
    return {"prompts": len(metadata), "metadata_sha256": hashlib.sha256(text.encode()).hexdigest()}


def _differences(found: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every key in which two nested objects differ, with both sides."""
    lines = []
    for key in sorted({*found, *asked}):
        there, here = found.get(key), asked.get(key)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            lines += _differences(there, here, f"{prefix}{key}.")
        elif there != here or (key in found) != (key in asked):
            lines.append(f"{prefix}{key}: {json.dumps(there)} there, {json.dumps(here)} asked for")
    return lines
