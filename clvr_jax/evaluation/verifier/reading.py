"""Descriptions of shapes images as contents of cells, and how well two of them agree."""

from __future__ import annotations

from dataclasses import dataclass

from clvr_jax.reasoning.verification.verification import UNCLEAR
from clvr_jax.worlds.shapes.scene import CELLS, COLORS, SHAPES

_NOTHING = "nothing"
# Longer names first, so that "top left" is not read as "left".
_CELLS_BY_LENGTH = sorted(CELLS, key=len, reverse=True)


@dataclass(frozen=True)
class Agreement:
    """Agreement of a description with what an image shows.

    Attributes:
      is_exact: whether the description says what each cell shows, and nothing else.
      correct: number of cells that are described as they are, of those below.
      cells: number of cells that show something, in the image or in the description, and of items that cannot be read.
    """

    is_exact: bool
    correct: int
    cells: int


def read_description(text: str) -> tuple[dict[str, str], int]:
    """Reads a description such as "I see red star top left; something unclear top.".

    Returns: content by cell, "red star" or "something unclear"; and the number of items that name no content and cell,
      or a cell for the second time.
    """
    found: dict[str, str] = {}
    unread = 0
    items = text.strip().removeprefix("I see").rstrip(".").split(";")
    for item in (" ".join(each.split()) for each in items):
        cell = next((cell for cell in _CELLS_BY_LENGTH if item.endswith(f" {cell}")), None)
        content = "" if cell is None else item.removesuffix(f" {cell}")
        if item == _NOTHING and len(items) == 1:
            continue
        if cell is None or cell in found or not _is_content(content):
            unread += 1
        else:
            found[cell] = content
    return found, unread


def agreement(description: str, exact: str) -> Agreement:
    """Compares a description with the exact one, cell by cell."""
    said, unread = read_description(description)
    shown, _ = read_description(exact)
    cells = said.keys() | shown.keys()
    correct = sum(said.get(cell) == shown.get(cell) for cell in cells)
    return Agreement(correct == len(cells) and not unread, correct, len(cells) + unread)


def _is_content(text: str) -> bool:
    color, _, shape = text.partition(" ")
    return text == UNCLEAR or (color in COLORS and shape in SHAPES)
