"""Labeled images of any kind as cases of the verifier benchmark: a directory with images and labels.jsonl.

Each line of labels.jsonl is a JSON object: {"image": file name relative to the directory, "prompt": text, "label":
whether the image meets the prompt, "kind": optional name of a group of images, such as a kind of mistake}. Other keys
are ignored. The directory is outside data: everything in it is checked.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.verifier.cases import RIGHT, Case
from clvr_jax.files.file_names import listed_file
from clvr_jax.files.image_io import image_size, pixels, read_image
from clvr_jax.files.json_input import JsonObject, parse_object, read_lines, shown

LABELS = "labels.jsonl"
GROUP = "images"
_WRONG = "wrong"
_MAX_LABEL_BYTES = 64 << 20
_MAX_PROMPT = 20_000
_MAX_KIND = 64
_MAX_NAME = 1024


def labeled_images(directory: Path) -> list[Case]:
    """Reads labels.jsonl and the header of each image; images are decoded when they are needed.

    Raises: ClvrError, one line with the line number of labels.jsonl, for anything that is not as described above, for
      images outside the directory, and for images that are too large; see `image_io.read_image`.
    """
    advice = "the directory of --images needs one"
    lines = read_lines(directory / LABELS, _MAX_LABEL_BYTES, advice)
    cases = [_case(directory, line, where) for where, line in lines]
    if not cases:
        raise ClvrError(
            f'{directory / LABELS}: no labels; write one JSON object {{"image", "prompt", "label"}} in each line'
        )
    return cases


def load_image(case: Case) -> np.ndarray:
    """Reads the image of a case, uint8 (height, width, 3), as `image_io.read_image` does.

    Raises: ClvrError for a file that cannot be decoded.
    """
    if not isinstance(case.image, Path):
        return pixels(case.image)
    try:
        return read_image(case.image)
    except ClvrError as error:
        raise ClvrError(f"{case.source}: {error}") from error


def _case(directory: Path, line: str, where: str) -> Case:
    entry = parse_object(line, where)
    prompt = _text(entry, "prompt", _MAX_PROMPT)
    label = entry.content.get("label")
    if not isinstance(label, bool):
        raise ClvrError(f"{where}: label must be true or false, got {shown(label)}")
    kind = _text(entry, "kind", _MAX_KIND) if "kind" in entry.content else RIGHT if label else _WRONG
    path = listed_file(directory, _text(entry, "image", _MAX_NAME), where)
    try:
        image_size(path)
    except ClvrError as error:
        raise ClvrError(f"{where}: {error}") from error
    return Case(prompt, path, label, kind, GROUP, source=where)


def _text(entry: JsonObject, key: str, limit: int) -> str:
    value = entry.content.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ClvrError(f"{entry.where}: {key} must be a text that is not empty, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ClvrError(f"{entry.where}: {key} is not valid Unicode") from None
    return entry.text(key, max_characters=limit)
