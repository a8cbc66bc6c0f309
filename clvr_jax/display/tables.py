"""Tables of text, as Markdown and for the terminal; names and texts from files are escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "[": "\\[", "]": "\\]", "`": "\\`"}

Row = Sequence[str]


def plain(text: object) -> str:
    """Returns a value as escaped Markdown on one line, without HTML, links or table cells."""
    words = str(text).encode("utf-8", "backslashreplace").decode().split()
    return "".join(_ESCAPES.get(letter, letter) for letter in " ".join(words))


@dataclass(frozen=True)
class Table:
    """A table of text, whose first column has the names of the rows.

    Attributes:
      header: the names of the columns.
      sections: the rows, in sections that the terminal separates by lines.
      title, caption: lines above and below the table in the terminal.
      has_totals: whether the first row of each section is its total, shown in bold, and the others are parts of it.
      is_markdown: whether the header and the names of rows are Markdown already; otherwise they are escaped there.
      one_line: whether the terminal breaks only the names of rows into several lines.
    """

    header: Row
    sections: Sequence[Sequence[Row]]
    title: str = ""
    caption: str = ""
    has_totals: bool = False
    is_markdown: bool = False
    one_line: bool = False

    def markdown(self) -> list[str]:
        """Returns the lines of the table in Markdown."""
        header = [self._escaped(cell) for cell in self.header]
        rows = [row for section in self.sections for row in self._markdown_rows(section)]
        return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]

    def rich(self) -> RichTable:
        """Returns the table for the terminal; its texts are not read as markup."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=Text(self.title, "table.title") if self.title else None,
            caption=Text(self.caption, "table.caption") if self.caption else None,
        )
        table.add_column(Text(self.header[0]), min_width=14 if self.one_line else None)
        for column in self.header[1:]:
            table.add_column(Text(column), justify="right", no_wrap=self.one_line)
        for section in self.sections:
            for number, row in enumerate(section):
                is_part = self.has_totals and number > 0
                name = f"  {row[0]}" if is_part else row[0]
                style = "bold" if self.has_totals and not is_part else None
                table.add_row(Text(name), *map(Text, row[1:]), style=style)
            table.add_section()
        return table

    def _markdown_rows(self, section: Sequence[Row]) -> list[list[str]]:
        names = [self._escaped(row[0]) for row in section]
        if self.has_totals:
            names = [f"**{names[0]}**", *(f"{names[0]}: {name}" for name in names[1:])]
        return [[name, *map(_without_bars, row[1:])] for name, row in zip(names, section, strict=True)]

    def _escaped(self, text: str) -> str:
        return _without_bars(text) if self.is_markdown else plain(text)


def _without_bars(text: str) -> str:
    """Returns Markdown that begins no new cell."""
    return text.replace("|", r"\|")
