"""Places at the end of the clauses of plans and descriptions, as in "red star top left"."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

PLACE_WORDS = frozenset(("top", "bottom", "left", "right", "center", "middle", "upper", "lower", "corner"))
_ROWS = {"top": 0, "upper": 0, "bottom": 2, "lower": 2}
_COLUMNS = {"left": 0, "right": 2}
_MIDDLE = 1
_WORD = re.compile(r"[^\W_]+")


def place_of(clause: str) -> str:
    """Returns the words of place that end a clause, "top left" of "red star top left"; "" if none do."""
    words = _WORD.findall(clause.lower())
    first = len(words)
    while first and words[first - 1] in PLACE_WORDS:
        first -= 1
    return " ".join(words[first:])


def claimed_twice(clauses: Sequence[str]) -> frozenset[str]:
    """Returns the places that more than one clause claims: no image can meet both."""
    counts = Counter(place for place in map(place_of, clauses) if place)
    return frozenset(place for place, count in counts.items() if count > 1)


def in_reading_order(clauses: Sequence[str]) -> list[str]:
    """Sorts clauses by their places, row by row and from left to right; those without a place stay at the end."""
    return sorted(clauses, key=lambda clause: _position(place_of(clause)))


def _position(place: str) -> tuple[int, int, int]:
    words = place.split()
    row = next((_ROWS[word] for word in words if word in _ROWS), _MIDDLE)
    column = next((_COLUMNS[word] for word in words if word in _COLUMNS), _MIDDLE)
    return (0 if words else 1, row, column)
