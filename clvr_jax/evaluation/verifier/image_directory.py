"""Labeled images of any kind as cases of the verifier benchmark: a directory with images and labels.jsonl.

Each line of labels.jsonl is a JSON object: {"image": file name relative to the directory, "prompt": text, "label":
whether the image meets the prompt, "kind": optional name of a group of images, such as a kind of mistake}. Other keys
are ignored. The directory is outside data: everything in it is checked.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.verifier.cases import RIGHT, Case
from clvr_jax.reasoning.images import pixels

LABELS = "labels.jsonl"
GROUP = "images"
_WRONG = "wrong"
_MAX_LABEL_BYTES = 64 << 20
_MAX_FILE_BYTES = 64 << 20
_MAX_PIXELS = 50_000_000
_MAX_PROMPT = 20_000
_MAX_KIND = 64
_FAILURES = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""Pillow's errors for files that are not images, are damaged, or are too large."""


def labeled_images(directory: Path) -> list[Case]:
    """Reads labels.jsonl and the header of each image; images are decoded when they are needed.

    Raises: ClvrError, one line with the line number of labels.jsonl, for anything that is not as described above, for
      images outside the directory, and for images of more than 50 megapixels or 64 MiB.
    """
    path = directory / LABELS
    cases = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            cases.append(_case(directory, line, f"{path}:{number}"))
    if not cases:
        raise ClvrError(f'{path}: no labels; write one JSON object {{"image", "prompt", "label"}} in each line')
    return cases


def load_image(case: Case) -> np.ndarray:
    """The image of a case as uint8 (height, width, 3).

    Images are turned as their EXIF orientation says; transparent ones are placed on white.

    Raises: ClvrError for a file that cannot be decoded.
    """
    if not isinstance(case.image, Path):
        return pixels(case.image)
    try:
        with _opened(case.image) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, (255, 255, 255, 255)), upright)
            return np.asarray(upright.convert("RGB"))
    except _FAILURES as error:
        raise ClvrError(f"{case.source}: {case.image.name} cannot be decoded ({_reason(error)})") from error


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_LABEL_BYTES:
            raise ClvrError(f"{path}: larger than {_MAX_LABEL_BYTES >> 20} MiB; split the directory")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ClvrError(f"{path}: no such file; the directory of --images needs one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ClvrError(f"{path}: cannot be read ({error})") from error


def _case(directory: Path, line: str, where: str) -> Case:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ClvrError(f"{where}: not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise ClvrError(f"{where}: expected a JSON object, got {type(entry).__name__}")
    prompt = _text(entry, "prompt", where, _MAX_PROMPT)
    label = entry.get("label")
    if not isinstance(label, bool):
        raise ClvrError(f"{where}: label must be true or false, got {label!r:.80}")
    kind = _text(entry, "kind", where, _MAX_KIND) if "kind" in entry else RIGHT if label else _WRONG
    return Case(prompt, _image_file(directory, entry, where), label, kind, GROUP, source=where)


def _text(entry: dict[str, Any], key: str, where: str, limit: int) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ClvrError(f"{where}: {key} must be a text that is not empty, got {value!r:.80}")
    if len(value) > limit:
        raise ClvrError(f"{where}: {key} has {len(value):,} characters; at most {limit:,} are allowed")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ClvrError(f"{where}: {key} is not valid Unicode") from None
    return value


def _image_file(directory: Path, entry: dict[str, Any], where: str) -> Path:
    name = _text(entry, "image", where, 1024)
    path = directory / name
    try:
        # Resolved, so that neither ".." nor a link leads out of the directory.
        is_inside = path.resolve().is_relative_to(directory.resolve())
        if not is_inside or Path(name).is_absolute():
            raise ClvrError(f"{where}: image {name!r:.200} is outside the directory; give a name relative to it")
        if not path.is_file():
            raise ClvrError(f"{where}: no such image, {name!r:.200}")
        if (size := path.stat().st_size) > _MAX_FILE_BYTES:
            raise ClvrError(
                f"{where}: image {name!r} has {size >> 20} MiB; at most {_MAX_FILE_BYTES >> 20} are allowed"
            )
        with _opened(path) as image:
            width, height = image.size
    except _FAILURES as error:
        raise ClvrError(f"{where}: {name!r:.200} is not a readable image ({_reason(error)})") from error
    if width * height > _MAX_PIXELS:
        raise ClvrError(
            f"{where}: image {name!r} has {width} x {height} pixels; at most {_MAX_PIXELS:,} pixels are allowed"
        )
    return path


def _opened(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns of large images; our own limit is lower.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
