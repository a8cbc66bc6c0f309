"""External JSON, read with limits and validated field by field.

All external JSON is read by this module, so that a damaged or hostile file ends in an error of one line with the file,
the line and the field, and never in an error of Python.
"""

from __future__ import annotations

import codecs
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from clvr_jax.errors import ClvrError
from clvr_jax.files.buckets import objects
from clvr_jax.files.buckets.paths import is_bucket
from clvr_jax.files.file_names import refuse_url

MAX_BYTES = 256 << 20
"""Maximum size of a JSON file in bytes."""
MAX_LINE_BYTES = 4 << 20
"""Maximum bytes of a line in a file that is read line by line."""
MAX_DEPTH = 64
"""Maximum nesting depth of arrays and objects; our own files have fewer than ten levels."""
MAX_VALUES = 10_000_000
"""Maximum number of values in a JSON text; each takes up to 100 bytes of memory."""
MAX_INTEGER = 2**63 - 1
"""Largest absolute value of an integer field unless a field says otherwise."""

JSON: TypeAlias = str | int | float | bool | Sequence["JSON"] | Mapping[str, "JSON"] | None
"""A JSON value that we write, or that was read and has not been looked at."""
UncheckedJSON: TypeAlias = Mapping[str, Any]
"""An object of an external JSON file whose fields nothing has validated: any field may be missing or of another type.

Its reader validates the fields, or catches what Python raises. New code reads with `JsonObject` instead.
"""

T = TypeVar("T")


