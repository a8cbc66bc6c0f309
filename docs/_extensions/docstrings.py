"""Turns the project's docstrings into reStructuredText: `Args:`, `Returns:`, code in backquotes, indented blocks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_HEADER = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Source|Sources|Shapes|Example|Examples):(?: +(.*))?$")
_ITEM = re.compile(r"(\* |- |\d+\. )(.*)")
_ENTRY = re.compile(r"([\w*][\w*., `]*?): +(.*)", re.DOTALL)


def to_rst(lines: list[str]) -> list[str]:
    """Returns the lines of a docstring as reStructuredText.

    Args:
      lines: without common indentation.
    """
    result: list[str] = []
    while lines:
        block, lines = _next_block(lines)
        first = block[0]
        header = _HEADER.match(first)
        if not first.strip():
            continue
        if first[0] == " ":
            result += ["::", "", *(f"   {line}".rstrip() for line in block), ""]
        elif header and header[1] in ("Args", "Attributes"):
            result += [f"**{header[1]}:**", "", *_entries(block[1:]), ""]
        elif header:
            text = " ".join(line.strip() for line in [header[2] or "", *block[1:]])
            result += [f"**{header[1]}:** {_inline(text.strip())}", ""]
        elif _ITEM.match(first):
            result += [*_items(block), ""]
        else:
            result += [_inline(" ".join(line.strip() for line in block)), ""]
    return result


def _next_block(lines: list[str]) -> tuple[list[str], list[str]]:
    """Returns the first paragraph, section, list or indented block, and the lines after it."""
    first = lines[0]
    if not first.strip():
        return lines[:1], lines[1:]
    indented = first[0] == " "
    section = _HEADER.match(first) is not None
    end = 1
    while end < len(lines):
        line = lines[end]
        if indented or (section and first.startswith(("Args", "Attributes"))):
            following = next((other for other in lines[end:] if other.strip()), "")
            inside = line[:1] == " " or (not line.strip() and following[:1] == " ")
        elif section or _ITEM.match(first):
            inside = line[:1] == " " or (not section and _ITEM.match(line) is not None)
        else:
            inside = bool(line.strip()) and line[0] != " " and not _HEADER.match(line) and not _ITEM.match(line)
        if not inside:
            break
        end += 1
    block = lines[:end]
    while block and not block[-1].strip():
        block.pop()
    return block, lines[end:]


def _entries(lines: list[str]) -> list[str]:
    """Returns the arguments of a function as a list of their names and texts."""
    lines = [line for line in lines if line.strip()]
    if not lines:
        return []
    margin = min(len(line) - len(line.lstrip()) for line in lines)
    entries: list[str] = []
    for line in lines:
        if line[margin : margin + 1] != " " or not entries:
            entries.append(line.strip())
        else:
            entries[-1] += " " + line.strip()
    found = []
    for entry in entries:
        named = _ENTRY.match(entry)
        found.append(f"* ``{named[1].replace('`', '')}``: {_inline(named[2])}" if named else f"* {_inline(entry)}")
    return found


def _items(lines: list[str]) -> list[str]:
    """Returns a list with one line for each item."""
    items: list[str] = []
    for line in lines:
        item = _ITEM.match(line)
        if item:
            items.append(f"{item[1]}{_inline(item[2])}")
        else:
            items[-1] += " " + _inline(line.strip())
    return items


def _inline(text: str) -> str:
    """Returns text with its code marked and all else escaped."""
    parts = re.split(r"(`+)(.+?)\1", text)
    result = ""
    for i in range(0, len(parts), 3):
        result += re.sub(r"([\\*_|<>`])", r"\\\1", parts[i])
        if i + 2 < len(parts):
            code, following = parts[i + 2].strip(), parts[i + 3][:1]
            separator = "\\ " if result[-1:].isalnum() else ""
            result += f"{separator}``{code}``" + ("\\ " if following.isalnum() else "")
    return result


def _process(app: Sphinx, what: str, name: str, item: object, options: object, lines: list[str]) -> None:
    lines[:] = to_rst(list(lines))


def _skip(app: Sphinx, what: str, name: str, item: object, skip: bool, options: object) -> bool | None:
    """Leaves out the fields of named tuples, which have no text of their own."""
    return True if (getattr(item, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> dict[str, object]:
    """Connects the conversion to autodoc."""
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True}
