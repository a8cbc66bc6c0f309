"""Noun phrases, references and clauses of training prompts, written by a `TextBuilder` that tracks which items the text
has mentioned.

A relation belongs to the item that is placed (the figure), whether it is mentioned before or after its anchor (the
ground). The one exception: if a clause places a known item relative to a new one ("the circle is below a red star"),
or relative to one that was mentioned after it, the inverse relation belongs to the other item. A pronoun is used only
if it can refer to one item alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from clvr_jax.worlds.shapes.language import training_words as words
from clvr_jax.worlds.shapes.metadata import Item

_T = TypeVar("_T")
_ORDERS = frozenset({"place {F} {where}", "put {F} {where}", "position {F} {where}", "set {F} {where}"})
_SLOT = re.compile(r"\{(\w+)\}")
_NONCE_STARTS = ("b", "br", "d", "fl", "g", "gl", "k", "m", "n", "pl", "qu", "sn", "t", "tr", "v", "w", "z")
_NONCE_MIDDLES = ("a", "e", "i", "o", "u", "oo", "ee", "arf", "ilb", "onk", "ust", "emp")
_NONCE_ENDS = ("x", "ble", "dic", "lo", "nth", "pt", "rm", "ster", "t", "vy", "zle", "n")


class TextBuilder:
    """Writes phrases about an include list; all choices are sampled from `rng`.

    Attributes:
      include: the items, each after the anchor of its relation.
      mentioned: indices of the items in the order of their first mention so far.
    """

    def __init__(self, include: Sequence[Item], rng: np.random.Generator) -> None:
        self.include = include
        self.mentioned: list[int] = []
        self._noun_share = max(1.0, 0.4 * len(include) - 0.6)
        self._random = rng.random
        self._brevity = 0.15 * max(len(include) - 2, 0) + (0.3 if len(include) > 4 else 0)
        self._now: list[int] = []
        self._before: list[int] = []
        self._pronouns: tuple[str, str] | tuple[()] = ()

    # --- choices ------------------------------------------------------------------------------------------------------

    def chance(self, share: float) -> bool:
        """Samples whether an event of this probability, in [0, 1], happens."""
        return self._random() < share

    def pick(self, options: Sequence[_T]) -> _T:
        """Samples one of the options uniformly."""
        return options[int(self._random() * len(options))]

    def brief(self, options: Sequence[str]) -> str:
        """Samples one of the options; the more items there are, the more often the shorter one of two samples."""
        one = self.pick(options)
        if self._random() >= self._brevity:
            return one
        other = self.pick(options)
        return other if len(other) < len(one) else one

    def shuffled(self, indices: Sequence[int]) -> list[int]:
        """Returns the indices in a random order."""
        return sorted(indices, key=lambda _: self._random())

    def nonce(self) -> str:
        """Samples a made-up word."""
        return self.pick(_NONCE_STARTS) + self.pick(_NONCE_MIDDLES) + self.pick(_NONCE_ENDS)

    def filler(self, options: Sequence[str]) -> str:
        """Samples one of the options, with made-up words in its slots."""
        text = self.pick(options)
        return text.replace("{nonce}", self.nonce()) if "{nonce}" in text else text

    # --- what has been mentioned --------------------------------------------------------------------------------------

    def end_clause(self) -> None:
        """Ends a clause: pronouns of the next clause refer to the items that this one mentioned."""
        self._before, self._now = self._now, []

    def mention(self, index: int) -> None:
        """Records that the text mentions an item at this point."""
        if index not in self.mentioned:
            self.mentioned.append(index)
        if index not in self._now:
            self._now.append(index)

    def is_known(self, index: int) -> bool:
        """Returns whether the text has mentioned the item."""
        return index in self.mentioned

    def has_where(self, index: int) -> bool:
        """Returns whether the item has a place or a relation."""
        return "place" in self.include[index] or "position" in self.include[index]

    def anchor(self, index: int) -> int:
        """Returns the index of the anchor of the item's relation, -1 without one."""
        return int(self.include[index].get("position", (None, -1))[1])

    def is_pronoun_clear(self, index: int) -> bool:
        """Returns whether "it" or "them" can only refer to this item.

        This holds if the previous clause, and this one so far, mentioned no other item of the same grammatical number.
        """
        one = self.include[index]["count"] == 1
        alike = [other for other in self._before if (self.include[other]["count"] == 1) == one]
        return alike == [index] and not any(
            other != index and (self.include[other]["count"] == 1) == one for other in self._now
        )

    # --- noun phrases -------------------------------------------------------------------------------------------------

    def noun(self, index: int) -> str:
        """Returns color and shape without a number: "red star", "star in red"."""
        item = self.include[index]
        shape = item["class"] if item["count"] == 1 else words.PLURALS[item["class"]]
        if "color" not in item:
            return str(shape)
        color, sample = item["color"], self._random() * self._noun_share
        if sample > 0.22:
            return f"{color} {shape}"
        if sample > 0.12:
            form = self.brief(words.COLORED_AFTER)
            return form.format(n=shape, c=color, **{"is": "is" if item["count"] == 1 else "are"})
        if sample > 0.06:
            return self.pick(words.COLORED_BEFORE).format(n=shape, c=color)
        return f"{self.pick(words.NEUTRAL_ADJECTIVES)} {color} {shape}"

    def a(self, index: int) -> str:
        """Introduces an item: "a red star", "two stars in red"."""
        self.mention(index)
        item, noun = self.include[index], self.noun(index)
        count = item["count"]
        if count == 1:
            if self.chance(0.1):
                return f"{self.brief(words.SINGLES)} {noun}"
            if "color" in item and self._is_shape_repeated(index) and self.chance(0.25):
                return self.pick(words.ANOTHER).format(n=item["class"], c=item["color"])
            return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
        if self.chance(0.12):
            return self._group_after(item)
        if count in words.GROUPS and self.chance(0.25):
            return f"{self.brief(words.GROUPS[count])} {noun}"
        return f"{count if self.chance(0.2) else words.NUMBERS[count - 1]} {noun}"

    def _is_shape_repeated(self, index: int) -> bool:
        shape = self.include[index]["class"]
        return any(self.include[other]["class"] == shape for other in self.mentioned if other != index)

    def _group_after(self, item: Item) -> str:
        """Returns a phrase for a group with its color or number at the end."""
        number, shape = words.NUMBERS[item["count"] - 1], words.PLURALS[item["class"]]
        if "color" not in item:
            return f"{number} {shape}"
        every = "both" if item["count"] == 2 else "all"
        return self.pick((
            f"{number} {shape} ({every} {item['color']})", f"{item['color']} {shape} ({number} of them)",
            f"{number} {shape} that are {every} {item['color']}", f"{item['color']} {shape} ({item['count']})",
        ))  # fmt: skip

    def bare(self, index: int) -> str:
        """Mentions an item without an article: "red star", "2 blue circles"."""
        self.mention(index)
        item = self.include[index]
        shape = item["class"] if item["count"] == 1 else words.PLURALS[item["class"]]
        color = f"{item['color']} " if "color" in item else ""
        if item["count"] == 1:
            return f"1 {color}{shape}" if self.chance(0.08) else f"{color}{shape}"
        number = item["count"] if self.chance(0.5) else words.NUMBERS[item["count"] - 1]
        if self.chance(0.15):
            return f"{color}{shape} x{item['count']}"
        return f"{number} {color}{shape}"

    def the(self, index: int) -> str:
        """Refers to a known item without a pronoun: "the red star", "the star", "the red one"."""
        self.mention(index)
        item, count = self.include[index], self.include[index]["count"]
        one = count == 1
        shape = item["class"] if one else words.PLURALS[item["class"]]
        number = "" if one or self.chance(0.5) else words.NUMBERS[count - 1] + " "
        article = "the" if self.chance(0.92) else "that" if one else "those"
        color, sample = item.get("color"), self._random()
        if color is None:
            return f"{article} {number}{shape}"
        if sample < 0.3 and sum(other["class"] == item["class"] for other in self.include) == 1:
            return f"{article} {number}{shape}"
        if sample < 0.36 and sum(other.get("color") == color for other in self.include) == 1:
            return f"{article} {number}{color} {'one' if one else 'ones'}"
        return f"{article} {number}{color} {shape}"

    def bare_the(self, index: int) -> str:
        """Refers to a known item without an article."""
        return self.the(index).partition(" ")[2]

    def named(self, index: int) -> str:
        """Introduces a new item, refers to a known one without a pronoun."""
        return self.the(index) if self.is_known(index) else self.a(index)

    def figure(self, index: int) -> str:
        """Mentions the item that the clause places, perhaps as a pronoun if the template allows one."""
        if self._pronouns and self.is_known(index) and self.is_pronoun_clear(index) and self.chance(0.4):
            self.mention(index)
            return self._pronouns[0 if self.include[index]["count"] == 1 else 1]
        return self.named(index)

    def ground(self, index: int) -> str:
        """Mentions an anchor after a preposition, perhaps as a pronoun."""
        if not self.is_known(index):
            return self.a(index)
        one = self.include[index]["count"] == 1
        if self.is_pronoun_clear(index) and self.chance(0.5):
            self.mention(index)
            return self.pick(("it", "it", "this one", "that one", "that")) if one else self.pick(("them", "these"))
        both = self._before
        two = len(both) == 2 and index in both and all(self.include[other]["count"] == 1 for other in both)
        if two and not self._now[1:] and self.chance(0.25):
            self.mention(index)
            return "the former" if both[0] == index else "the latter"
        return self.the(index)

    # --- where --------------------------------------------------------------------------------------------------------

    def relation(self, index: int) -> str:
        """Returns the relation of an item to its anchor: "left of the blue circle", "to its left"."""
        name, target = self.include[index]["position"]
        if self.is_known(target):
            if self.is_pronoun_clear(target) and self.chance(0.5):
                self.mention(target)
                return self.its(target, name)
            if name in ("left of", "right of") and self.include[target]["count"] == 1 and self.chance(0.1):
                side = self.pick(("to {}'s {}", "on {}'s {}", "on {}'s {} side", "at {}'s {}"))
                return side.format(self.the(target), words.SIDES[name])
        return f"{self.brief(words.RELATIONS[name])} {self.ground(target)}"

    def its(self, index: int, relation: str) -> str:
        """Returns the side of an item that has just been mentioned, with a pronoun: "to its left"."""
        one = self.include[index]["count"] == 1
        form = self.brief(words.ITS_SIDE[relation])
        return form.format(its="its" if one else "their", it="it" if one else "them")

    def place(self, index: int) -> str:
        """Returns the place of an item: "in the top left corner"."""
        return self.brief(words.PLACES[self.include[index]["place"]])

    def where(self, index: int) -> str:
        """Returns place and relation of an item in words, "" if it has neither."""
        item = self.include[index]
        parts = [self.place(index)] if "place" in item else []
        if "position" in item:
            parts.append(self.relation(index))
        return " and ".join(parts)

    # --- clauses ------------------------------------------------------------------------------------------------------

    def clause(self, index: int, plain: bool = False) -> str:
        """Returns a statement that introduces an item with its place or relation, or gives that of a known item.

        Args:
          index: the item.
          plain: return a full sentence that can follow "such that"; the item must have a place or a relation.
        """
        if self.is_inverse(index):
            template = self.brief(words.INVERSE_KNOWN)
        else:
            template = self.brief(words.WHERE_PLAIN if plain else self._templates(index))
        self._pronouns = ("it", "they") if template[:4] == "{F} " else ("it", "them") if template in _ORDERS else ()
        text = self.fill(template, index)
        self.end_clause()
        return text

    def is_inverse(self, index: int) -> bool:
        """Samples whether a clause about two known items has the anchor as its subject."""
        is_relation_only = "position" in self.include[index] and "place" not in self.include[index]
        return is_relation_only and self.is_known(index) and self.is_known(self.anchor(index)) and self.chance(0.4)

    def inverse(self, index: int) -> str:
        """Returns the relation of the anchor of an item to the item: "right of the red star"."""
        return f"{self.brief(words.RELATIONS[words.INVERSE[_relation_name(self, index)]])} {self.the(index)}"

    def anchor_subject(self, index: int) -> str:
        """Mentions the anchor of an item as the subject of a clause, perhaps as a pronoun."""
        target = self.anchor(index)
        if self.is_pronoun_clear(target) and self.chance(0.4):
            self.mention(target)
            return "it" if self.is_one(target) else "they"
        return self.the(target)

    def _templates(self, index: int) -> tuple[str, ...]:
        known, target = self.is_known(index), self.anchor(index)
        if not self.has_where(index):
            return words.NOWHERE_NEW
        sample = self._random()
        if target >= 0 and "place" not in self.include[index] and sample < 0.4:
            if sample < 0.12:
                return words.RELATE_DIRECTED[self.include[index]["position"][0]]
            if sample < 0.22 and not known and self.is_known(target):
                return words.INVERSE_NEW
            return words.RELATE_NEW if not known and sample < 0.27 else words.RELATE_ANY
        return words.WHERE_ANY if known or sample > 0.75 else words.WHERE_NEW

    def fill(self, template: str, index: int) -> str:
        """Fills the slots of a template about an item, from left to right."""
        return _SLOT.sub(lambda match: _SLOTS[match[1]](self, index), template)

    def is_one(self, index: int) -> bool:
        """Returns whether verbs about the item are singular."""
        return bool(self.include[index]["count"] == 1)

    def verb(self, index: int) -> str:
        """Returns a verb of position that agrees with the item: "is placed", "sit"."""
        return self.fill(self.brief(words.VERBS), index)

    def modal(self, index: int) -> str:
        """Returns a modal verb that agrees with the item: "should be"."""
        text = self.brief(words.MODALS)
        return text if self.is_one(index) else words.MODALS_PLURAL.get(text, text)


