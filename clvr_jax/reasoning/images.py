"""Pictures as the loop passes them: uint8 arrays, PIL images, or files that nobody has decoded yet; RGB."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from clvr_jax.errors import ClvrError


@dataclass(frozen=True)
class EncodedPicture:
    """An RGB picture as the bytes of its file: what is only sent on need not be decoded and encoded again."""

    content: bytes = field(repr=False)
    kind: Literal["png", "jpeg"]


Picture = np.ndarray | Image.Image | EncodedPicture
"""(height, width, 3) uint8, a PIL image of any mode, or a file's bytes."""


def pixels(picture: Picture) -> np.ndarray:
    """The picture as (height, width, 3) uint8; ClvrError for arrays of another shape or dtype."""
    if isinstance(picture, Image.Image | EncodedPicture):
        return np.asarray(as_pil(picture).convert("RGB"))
    if not isinstance(picture, np.ndarray):
        raise ClvrError(f"picture: expected a numpy array or a PIL image, got {type(picture).__name__}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        raise ClvrError(f"picture: expected uint8 (height, width, 3), got {picture.dtype} {picture.shape}")
    return picture


def as_pil(picture: Picture) -> Image.Image:
    """The picture as a PIL image; one that is none yet is checked as `pixels` does."""
    if isinstance(picture, EncodedPicture):
        return Image.open(io.BytesIO(picture.content))
    return picture if isinstance(picture, Image.Image) else Image.fromarray(pixels(picture))


def encode_png(picture: Picture) -> bytes:
    """The picture as the bytes of an RGB PNG file."""
    if isinstance(picture, EncodedPicture) and picture.kind == "png":
        return picture.content
    buffer = io.BytesIO()
    Image.fromarray(pixels(picture)).save(buffer, format="PNG")
    return buffer.getvalue()


def read_png(path: Path) -> np.ndarray:
    """A picture file as (height, width, 3) uint8; ClvrError if it is missing or is no picture."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise ClvrError(f"{path}: no such picture") from None
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ClvrError(f"{path}: not a readable picture ({error})") from error


def read_encoded(path: Path) -> EncodedPicture:
    """A picture file, as it lies there if it is an RGB PNG or JPEG, else as PNG; ClvrError as for `read_png`.

    Only the file's head is read: damage further on is found by who decodes it.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            if image.mode == "RGB" and image.format == "PNG":
                return EncodedPicture(content, "png")
            if image.mode == "RGB" and image.format == "JPEG":
                return EncodedPicture(content, "jpeg")
    except FileNotFoundError:
        raise ClvrError(f"{path}: no such picture") from None
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ClvrError(f"{path}: not a readable picture ({error})") from error
    return EncodedPicture(encode_png(read_png(path)), "png")
