"""Pictures as the loop passes them: uint8 arrays or PIL images, RGB."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from clvr_jax.errors import ClvrError

Picture = np.ndarray | Image.Image
"""(height, width, 3) uint8, or a PIL image of any mode."""


def pixels(picture: Picture) -> np.ndarray:
    """The picture as (height, width, 3) uint8; ClvrError for arrays of another shape or dtype."""
    if isinstance(picture, Image.Image):
        return np.asarray(picture.convert("RGB"))
    if not isinstance(picture, np.ndarray):
        raise ClvrError(f"picture: expected a numpy array or a PIL image, got {type(picture).__name__}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        raise ClvrError(f"picture: expected uint8 (height, width, 3), got {picture.dtype} {picture.shape}")
    return picture


def as_pil(picture: Picture) -> Image.Image:
    """The picture as a PIL image; one that is none yet is checked as `pixels` does."""
    return picture if isinstance(picture, Image.Image) else Image.fromarray(pixels(picture))


def encode_png(picture: Picture) -> bytes:
    """The picture as the bytes of an RGB PNG file."""
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
