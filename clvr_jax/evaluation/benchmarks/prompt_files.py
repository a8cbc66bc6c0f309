"""Readers for the official prompt files of benchmarks, which are checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.harness.benchmark import Item
from clvr_jax.files.json_input import check_unicode, parse_json, read_text

_TEXTS = ("prompt", "Prompt", "instruction", "tag", "note", "Explanation", "type")
"""Fields that are strings in the official formats; they become prompts, tags, and questions to a judge."""


def read_entries(path: Path, fields: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Reads the entries of a JSON array or of JSON lines, each with its location for messages ("file:3").

    Args:
      path: the file.
      fields: names of the fields that every entry must have.
    Raises: ClvrError, one line, for an entry without these fields, or a file without entries.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        entries = [(f"{path}: entry {number}", entry) for number, entry in enumerate(parse_json(text, str(path)), 1)]
    else:
        lines = enumerate(text.split("\n"), start=1)
        located = [(f"{path}:{number}", line) for number, line in lines if line.strip()]
        entries = [(location, parse_json(line, location)) for location, line in located]
    if not entries:
        raise ClvrError(f"{path}: no prompts in this file")
    for location, entry in entries:
        lacking = [name for name in fields if not isinstance(entry, dict) or entry.get(name) in (None, "")]
        if lacking:
            raise ClvrError(f"{location}: lacks {', '.join(lacking)}")
        check_unicode(entry, location)
        if wrong := [name for name in _TEXTS if not isinstance(entry.get(name, ""), str)]:
            raise ClvrError(f"{location}: {' and '.join(wrong)} must be a string")
    return entries


def check_unique_ids(items: Sequence[tuple[str, Item]]) -> list[Item]:
    """Returns the items without their locations. Raises: ClvrError for an id that occurs twice."""
    seen: dict[str, str] = {}
    for location, item in items:
        if item.id in seen:
            raise ClvrError(f"{location}: id {item.id} is already that of {seen[item.id]}; each image needs its own id")
        seen[item.id] = location
    return [item for _, item in items]


def benchmark_files(path: Path, names: Sequence[str]) -> list[Path]:
    """Returns the files of a benchmark: `path` itself if it is a file, else the files with these names in it.

    Raises: ClvrError that lists missing and expected files.
    """
    if not path.is_dir():
        return [path]
    if missing := [name for name in names if not (path / name).is_file()]:
        raise ClvrError(f"{path}: lacks {', '.join(missing)}; the directory needs {', '.join(names)}")
    return [path / name for name in names]
