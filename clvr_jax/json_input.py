"""JSON that somebody else may have written: read with limits, and checked field by field.

Every reader of outside JSON goes through this module, so that a damaged or hostile file ends in one line that says
which file, which line and which field, and never in Python's own error.
"""

from __future__ import annotations

import codecs
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from clvr_jax.errors import ClvrError

MAX_BYTES = 256 << 20
"""Most bytes of a JSON file that is read."""
MAX_LINE_BYTES = 4 << 20
"""Most bytes of a line of a file that is read line by line."""
MAX_DEPTH = 64
"""Most levels of arrays and objects inside each other; our own files have fewer than ten."""
MAX_VALUES = 10_000_000
"""Most values in a JSON text; each takes up to 100 bytes of memory, whatever it takes in the file."""
MAX_INTEGER = 2**63 - 1
"""Largest absolute value of an integer field unless a field says otherwise."""

T = TypeVar("T")


@dataclass(frozen=True)
class JsonObject:
    """An object of a JSON file, whose fields are checked as they are read.

    A method takes the name of a field and returns its value. A field that is absent is an error, unless `default` is
    given; so is a value of another type or out of range.

    Attributes:
      content: the object.
      where: file, and line or field, for messages.
    """

    content: Mapping[str, Any]
    where: str

    def text(self, key: str, *default: T, max_characters: int | None = None) -> str | T:
        """A text, at most `max_characters` long."""
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
        """An integer from `low` to `high`; true and false are none."""
        if not self._has(key, default):
            return default[0]
        value = self.content[key]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(key, f"an integer{_range(low, high)}")
        return value

    def number(self, key: str, *default: T, low: float = -math.inf, high: float = math.inf) -> float | T:
        """A finite number from `low` to `high`."""
        if not self._has(key, default):
            return default[0]
        value = self.content[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        if not -1.7e308 < value < 1.7e308 or not low <= value <= high:  # NaN and integers that no float holds, too
            raise self._wrong(key, f"a finite number{_range(low, high)}")
        return value

    def boolean(self, key: str, *default: T) -> bool | T:
        """True or false."""
        if not self._has(key, default):
            return default[0]
        if not isinstance(self.content[key], bool):
            raise self._wrong(key, "true or false")
        return bool(self.content[key])

    def nested(self, key: str, *default: T) -> JsonObject | T:
        """An object of its own."""
        if not self._has(key, default):
            return default[0]
        if not isinstance(self.content[key], Mapping):
            raise self._wrong(key, "a JSON object")
        return JsonObject(self.content[key], f"{self.where}: {key}")

    def objects(self, key: str) -> list[JsonObject]:
        """A list of objects."""
        values = self._list(key)
        for number, value in enumerate(values):
            if not isinstance(value, Mapping):
                raise ClvrError(f"{self.where}: {key}[{number}] must be a JSON object, got {shown(value)}")
        return [JsonObject(value, f"{self.where}: {key}[{number}]") for number, value in enumerate(values)]

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        values = self._list(key)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(key, "a list of texts")
        return tuple(values)

    def integers(self, key: str, low: int = 0, high: int = MAX_INTEGER) -> tuple[int, ...]:
        """A list of integers from `low` to `high`."""
        values = self._list(key)
        if not all(isinstance(value, int) and not isinstance(value, bool) and low <= value <= high for value in values):
            raise self._wrong(key, f"a list of integers{_range(low, high)}")
        return tuple(values)

    def optional(self, key: str, read: Callable[[str], T]) -> T | None:
        """None if the field is null, else what `read` returns; an absent field is an error."""
        return None if self.content.get(key, "") is None else read(key)

    def _has(self, key: str, default: Sequence[object]) -> bool:
        if key in self.content:
            return True
        if default:
            return False
        raise ClvrError(f"{self.where}: lacks {key}")

    def _list(self, key: str) -> list[Any]:
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
      text: as UTF-8 if it is bytes.
      where: file and line, for messages.
    Raises: ClvrError, one line, if it is not JSON, not UTF-8, or has more than `MAX_DEPTH` levels or `MAX_VALUES`
      values.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        if len(text) > MAX_VALUES and text.count(",") + text.count("[") + text.count("{") > MAX_VALUES:
            raise ClvrError(f"{where}: not JSON that is read: more than {MAX_VALUES:,} values")
        value = json.loads(text.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise ClvrError(f"{where}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise ClvrError(f"{where}: not JSON: not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ClvrError(f"{where}: not JSON that is read: more than {MAX_DEPTH} levels") from error
    except ValueError as error:  # an integer of more digits than Python reads
        raise ClvrError(f"{where}: not JSON that is read: {' '.join(str(error).split()):.120}") from error
    if _is_deeper(value, MAX_DEPTH):
        raise ClvrError(f"{where}: not JSON that is read: more than {MAX_DEPTH} levels")
    return value


def parse_object(text: str | bytes, where: str) -> JsonObject:
    """Returns the object of a JSON text. Raises: ClvrError as `parse_json`, and for another value."""
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise ClvrError(f"{where}: expected a JSON object, got {shown(value)}")
    return JsonObject(value, where)


def check_unicode(value: Any, where: str) -> None:
    """Raises ClvrError for JSON whose texts hold lone surrogates, for values that are written to UTF-8 files again."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ClvrError(f"{where}: a text is not valid Unicode: it holds a lone surrogate") from error


def read_text(path: Path, max_bytes: int = MAX_BYTES, advice: str = "") -> str:
    """Returns the text of a file of outside data; a byte-order mark is left out.

    Args:
      path: of a regular file.
      max_bytes: most bytes that are read.
      advice: what to do if there is no such file.
    Raises: ClvrError, one line, if it is missing, not a regular file, too large, or not UTF-8.
    """
    try:
        if not path.is_file():  # a pipe would block
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


def read_object(path: Path, max_bytes: int = MAX_BYTES, advice: str = "") -> JsonObject:
    """Returns the object of a JSON file. Raises: ClvrError as `read_text` and `parse_object`."""
    return parse_object(read_text(path, max_bytes, advice), str(path))


def read_lines(path: Path, max_bytes: int = MAX_BYTES, advice: str = "") -> Iterator[tuple[str, str]]:
    """Yields ("file:line", text) for each line that is not empty. Raises: ClvrError as `read_text`."""
    for number, line in enumerate(read_text(path, max_bytes, advice).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def stream_lines(path: Path, max_bytes: int = MAX_LINE_BYTES, advice: str = "") -> Iterator[tuple[str, bytes]]:
    """Yields ("file:line", content) for each line, without its end; the file may be of any size.

    Args:
      path: of a regular file.
      max_bytes: most bytes of one line.
      advice: what to do if there is no such file.
    Raises: ClvrError, one line, if it is missing, not a regular file, cannot be read, or a line is too long.
    """
    try:
        if not path.is_file():  # a pipe would block
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
    """A value as a message quotes it: short, and without the content of lists and objects."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f"{value[:60]!r}" + ("..." if len(value) > 60 else "")
    return f"{value!r:.40}" if not isinstance(value, int) or abs(value) < 10**30 else "an integer of over 30 digits"


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether arrays and objects lie inside each other more than `levels` times; without recursion."""
    layer = [value]
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
