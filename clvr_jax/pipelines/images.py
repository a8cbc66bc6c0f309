"""Conversion of images between PIL and the arrays of the models."""

import math

import numpy as np
from PIL import Image

from clvr_jax.errors import UsageError


def check_size(height: int, width: int, multiple: int) -> None:
    """Raises UsageError, with the nearest size that is possible, unless both sides are positive multiples of a number.

    Args:
      height, width: in pixels.
      multiple: in pixels: the side of the patch of one token or latent.
    """
    sides = height, width
    if any(side < 1 or side % multiple for side in sides):
        nearest = " x ".join(str(max(1, round(side / multiple)) * multiple) for side in sides)
        raise UsageError(
            f"size {height} x {width}: both sides must be multiples of {multiple} pixels; the nearest size is {nearest}"
        )


def prepare_reference(image: Image.Image, multiple: int, max_pixels: int) -> np.ndarray:
    """Returns a reference as the autoencoder takes it: scaled down if too large, center-cropped to multiples.

    Args:
      image: any size and mode.
      multiple: sides of the result are multiples of it.
      max_pixels: larger images are scaled down (Lanczos) to about this area; smaller ones are not scaled up.
    Returns: float32 (h, w, 3) in [-1, 1].
    Source: Flux2ImageProcessor (diffusers).
    """
    image = image.convert("RGB")
    width, height = image.size
    if width * height > max_pixels:
        scale = math.sqrt(max_pixels / (width * height))
        image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.LANCZOS)
        width, height = image.size
    new_width, new_height = width // multiple * multiple, height // multiple * multiple
    if not new_width or not new_height:
        raise UsageError(f"reference of {width} x {height} pixels is too small; each side needs at least {multiple}")
    left, top = (width - new_width) // 2, (height - new_height) // 2
    image = image.crop((left, top, left + new_width, top + new_height))
    return np.asarray(image, np.float32) / 255 * 2 - 1


def to_pil(image_hwc: np.ndarray) -> Image.Image:
    """Converts float32 (h, w, 3) in [0, 1] to a PIL image, rounded to the nearest of 256 levels."""
    return Image.fromarray(np.round(image_hwc * 255).astype(np.uint8))
