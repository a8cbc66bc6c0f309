"""Images as the loop passes them: uint8 arrays, PIL images, or files that nobody has decoded yet; RGB.

This is the one reader of image files and of encoded images from servers and datasets: which decoders run, how large an
image may be, and how transparency, orientation and other modes become RGB is decided here and nowhere else.
"""

from __future__ import annotations

import io
import os
import stat
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
MAX_FILE_BYTES = 256 << 20
"""Most bytes of an image file that is read."""
_STRIP_PIXELS = 2**20
"""Pixels that are converted to RGB at a time."""
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


ImageLike = np.ndarray | Image.Image | EncodedPicture
"""(height, width, 3) uint8, a PIL image of any mode, or a file's bytes."""


def pixels(picture: ImageLike) -> np.ndarray:
    """The image as (height, width, 3) uint8; transparent parts of a PIL image or a file become white.

    Raises: ClvrError for arrays of another shape or dtype, and for a damaged file.
    """
    if isinstance(picture, EncodedPicture):
        return decode_image(picture.content)
    if isinstance(picture, Image.Image):
        return _array(picture, "image")
    if not isinstance(picture, np.ndarray):
        raise ClvrError(f"picture: expected a numpy array or a PIL image, got {type(picture).__name__}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        raise ClvrError(f"picture: expected uint8 (height, width, 3), got {picture.dtype} {picture.shape}")
    return picture


def as_pil(picture: ImageLike) -> Image.Image:
    """The image as a PIL image: a PIL image as it is, so that FLUX.2 reads references as diffusers does; else RGB."""
    return picture if isinstance(picture, Image.Image) else Image.fromarray(pixels(picture))


def encode_png(picture: ImageLike) -> bytes:
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
      pixels or `MAX_FILE_BYTES` bytes.
    """
    with _opened_file(path) as image:
        return _upright_array(image, _named(path))


def decode_image(content: bytes, where: str = "image") -> np.ndarray:
    """Decodes an image that a server or a dataset gave; as `read_image`, with `where` in messages."""
    with _opened(io.BytesIO(content), where) as image:
        return _upright_array(image, where)


def lazy_image(content: bytes, where: str = "image") -> Image.Image:
    """Reads the header of an encoded image; its pixels are decoded when they are first asked for.

    Raises: ClvrError as `read_image`; damage in the pixels is found by `pixels`.
    """
    return _checked(io.BytesIO(content), where)


def check_image(path: str | os.PathLike[str]) -> None:
    """Checks format, size and, as far as the format has checksums, the content of an image file.

    Raises: ClvrError as `read_image`.
    """
    with _opened_file(path) as image:
        try:
            image.verify()
        except _DECODER_ERRORS as error:
            raise ClvrError(f"{_named(path)}: not a readable image ({_reason(error)})") from error


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of an image file as it is stored; nothing is decoded. Raises: ClvrError as `read_image`."""
    with _opened_file(path) as image:
        return image.height, image.width


read_png = read_image
"""The name under which older code imports `read_image`."""


def read_encoded(path: Path) -> EncodedPicture:
    """Reads an image file without decoding it where that is possible.

    Returns: the file as it is for an upright 8-bit RGB PNG or JPEG without transparency, else `read_image` as PNG.
    Raises: ClvrError as `read_image`; damage in the pixels of a file that is passed on as it is stays unnoticed.
    """
    with _opened_file(path) as image:
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
def _opened_file(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Opens an image file whose format and size are fine; its pixels are not decoded yet."""
    where = _named(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise ClvrError(f"{where}: no such image") from error
    if not stat.S_ISREG(status.st_mode):  # a pipe would block, a directory cannot be read
        raise ClvrError(f"{where}: not a file; give an image in {_LISTED_FORMATS}")
    if status.st_size > MAX_FILE_BYTES:
        raise ClvrError(f"{where}: has {status.st_size >> 20} MiB; at most {MAX_FILE_BYTES >> 20} are allowed")
    with _opened(path, where) as image:
        yield image


@contextmanager
def _opened(source: str | os.PathLike[str] | io.BytesIO, where: str) -> Iterator[Image.Image]:
    with _checked(source, where) as image:
        yield image


def _checked(source: str | os.PathLike[str] | io.BytesIO, where: str) -> Image.Image:
    """An image whose header is read and checked; the only place that lets Pillow look at outside bytes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
            # Without `formats` a PostScript file would make Pillow run Ghostscript.
            image = Image.open(source, formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise ClvrError(f"{where}: not a readable image; expected is {_LISTED_FORMATS}") from error
    except Image.DecompressionBombError as error:
        raise ClvrError(f"{where}: has more than {MAX_PIXELS:,} pixels; make it smaller") from error
    except _DECODER_ERRORS as error:
        raise ClvrError(f"{where}: not a readable image ({_reason(error)})") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ClvrError(
            f"{where}: has {image.width:,} x {image.height:,} pixels, more than the {MAX_PIXELS:,} allowed; make it "
            "smaller"
        )
    return image


def _upright_array(image: Image.Image, where: str) -> np.ndarray:
    try:
        return _array(_upright(image), where)
    except _DECODER_ERRORS as error:
        raise ClvrError(f"{where}: not a readable image ({_reason(error)})") from error


def _array(image: Image.Image, where: str) -> np.ndarray:
    """The image as RGB, converted in strips: conversions of a whole image would take several times its memory."""
    try:
        image.load()
        array = np.empty((image.height, image.width, 3), np.uint8)
        rows = max(1, _STRIP_PIXELS // max(1, image.width))
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            strip.format = image.format
            array[top : top + rows] = np.asarray(_rgb(strip))
        return array
    except _DECODER_ERRORS as error:
        raise ClvrError(f"{where}: not a readable image ({_reason(error)})") from error


def _named(path: str | os.PathLike[str]) -> str:
    """A path as messages name it: on one line, and not longer than a line."""
    text = os.fspath(path)
    return text if len(text) <= 400 and text.isprintable() else f"{text:.400}".encode("unicode_escape").decode()


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
    turned.format = image.format
    return turned


def _rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB; transparent parts become white."""
    # 16-bit grayscale, which Pillow's own conversion would clip at 255. "I" has 32 bits; only PNG fills 16 of them.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
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
