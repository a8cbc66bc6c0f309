"""Malformed inputs, generated with fixed seeds: JSON texts, JSON values of wrong types, and damaged image files."""

import copy
import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SCRIPT = "<script>alert(1)</script>"
HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**400, 10**18, float("nan"), float("inf"), "", SCRIPT, "\ud800", "a\0b", "x" * 300,
    "../../../../etc/passwd", "/etc/passwd", [], {}, [[]], [None], {"": None}, ["x"] * 50,
)  # fmt: skip
"""What a field may hold instead of what it should."""


NO_FILES = ("a directory", "a named pipe", "a broken link", "a circle of links")
"""Names of cases in which there is something other than a file."""


@dataclass(frozen=True)
class Case:
    """One malformed input: its name, and a function that writes it to a path."""

    name: str
    write: Callable[[Path], object]


def _bytes(name: str, content: bytes) -> Case:
    return Case(name, lambda path: path.write_bytes(content))


def json_texts(valid: bytes) -> Iterator[Case]:
    """Files that are no readable JSON, or JSON of another kind than `valid`."""
    texts = {
        "empty": b"", "blank": b" \n ", "word": b"hello", "open": b"{", "cut": valid[: len(valid) * 2 // 3],
        "binary": bytes(range(256)), "utf-16": '{"a": 1}'.encode("utf-16"), "latin-1": b'{"prompt": "\xe9"}',
        "nul": b"\0" * 64, "nul inside": valid[:5] + b"\0" + valid[5:], "number": b"3", "text": b'"x"', "null": b"null",
        "list": b"[]", "list of lists": b"[[1, 2], [3]]", "object": b"{}", "nan": b"NaN", "long integer": b"9" * 5000,
        "deep lists": b"[" * 100_000, "deep closed": b"[" * 100_000 + b"]" * 100_000,
        "deep objects": b'{"a":' * 100_000, "deep field": b'{"prompt":' + b"[" * 900 + b"]" * 900 + b"}",
        "twice": valid + b" " + valid.strip(), "mark only": b"\xef\xbb\xbf", "html": b"<html>login</html>",
    }  # fmt: skip
    for name, text in texts.items():
        yield _bytes(f"text: {name}", text)
    yield Case("a directory", lambda path: path.mkdir())
    yield Case("a named pipe", os.mkfifo)
    yield Case("a broken link", lambda path: path.symlink_to("nowhere"))
    yield Case("a circle of links", lambda path: path.symlink_to(path.name))


def json_values(valid: Any, count: int, seed: int = 0) -> Iterator[Case]:
    """`valid` with one value replaced by a hostile one, or one field removed or added, at random places."""
    rng = np.random.default_rng(seed)
    places = list(_places(valid))
    for number in range(count):
        changed = copy.deepcopy(valid)
        place = places[rng.integers(len(places))]
        value = HOSTILE_VALUES[rng.integers(len(HOSTILE_VALUES))]
        *way, key = place
        parent = changed
        for step in way:
            parent = parent[step]
        if isinstance(parent, dict) and rng.random() < 0.15:
            del parent[key]
            what = "without"
        else:
            parent[key] = value
            what = f"{value!r:.20} as"
        name = f"value {number}: {what} {'.'.join(map(str, place))}".encode("unicode_escape").decode()
        yield _bytes(name, json.dumps(changed).encode())


def _places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*way, key)
        yield from _places(child, (*way, key))


def images(count: int, seed: int = 0) -> Iterator[Case]:
    """Files that are no images, images of other formats, too large ones, and damaged ones."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (24, 24, 3), np.uint8)
    good = {kind: _encoded(pixels, kind) for kind in ("PNG", "JPEG", "WEBP")}
    fixed = {
        "empty": b"", "words": b"no image",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "pdf": b"%PDF-1.7\n", "html": b"<html></html>",
        "huge": png_head(60_000, 60_000), "wide": png_head(2**31 - 1, 1), "nothing": png_head(0, 0),
        "text bomb": png_head(9, 9, (b"zTXt", b"k\0\0" + zlib.compress(bytes(2**27)))),
        "signature": b"\x89PNG\r\n\x1a\n", **{kind: _encoded(pixels, kind) for kind in ("GIF", "BMP", "TIFF", "PPM")},
    }  # fmt: skip
    for name, content in fixed.items():
        yield _bytes(f"image: {name}", content)
    yield Case("image: a directory", lambda path: path.mkdir())
    yield Case("image: a named pipe", os.mkfifo)
    yield Case("image: a broken link", lambda path: path.symlink_to("nowhere"))
    for number in range(count):
        kind = ("PNG", "JPEG", "WEBP")[number % 3]
        damaged = bytearray(good[kind])
        if number % 2:
            damaged = damaged[: int(rng.integers(1, len(damaged)))]
        else:
            for place in rng.integers(0, len(damaged), 8):
                damaged[place] = rng.integers(256)
        yield _bytes(f"image: damaged {kind} {number}", bytes(damaged))


def _encoded(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def large_png(height: int, width: int, mode: str = "RGB") -> bytes:
    """A black image of a few hundred KB at most, made row by row in little memory."""
    bits, color, row_bytes = {"RGB": (8, 2, 3 * width), "RGBA": (8, 6, 4 * width), "I;16": (16, 0, 2 * width)}[mode]
    packer, row = zlib.compressobj(), bytes(1 + row_bytes)
    packed = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    return _png((b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)), (b"IDAT", packed))


def png_head(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says how large it is and has no pixels."""
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return _png(head, *chunks, (b"IDAT", zlib.compress(b"")))


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [*chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
