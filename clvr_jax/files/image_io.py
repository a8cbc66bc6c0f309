"""Images as uint8 arrays, PIL images or encoded files, and the one reader of image files and encoded images.

Only this module decodes images of files, servers and datasets. It decides which decoders run, how large an image may
be, and how transparency, EXIF orientation and other modes are converted to RGB.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from clvr_jax.errors import ClvrError
from clvr_jax.files.file_names import is_regular_file, shown_path

MAX_PIXELS = 2**26
"""Maximum pixels of an image file: 8192 x 8192."""
MAX_FILE_BYTES = 256 << 20
"""Maximum size of an image file in bytes."""
MAX_ARRAY_BYTES = 4 << 30
"""Maximum size of a file of image arrays in bytes, decompressed."""
_STRIP_PIXELS = 2**20
"""Pixels that are converted to RGB at a time."""
_FORMATS = ("PNG", "JPEG", "WEBP")
_LISTED_FORMATS = "PNG, JPEG or WebP"
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, OverflowError, struct.error, zlib.error,
)  # fmt: skip
"""Exceptions of Pillow's decoders for damaged files."""


@dataclass(frozen=True)
class EncodedImage:
    """An encoded RGB image, so that an image that is only sent to a server is not decoded and encoded again.

    content: bytes of the file. kind: its format.
    """

    content: bytes = field(repr=False)
    kind: Literal["png", "jpeg"]


ImageLike = np.ndarray | Image.Image | EncodedImage
"""(height, width, 3) uint8, a PIL image of any mode, or an encoded image."""


def pixels(image: ImageLike) -> np.ndarray:
    """Returns an image as (height, width, 3) uint8; transparent parts become white.

    Raises: ClvrError for arrays of another shape or dtype, and for a damaged file.
    """
    if isinstance(image, EncodedImage):
        return decode_image(image.content)
    if isinstance(image, Image.Image):
        return _array(image, "image")
    if not isinstance(image, np.ndarray):
        raise ClvrError(f"image: expected a numpy array or a PIL image, got {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ClvrError(f"image: expected uint8 (height, width, 3), got {image.dtype} {image.shape}")
    return image


def as_pil(image: ImageLike) -> Image.Image:
    """Returns a PIL image unchanged, so that FLUX.2 reads references as diffusers does, and others as RGB."""
    return image if isinstance(image, Image.Image) else Image.fromarray(pixels(image))


def encode_png(image: ImageLike) -> bytes:
    """Encodes an image as RGB PNG."""
    if isinstance(image, EncodedImage) and image.kind == "png":
        return image.content
    buffer = io.BytesIO()
    Image.fromarray(pixels(image)).save(buffer, format="PNG")
    return buffer.getvalue()


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image file of any origin.

    Only the decoders of PNG, JPEG and WebP run, and the size is checked before pixels are decoded. The EXIF orientation
    is applied, transparent parts become white, and 16-bit, palette, grayscale and CMYK images become 8-bit RGB. Only
    the first frame of an animation is read.

    Returns: (height, width, 3) uint8.
    Raises: ClvrError, one line, if the file is missing, is not such an image, is damaged, or has more than `MAX_PIXELS`
      pixels or `MAX_FILE_BYTES` bytes.
    """
    with _opened_file(path) as image:
        return _upright_array(image, _named(path))


def decode_image(content: bytes, where: str = "image") -> np.ndarray:
    """Decodes an image of a server or a dataset like `read_image`, with `where` in messages."""
    with _opened(io.BytesIO(content), where) as image:
        return _upright_array(image, where)


def lazy_image(content: bytes, where: str = "image") -> Image.Image:
    """Reads the header of an encoded image, whose pixels are decoded on first use.

    Raises: ClvrError as `read_image`; `pixels` raises it for damaged pixels.
    """
    return _checked(io.BytesIO(content), where)


def check_image(path: str | os.PathLike[str]) -> None:
    """Checks format and size of an image file, and its content if the format has checksums.

    Raises: ClvrError as `read_image`.
    """
    with _opened_file(path) as image:
        try:
            image.verify()
        except _DECODER_ERRORS as error:
            raise ClvrError(f"{_named(path)}: not a readable image ({_reason(error)})") from error


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Returns (height, width) of an image file as stored, without decoding it. Raises: ClvrError as `read_image`."""
    with _opened_file(path) as image:
        return image.height, image.width


def read_encoded(path: Path) -> EncodedImage:
    """Reads an image file, without decoding it if possible.

    Returns: the unchanged file of an upright 8-bit RGB PNG or JPEG without transparency; others are decoded by
      `read_image` and encoded as PNG.
    Raises: ClvrError as `read_image`; damaged pixels of an unchanged file are not detected.
    """
    with _opened_file(path) as image:
        kind = {"PNG": "png", "JPEG": "jpeg"}.get(image.format or "")
        is_rgb = image.mode == "RGB" and "transparency" not in image.info
        # To find EXIF after the pixels, Pillow would decode a PNG that has no EXIF before them.
        is_usable = is_rgb and ((kind == "png" and "exif" not in image.info) or _orientation(image) == 1)
    if kind is None or not is_usable:
        return EncodedImage(encode_png(read_image(path)), "png")
    try:
        return EncodedImage(path.read_bytes(), "png" if kind == "png" else "jpeg")
    except OSError as error:
        raise ClvrError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_image_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads a NumPy file (.npz) of images.

    Returns: name -> images, each (n, height, width, 3) uint8.
    Raises: ClvrError, one line, if the file is missing, is damaged, has other arrays, or more than `MAX_ARRAY_BYTES`.
    """
    where = _named(path)
    if not is_regular_file(path):  # a pipe would block
        raise ClvrError(f"{where}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > MAX_ARRAY_BYTES:
            raise ValueError(f"it has {size >> 20} MiB; at most {MAX_ARRAY_BYTES >> 20} are read")
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        for name, array in arrays.items():
            if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
                raise ValueError(f"{name:.60} is {array.dtype} {array.shape}, not uint8 (n, height, width, 3)")
    except Exception as error:  # of zipfile, zlib or NumPy's parser of headers
        raise ClvrError(f"{where}: not a readable file of images ({_reason(error)})") from error
    return arrays


@contextmanager
def _opened_file(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Opens an image file after checks of format and size; its pixels are not decoded yet."""
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
    """Returns an image with a checked header; only here external bytes are passed to Pillow."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
            # Without `formats` a PostScript file would make Pillow run Ghostscript.
            image = Image.open(source, formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise ClvrError(f"{where}: not a readable image; it must be {_LISTED_FORMATS}") from error
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
    """Returns an image as RGB, converted in strips; converting it at once would take several times its memory."""
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
    """Returns a path for messages, on one line of limited length."""
    text = shown_path(path)
    return text if len(text) <= 400 and text.isprintable() else f"{text:.400}".encode("unicode_escape").decode()


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 (upright) if there is none or its EXIF cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damaged EXIF
            found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:  # damaged EXIF, but the pixels may be fine
        return 1
    return found if found in range(1, 9) else 1


def _upright(image: Image.Image) -> Image.Image:
    """Returns the image with its EXIF orientation applied."""
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
    """Converts an image of any mode to 8-bit RGB; transparent parts become white."""
    # 16-bit grayscale, which Pillow's conversion would clip at 255. "I" has 32 bits; only PNG uses it for 16-bit
    # images.
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