@dataclass(frozen=True)
class JsonObject:
    """An object of a JSON file, whose fields are validated when they are read.

    Each method takes the name of a field and returns its value. An absent field without `default`, a value of another
    type and a value out of range are errors.

    Attributes:
      content: the object.
      where: file, and line or field, for messages.
    """

    content: UncheckedJSON
    where: str

    def text(self, key: str, *default: T, max_characters: int | None = None) -> str | T:
        """Returns a text of at most `max_characters`."""
        if not self._has(key, default):
            return default[0]
        value = self.content[key]
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        if max_characters is not None and len(value) > max_characters:
            raise ClvrError(
                f"{self.where}: {key} has {len(value):,} characters; at most {max_characters:,} are allowed"
            )
        return value

    def integer(self, key: str, *default: T, low: int = -MAX_INTEGER, high: int = MAX_INTEGER) -> int | T:
        """Returns an integer from `low` to `high`; true and false are not integers."""
        if not self._has(key, default):
            return default[0]
        value = self.content[key]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(key, f"an integer{_range(low, high)}")
        return value

    def number(self, key: str, *default: T, low: float = -math.inf, high: float = math.inf) -> float | T:
        """Returns a finite number from `low` to `high`."""
        if not self._has(key, default):
            return default[0]
        value = self.content[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        if not -1.7e308 < value < 1.7e308 or not low <= value <= high:  # also false for NaN and too large integers
            raise self._wrong(key, f"a finite number{_range(low, high)}")
        return value

    def boolean(self, key: str, *default: T) -> bool | T:
        """Returns true or false."""
        if not self._has(key, default):
            return default[0]
        if not isinstance(self.content[key], bool):
            raise self._wrong(key, "true or false")
        return bool(self.content[key])

    def nested(self, key: str, *default: T) -> JsonObject | T:
        """Returns an object."""
        if not self._has(key, default):
            return default[0]
        if not isinstance(self.content[key], Mapping):
            raise self._wrong(key, "a JSON object")
        return JsonObject(self.content[key], f"{self.where}: {key}")

    def objects(self, key: str) -> list[JsonObject]:
        """Returns a list of objects."""
        found = []
        for number, value in enumerate(self._list(key)):
            if not isinstance(value, Mapping):
                raise ClvrError(f"{self.where}: {key}[{number}] must be a JSON object, got {shown(value)}")
            found.append(JsonObject(value, f"{self.where}: {key}[{number}]"))
        return found

    def texts(self, key: str) -> tuple[str, ...]:
        """Returns a list of texts."""
        values = self._list(key)
        texts = tuple(value for value in values if isinstance(value, str))
        if len(texts) < len(values):
            raise self._wrong(key, "a list of texts")
        return texts

    def integers(self, key: str, low: int = 0, high: int = MAX_INTEGER) -> tuple[int, ...]:
        """Returns a list of integers from `low` to `high`."""
        values = self._list(key)
        integers = tuple(value for value in values if isinstance(value, int) and not isinstance(value, bool))
        if len(integers) < len(values) or not all(low <= value <= high for value in integers):
            raise self._wrong(key, f"a list of integers{_range(low, high)}")
        return integers

    def optional(self, key: str, read: Callable[[str], T]) -> T | None:
        """Returns None if the field is null, else the result of `read`; an absent field is an error."""
        return None if self.content.get(key, "") is None else read(key)

    def _has(self, key: str, default: Sequence[object]) -> bool:
        if key in self.content:
            return True
        if default:
            return False
        raise ClvrError(f"{self.where}: lacks {key}")

    def _list(self, key: str) -> list[JSON]:
        self._has(key, ())
        values = self.content[key]
        if not isinstance(values, list):
            raise self._wrong(key, "a list")
        return values

    def _wrong(self, key: str, expected: str) -> ClvrError:
        return ClvrError(f"{self.where}: {key} must be {expected}, got {shown(self.content[key])}")


def parse_json(text: str | bytes, where: str) -> Any:
    """Returns the value of a JSON text; a byte-order mark before it is ignored.

    Args:
      text: a text, or bytes in UTF-8.
      where: file and line, for messages.
    Raises: ClvrError, one line, for a text that is not JSON or not UTF-8, or has more than `MAX_DEPTH` levels or
      `MAX_VALUES` values.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if len(text) > MAX_VALUES and text.count(",") + text.count("[") + text.count("{") > MAX_VALUES:
            raise ClvrError(f"{where}: JSON with more than {MAX_VALUES:,} values is not read")
        value: JSON = json.loads(text.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise ClvrError(f"{where}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise ClvrError(f"{where}: not JSON: not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ClvrError(f"{where}: JSON with more than {MAX_DEPTH} levels is not read") from error
    except ValueError as error:  # an integer with more digits than Python reads
        raise ClvrError(f"{where}: JSON that cannot be read: {' '.join(str(error).split()):.120}") from error
    if _is_deeper(value, MAX_DEPTH):
        raise ClvrError(f"{where}: JSON with more than {MAX_DEPTH} levels is not read")
    return value


def parse_object(text: str | bytes, where: str) -> JsonObject:
    """Returns the object of a JSON text. Raises: ClvrError as `parse_json`, and for another value."""
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise ClvrError(f"{where}: expected a JSON object, got {shown(value)}")
    return JsonObject(value, where)


def check_unicode(value: JSON, where: str) -> None:
    """Raises ClvrError for JSON with lone surrogates in its texts, which cannot be written to UTF-8 files."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ClvrError(f"{where}: a text is not valid Unicode: it contains a lone surrogate") from error


def read_text(path: Path, max_bytes: int = MAX_BYTES, advice: str = "") -> str:
    """Returns the text of an external file without byte-order mark.

    Args:
      path: of a regular file.
      max_bytes: maximum size of the file.
      advice: what to do if there is no such file, for the message.
    Raises: ClvrError, one line, if it is missing, not a regular file, too large, or not UTF-8.
    """
    if is_bucket(path):
        return _read_text_of_object(path, max_bytes, advice)
    try:
        if not path.is_file():  # a pipe would block
            refuse_url(path)
            what = "not a file" if path.exists() else "no such file"
            raise ClvrError(f"{path}: {what}{f'; {advice}' if advice else ''}")
        if (size := path.stat().st_size) > max_bytes:
            raise ClvrError(f"{path}: has {size >> 20} MiB; at most {max_bytes >> 20} MiB are read")
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ClvrError(f"{path}: cannot be read: not UTF-8 at byte {error.start}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = getattr(error, "strerror", None) or error
        raise ClvrError(f"{str(path)!r:.300}: cannot be read ({reason})") from error


def _read_text_of_object(path: Path, max_bytes: int, advice: str) -> str:
    """Returns the text of an object in a bucket; see `read_text`."""
    found = objects.stat(path)
    if found is not None and found.size > max_bytes:
        raise ClvrError(f"{path}: has {found.size >> 20} MiB; at most {max_bytes >> 20} MiB are read")
    content = objects.read(path)
    if content is None:
        raise ClvrError(f"{path}: no such object{f'; {advice}' if advice else ''}")
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ClvrError(f"{path}: cannot be read: not UTF-8 at byte {error.start}") from error


def read_object(path: Path, max_bytes: int = MAX_BYTES, advice: str = "") -> JsonObject:
    """Returns the object of a JSON file. Raises: ClvrError as `read_text` and `parse_object`."""
    return parse_object(read_text(path, max_bytes, advice), str(path))


def read_lines(path: Path, max_bytes: int = MAX_BYTES, advice: str = "") -> Iterator[tuple[str, str]]:
    """Yields ("file:line", text) for each line that is not empty. Raises: ClvrError as `read_text`."""
    for number, line in enumerate(read_text(path, max_bytes, advice).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def stream_lines(path: Path, max_bytes: int = MAX_LINE_BYTES, advice: str = "") -> Iterator[tuple[str, bytes]]:
    """Yields ("file:line", content) for each line without line break; the file may have any size.

    Args:
      path: of a regular file.
      max_bytes: maximum bytes of a line.
      advice: what to do if there is no such file, for the message.
    Raises: ClvrError, one line, if it is missing, not a regular file, cannot be read, or a line is too long.
    """
    try:
        if not path.is_file():  # a pipe would block
            refuse_url(path)
            what = "not a file" if path.exists() else "no such file"
            raise ClvrError(f"{path}: {what}{f'; {advice}' if advice else ''}")
        with path.open("rb") as file:
            for number in itertools.count(1):
                line = file.readline(max_bytes + 2)
                if not line:
                    return
                line = line.removesuffix(b"\n").removesuffix(b"\r")
                if len(line) > max_bytes:
                    raise ClvrError(f"{path}:{number}: has more than {max_bytes >> 10} KiB; lines so long are not read")
                yield f"{path}:{number}", line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = getattr(error, "strerror", None) or error
        raise ClvrError(f"{str(path)!r:.300}: cannot be read ({reason})") from error


def shown(value: object) -> str:
    """Returns a short form of a value for messages, without the content of lists and objects."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f"{value[:60]!r}" + ("..." if len(value) > 60 else "")
    return f"{value!r:.40}" if not isinstance(value, int) or abs(value) < 10**30 else "an integer of over 30 digits"


def _is_deeper(value: JSON, levels: int) -> bool:
    """Returns whether arrays and objects are nested more than `levels` times; without recursion."""
    layer: list[JSON] = [value]
    for _ in range(levels):
        layer = [
            child
            for each in layer
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
            if isinstance(child, dict | list)
        ]
        if not layer:
            return False
    return True


def _range(low: float, high: float) -> str:
    if abs(low) >= MAX_INTEGER and abs(high) >= MAX_INTEGER:
        return ""
    if high >= MAX_INTEGER:
        return f" of at least {low:g}"
    return f" from {low:g} to {high:g}"
