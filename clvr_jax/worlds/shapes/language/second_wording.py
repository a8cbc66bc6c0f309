"""Phrases of the second grammar: how it names items, places and relations.

Nothing here may be used to make training prompts, see `second_grammar`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clvr_jax.worlds.shapes.metadata import Item

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
_PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
RELATIONS = {
    "left of": ("to the left of", "on the left side of", "left of", "on the left of"),
    "right of": ("to the right of", "on the right side of", "right of", "on the right of"),
    "above": ("above",),
    "below": ("below", "beneath", "underneath", "under"),
}
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_SIDES = {
    "left of": ("on {its} left side", "to {its} left", "on {its} left"),
    "right of": ("on {its} right side", "to {its} right", "on {its} right"),
    "above": ("above {it}",),
    "below": ("below {it}", "beneath {it}", "underneath {it}"),
}
_PLACES = {
    "top left": ("in the upper left corner", "in the top-left corner", "at the upper left"),
    "top": ("at the middle of the upper edge", "at the upper center", "halfway along the top edge"),
    "top right": ("in the upper right corner", "in the top-right corner", "at the upper right"),
    "left": ("at the middle of the left edge", "midway down the left side", "halfway down the left edge"),
    "center": ("in the very middle", "in the exact center", "right in the middle"),
    "right": ("at the middle of the right edge", "midway down the right side", "halfway down the right edge"),
    "bottom left": ("in the lower left corner", "in the bottom-left corner", "at the lower left"),
    "bottom": ("at the middle of the lower edge", "at the lower center", "halfway along the bottom edge"),
    "bottom right": ("in the lower right corner", "in the bottom-right corner", "at the lower right"),
}
PLACE_NAMES = {
    "top left": ("upper left corner", "top-left corner"),
    "top": ("middle of the upper edge", "upper center"),
    "top right": ("upper right corner", "top-right corner"),
    "left": ("middle of the left edge", "middle of the left side"),
    "center": ("very middle", "exact center"),
    "right": ("middle of the right edge", "middle of the right side"),
    "bottom left": ("lower left corner", "bottom-left corner"),
    "bottom": ("middle of the lower edge", "lower center"),
    "bottom right": ("lower right corner", "bottom-right corner"),
}


@dataclass
class Wording:
    """Phrases for the items of an include list and their relations, with words sampled by `rng`.

    Attributes:
      include: the include list of the metadata.
      rng: samples the words.
      digits: write the numbers of groups as digits.
      color: position of the color in the first mention of an item: "before" for "a red star", "in" for "a star in red",
        "that is" for "a star that is red".
    """

    include: list[Item]
    rng: np.random.Generator
    digits: bool = False
    color: str = "before"

    def pick(self, *options: str) -> str:
        """Samples one of the options uniformly."""
        return options[int(self.rng.integers(len(options)))]

    def indices(self) -> range:
        """Returns the indices of all items."""
        return range(len(self.include))

    def count(self, index: int) -> int:
        """Returns the number of objects of an item."""
        return int(self.include[index]["count"])

    def total(self) -> int:
        """Returns the number of all objects."""
        return sum(map(self.count, self.indices()))

    def position(self, index: int) -> tuple[str, int] | None:
        """Returns the relation of an item and the index of its anchor."""
        position = self.include[index].get("position")
        return None if position is None else (position[0], position[1])

    def place(self, index: int) -> str | None:
        """Returns the place of an item, None without one."""
        return self.include[index].get("place")

    def children(self, index: int) -> list[int]:
        """Returns the indices of the items whose anchor the item is."""
        return [other for other in self.indices() if (self.position(other) or ("", -1))[1] == index]

    def number(self, number: int) -> str:
        """Writes a number from 0 to 6 as a digit or a word."""
        return str(number) if self.digits else _NUMBERS[number]

    def verb(self, index: int, one: str, more: str) -> str:
        """Returns the form of a verb that agrees with the item."""
        return one if self.count(index) == 1 else more

    def position_verb(self, index: int) -> str:
        """Samples a verb of position that agrees with the item."""
        verb = self.pick("stand", "sit", "lie", "appear")
        return self.verb(index, f"{verb}s", verb)

    def shape(self, index: int) -> str:
        """Returns the noun for the shape of an item, singular or plural."""
        shape = self.include[index]["class"]
        return shape if self.count(index) == 1 else _PLURALS[shape]

    def bare(self, index: int) -> str:
        """Returns 'blue cross', 'green triangles'."""
        return f"{self.include[index]['color']} {self.shape(index)}"

    def a(self, index: int) -> str:
        """Returns the first mention of an item: 'a blue cross', 'two green triangles', 'a cross in blue'."""
        color, shape = self.include[index]["color"], self.shape(index)
        if self.color == "before":
            named = f"{color} {shape}"
        elif self.color == "in":
            named = f"{shape} in {color}"
        else:
            named = f"{shape} that {self.verb(index, 'is', 'are')} {color}"
        if self.count(index) > 1:
            return f"{self.number(self.count(index))} {named}"
        return f"{'an' if named[0] in 'aeiou' else 'a'} {named}"

    def the(self, index: int) -> str:
        """Returns a later mention of an item: 'the blue cross', 'the two green triangles', 'the cross in blue'."""
        color, shape = self.include[index]["color"], self.shape(index)
        named = f"{shape} in {color}" if self.color == "in" else f"{color} {shape}"
        return f"the {self._group(index)}{named}"

    def short(self, index: int) -> str:
        """Returns a later mention by the shape alone, 'the cross', if no other item has the shape."""
        shapes = [item["class"] for item in self.include]
        if shapes.count(self.include[index]["class"]) > 1:
            return self.the(index)
        return f"the {self._group(index)}{self.shape(index)}"

    def _group(self, index: int) -> str:
        count = self.count(index)
        return f"{self.number(count)} " if count > 1 else ""

    def counted(self, index: int) -> str:
        """Returns '1 blue cross' or 'one blue cross'."""
        return f"{self.number(self.count(index))} {self.bare(index)}"

    def relation(self, relation: str) -> str:
        """Samples a preposition for a relation."""
        return self.pick(*RELATIONS[relation])

    def side(self, index: int) -> str:
        """Returns the relation of an item with a pronoun for its anchor: 'on its left side', 'above them'."""
        relation, anchor = self._position(index)
        its, it = ("its", "it") if self.count(anchor) == 1 else ("their", "them")
        return self.pick(*_SIDES[relation]).format(its=its, it=it)

    def where(self, index: int, the: Callable[[int], str] | None = None) -> str:
        """Returns the place or relation of an item, 'to the left of the blue cross', or '' if it has neither."""
        place = self.place(index)
        if place is not None:
            return self.pick(*_PLACES[place])
        if self.position(index) is None:
            return ""
        relation, anchor = self._position(index)
        return f"{self.relation(relation)} {(the or self.the)(anchor)}"

    def _position(self, index: int) -> tuple[str, int]:
        position = self.position(index)
        assert position is not None
        return position

    def located(self) -> list[int]:
        """Returns the indices of the items that have a place or a relation."""
        return [index for index in self.indices() if self.place(index) is not None or self.position(index) is not None]

    def subject(self, index: int, inverse: bool = False) -> int:
        """Returns the index of the item that is the subject of `fact`."""
        position = self.position(index)
        return position[1] if inverse and position is not None else index

    def fact(self, index: int, verb: Callable[[int], str], inverse: bool = False) -> str:
        """Returns a clause about items introduced before: 'the green triangle is to the left of the blue cross'.

        Args:
          index: an item that has a place or a relation.
          verb: returns the verb for a subject.
          inverse: make the anchor the subject: 'the blue cross is to the right of the green triangle'.
        """
        if inverse and self.position(index) is not None:
            relation, anchor = self._position(index)
            return f"{self.the(anchor)} {verb(anchor)} {self.relation(_INVERSE[relation])} {self.the(index)}"
        return f"{self.the(index)} {verb(index)} {self.where(index)}"

    def is_(self, index: int) -> str:
        """Returns 'is' or 'are', which agrees with the item."""
        return self.verb(index, "is", "are")

    def inventory(self, last: str = " and ") -> str:
        """Lists the first mentions of all items."""
        return listed([self.a(index) for index in self.indices()], last)


def listed(parts: list[str], last: str) -> str:
    """Joins parts by commas, the last one by `last`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + last + parts[-1]


def capitalized(text: str) -> str:
    """Returns the text as the start of a sentence: with a capital letter, and with a word in place of a digit."""
    if text[:1].isdigit():
        text = _NUMBERS[int(text[0])] + text[1:]
    return text[:1].upper() + text[1:]


def sentences(clauses: list[str]) -> str:
    """Writes each clause as a sentence."""
    return " ".join(f"{capitalized(clause)}." for clause in clauses)


def one_sentence(words: Wording, text: str) -> str:
    """Returns a prompt of one sentence, with or without a capital letter, with or without a period."""
    text = capitalized(text) if words.rng.random() < 0.5 else text
    return f"{text}." if words.rng.random() < 0.5 else text
