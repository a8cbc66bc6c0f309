"""Markdown of reports: what names and files say is text there, never markup."""

from collections.abc import Sequence

_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "[": "\\[", "]": "\\]", "`": "\\`"}


def plain(text: object) -> str:
    """A value as text on one line: no HTML, no link, no new cell of a table."""
    words = str(text).encode("utf-8", "backslashreplace").decode().split()
    return "".join(_ESCAPES.get(letter, letter) for letter in " ".join(words))


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; the first row is its header. The first cell of a row is a name, so it is escaped."""
    header, *rest = rows
    lines = [[plain(cell) for cell in header], ["---"] * len(header), *([plain(row[0]), *row[1:]] for row in rest)]
    return [f"| {' | '.join(row)} |" for row in lines]
