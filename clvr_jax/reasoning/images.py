"""Pictures as the loop passes them: uint8 arrays, PIL images, or files that nobody has decoded yet; RGB."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from clvr_jax.errors import ClvrError

MAX_PIXELS = 2**26
"""Most pixels of an image file that is read: 8192 x 8192."""
_FORMATS = ("PNG", "JPEG", "WEBP")
_LISTED_FORMATS = "PNG, JPEG or WebP"
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, OverflowError, struct.error, zlib.error,
)  # fmt: skip
"""What Pillow raises for damaged files; which of them depends on the format."""


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


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image file that anyone may have written.

    Only the decoders of PNG, JPEG and WebP run, and the size is checked before pixels are decoded. The image is turned
    upright as its EXIF orientation says, transparent parts become white, and 16-bit, palette, grayscale and CMYK images
    become 8-bit RGB. Of an animation the first frame is read.

    Returns: (height, width, 3) uint8.
    Raises: ClvrError, one line, if the file is missing, is not such an image, is damaged, or has more than `MAX_PIXELS`
      pixels.
    """
    with _opened(path) as image:
        try:
            upright = _upright(image)
            return np.array(_rgb(upright))
        except _DECODER_ERRORS as error:
            raise ClvrError(f"{path}: not a readable image ({_reason(error)})") from error


read_png = read_image
"""The name under which older code imports `read_image`."""


def read_encoded(path: Path) -> EncodedPicture:
    """Reads an image file without decoding it where that is possible.

    Returns: the file as it is for an upright 8-bit RGB PNG or JPEG without transparency, else `read_image` as PNG.
    Raises: ClvrError as `read_image`; damage in the pixels of a file that is passed on as it is stays unnoticed.
    """
    with _opened(path) as image:
        kind = {"PNG": "png", "JPEG": "jpeg"}.get(image.format or "")
        is_rgb = image.mode == "RGB" and "transparency" not in image.info
        # Pillow would decode a PNG without EXIF in its head to look for EXIF behind the pixels.
        as_it_is = is_rgb and ((kind == "png" and "exif" not in image.info) or _orientation(image) == 1)
    if kind is None or not as_it_is:
        return EncodedPicture(encode_png(read_image(path)), "png")
    try:
        return EncodedPicture(path.read_bytes(), "png" if kind == "png" else "jpeg")
    except OSError as error:
        raise ClvrError(f"{path}: cannot be read ({error.strerror or error})") from error


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Opens an image file whose format and size are fine; its pixels are not decoded yet."""
    if not os.path.exists(path):
        raise ClvrError(f"{path}: no such image")
    if not os.path.isfile(path):  # a pipe would block, a directory cannot be read
        raise ClvrError(f"{path}: not a file; give an image in {_LISTED_FORMATS}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
            image = Image.open(path, formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise ClvrError(f"{path}: not a readable image; expected is {_LISTED_FORMATS}") from error
    except Image.DecompressionBombError as error:
        raise ClvrError(f"{path}: has more than {MAX_PIXELS:,} pixels; make it smaller") from error
    except _DECODER_ERRORS as error:
        raise ClvrError(f"{path}: not a readable image ({_reason(error)})") from error
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise ClvrError(
                f"{path}: has {image.width:,} x {image.height:,} pixels, more than the {MAX_PIXELS:,} allowed; make it "
                "smaller"
            )
        yield image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, which is upright, if there is none or its EXIF cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damaged EXIF
            found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:  # damaged EXIF, but the pixels may be fine
        return 1
    return found if found in range(1, 9) else 1


def _upright(image: Image.Image) -> Image.Image:
    """The image turned or mirrored as its EXIF orientation says."""
    steps = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    step = steps.get(_orientation(image))
    if step is None:
        return image
    turned = image.transpose(step)
    turned.info.update(image.info)  # a transparent color, if there is one
    return turned


def _rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB; transparent parts become white."""
    if image.mode.startswith("I"):  # 16-bit grayscale, which Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.int64)
        gray = ((values * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            gray[values == transparent] = 255
        return Image.fromarray(gray).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