def _agree(one: str, many: str, anchor: bool = False) -> Callable[[TextBuilder, int], str]:
    return lambda t, i: one if t.is_one(t.anchor(i) if anchor else i) else many


def _relation_name(t: TextBuilder, index: int) -> str:
    return str(t.include[index]["position"][0])


_SLOTS: dict[str, Callable[[TextBuilder, int], str]] = {
    "F": lambda t, i: t.figure(i),
    "F_it": _agree("it", "them"),
    "G": lambda t, i: t.named(t.anchor(i)),
    "G_it": lambda t, i: t.anchor_subject(i),
    "Gmodal": lambda t, i: t.modal(t.anchor(i)),
    "inverse_side": lambda t, i: t.its(i, words.INVERSE[_relation_name(t, i)]),
    "where": lambda t, i: t.where(i),
    "rel": lambda t, i: t.brief(words.RELATIONS[_relation_name(t, i)]),
    "inv": lambda t, i: t.brief(words.RELATIONS[words.INVERSE[_relation_name(t, i)]]),
    "its": lambda t, i: t.its(t.anchor(i), _relation_name(t, i)),
    "alone": lambda t, i: t.pick(words.SIDE_ALONE[_relation_name(t, i)]),
    "put": lambda t, i: t.brief(words.ORDERS),
    "verb": lambda t, i: t.verb(i),
    "modal": lambda t, i: t.modal(i),
    "is": _agree("is", "are"),
    "s": _agree("s", ""),
    "es": _agree("es", ""),
    "has": _agree("has", "have"),
    "Gis": _agree("is", "are", True),
    "Gs": _agree("s", "", True),
    "Gies": _agree("ies", "y", True),
    "Ghas": _agree("has", "have", True),
    "Gits": _agree("its", "their", True),
}
