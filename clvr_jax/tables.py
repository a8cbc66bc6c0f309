"""Markdown for reports, in which names and texts from files are escaped."""

from collections.abc import Sequence

_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "[": "\\[", "]": "\\]", "`": "\\`"}


def plain(text: object) -> str:
    """Returns a value as escaped text on one line, without HTML, links or table cells."""
    words = str(text).encode("utf-8", "backslashreplace").decode().split()
    return "".join(_ESCAPES.get(letter, letter) for letter in " ".join(words))


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table. The first row is its header; it and the first cell of each row are escaped."""
    header, *rest = rows
    lines = [[plain(cell) for cell in header], ["---"] * len(header), *([plain(row[0]), *row[1:]] for row in rest)]
    return [f"| {' | '.join(row)} |" for row in lines]
