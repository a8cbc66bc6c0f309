"""A second grammar of English prompts for the shapes world, for evaluation only.

It was written without looking at the first grammar (`grammar.py`), whose prompts models are trained on, so that the
evaluation set "second" measures how well a model understands a wording that it was not trained on. Nothing here may be
used to make training prompts.

Every style says all items with their colors and counts, all places and all relations, and nothing more. "The blue
cross" stands only for something that the prompt has introduced. Relations are worded so that they mean what
`metadata.RELATIONS` means; "higher than", for example, would also be true of objects far to one side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.worlds.shapes.grammar import TIERS
from clvr_jax.worlds.shapes.metadata import Metadata

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
_PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
_RELATIONS = {
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
_PLACE_NAMES = {
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
class _Wording:
    """Names the items of one metadata and their relations, with words chosen by `rng`.

    `digits` writes the numbers of groups as digits. `color` is how the first mention of an item tells its color:
    "before" the noun, "in" for "a star in red", "that is" for "a star that is red".
    """

    include: list[dict[str, Any]]
    rng: np.random.Generator
    digits: bool = False
    color: str = "before"

    def pick(self, *options: str) -> str:
        return options[int(self.rng.integers(len(options)))]

    def indices(self) -> range:
        return range(len(self.include))

    def count(self, index: int) -> int:
        return int(self.include[index]["count"])

    def total(self) -> int:
        return sum(map(self.count, self.indices()))

    def position(self, index: int) -> tuple[str, int] | None:
        """The relation of an item and the index of its anchor."""
        position = self.include[index].get("position")
        return None if position is None else (position[0], position[1])

    def place(self, index: int) -> str | None:
        return self.include[index].get("place")

    def children(self, index: int) -> list[int]:
        """The items whose anchor the item is."""
        return [other for other in self.indices() if (self.position(other) or ("", -1))[1] == index]

    def number(self, number: int) -> str:
        return str(number) if self.digits else _NUMBERS[number]

    def verb(self, index: int, one: str, more: str) -> str:
        """The form of a verb that agrees with the item."""
        return one if self.count(index) == 1 else more

    def stands(self, index: int) -> str:
        verb = self.pick("stand", "sit", "lie", "appear")
        return self.verb(index, f"{verb}s", verb)

    def shape(self, index: int) -> str:
        shape = self.include[index]["class"]
        return shape if self.count(index) == 1 else _PLURALS[shape]

    def bare(self, index: int) -> str:
        """'blue cross', 'green triangles'."""
        return f"{self.include[index]['color']} {self.shape(index)}"

    def a(self, index: int) -> str:
        """The first mention of an item: 'a blue cross', 'two green triangles', 'a cross in blue'."""
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
        """A later mention of an item: 'the blue cross', 'the two green triangles', 'the cross in blue'."""
        color, shape = self.include[index]["color"], self.shape(index)
        named = f"{shape} in {color}" if self.color == "in" else f"{color} {shape}"
        return f"the {self._group(index)}{named}"

    def short(self, index: int) -> str:
        """A later mention by the shape alone, where no other item has the shape: 'the cross'."""
        shapes = [item["class"] for item in self.include]
        if shapes.count(self.include[index]["class"]) > 1:
            return self.the(index)
        return f"the {self._group(index)}{self.shape(index)}"

    def _group(self, index: int) -> str:
        count = self.count(index)
        return f"{self.number(count)} " if count > 1 else ""

    def counted(self, index: int) -> str:
        """'1 blue cross' or 'one blue cross'."""
        return f"{self.number(self.count(index))} {self.bare(index)}"

    def relation(self, relation: str) -> str:
        return self.pick(*_RELATIONS[relation])

    def side(self, index: int) -> str:
        """The relation of an item from its anchor's side: 'on its left side', 'above them'."""
        relation, anchor = self._position(index)
        its, it = ("its", "it") if self.count(anchor) == 1 else ("their", "them")
        return self.pick(*_SIDES[relation]).format(its=its, it=it)

    def where(self, index: int, the: Callable[[int], str] | None = None) -> str:
        """Place or relation of an item as an adverbial: 'to the left of the blue cross'; '' if it has neither."""
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
        """The items that have a place or a relation."""
        return [index for index in self.indices() if self.place(index) is not None or self.position(index) is not None]

    def subject(self, index: int, inverse: bool = False) -> int:
        """The item that is the subject of `fact`."""
        position = self.position(index)
        return position[1] if inverse and position is not None else index

    def fact(self, index: int, verb: Callable[[int], str], inverse: bool = False) -> str:
        """A clause about items introduced before: 'the green triangle is to the left of the blue cross'.

        Args:
          index: an item that has a place or a relation.
          verb: gives the verb for a subject.
          inverse: tell a relation from the anchor's side: 'the blue cross is to the right of the green triangle'.
        """
        if inverse and self.position(index) is not None:
            relation, anchor = self._position(index)
            return f"{self.the(anchor)} {verb(anchor)} {self.relation(_INVERSE[relation])} {self.the(index)}"
        return f"{self.the(index)} {verb(index)} {self.where(index)}"

    def is_(self, index: int) -> str:
        return self.verb(index, "is", "are")

    def inventory(self, last: str = " and ") -> str:
        return _listed([self.a(index) for index in self.indices()], last)


def _listed(parts: list[str], last: str) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + last + parts[-1]


def _capital(text: str) -> str:
    """The text as a sentence begins: with a capital letter, and with a word instead of a digit."""
    if text[:1].isdigit():
        text = _NUMBERS[int(text[0])] + text[1:]
    return text[:1].upper() + text[1:]


def _sentences(clauses: list[str]) -> str:
    return " ".join(f"{_capital(clause)}." for clause in clauses)


def _one_sentence(words: _Wording, text: str) -> str:
    """A prompt of one sentence, written with a capital and a period, or with one of them, or with neither."""
    text = _capital(text) if words.rng.random() < 0.5 else text
    return f"{text}." if words.rng.random() < 0.5 else text


# --- the styles -------------------------------------------------------------------------------------------------------


def _where_first(words: _Wording) -> str:
    """'The image contains a blue cross. To the left of the blue cross stands a green triangle.'"""
    clauses: list[str] = []
    said = set()
    for index in words.indices():
        position = words.position(index)
        if index in words.located():
            also = "also " if position is not None and position in said else ""
            clauses.append(f"{also}{words.where(index)} {words.stands(index)} {words.a(index)}")
            said.add(position)
        elif not clauses:
            clauses.append(words.pick("the image contains ", "this image shows ") + words.a(index))
        else:
            clauses.append(f"somewhere in the image {words.is_(index)} {words.a(index)}")
    return _sentences(clauses)


def _with(words: _Wording) -> str:
    """'a blue cross with a green triangle on its left side; two red stars above the green triangle'"""
    parts = []
    for index in words.indices():
        children = words.children(index)
        if words.position(index) is None:
            part = words.a(index)
            if words.place(index) is not None:
                part += f" {words.where(index)}" + ("," if children else "")
            if children:
                first = children.pop(0)
                part += f" with {words.a(first)} {words.side(first)}"
            parts.append(part)
        parts += [f"{words.a(child)} {words.where(child)}" for child in children]
    return _one_sentence(words, words.pick("", "an image of ", "scene: ") + "; ".join(parts))


def _from_the_anchor(words: _Wording) -> str:
    """'One can see a blue cross and a green triangle. The blue cross is to the right of the green triangle.'"""
    joint = words.pick(", while ", ", whereas ", ", and ")
    located = words.located()
    facts = []
    for start in range(0, len(located), 2):
        index, *more = located[start : start + 2]
        fact = words.fact(index, words.is_, inverse=True)
        for other in more:
            subject, predicate = words.subject(other, inverse=True), words.fact(other, words.is_, inverse=True)
            if subject == words.subject(index, inverse=True):
                pronoun = words.verb(subject, "it", "they")
                fact += f", and {pronoun}{predicate.removeprefix(words.the(subject))}"
            else:
                fact += joint + predicate
        facts.append(fact)
    opening = words.pick("one can see", "the image contains", "in this image you can see", "here we have")
    return _sentences([f"{opening} {words.inventory()}", *facts])


def _objects_and_layout(words: _Wording) -> str:
    """'Objects: 1 blue cross, 2 green triangles. Layout: green triangles to the left of the blue cross.'"""
    objects = ", ".join(words.counted(index) for index in words.indices())
    layout = "; ".join(f"{words.bare(index)} {words.where(index)}" for index in words.located())
    first, second = words.pick("Objects Layout", "Shapes Positions", "Contents Arrangement").split()
    text = f"{first}: {objects}. {second}: {layout}."
    return text.lower() if words.rng.random() < 0.4 else text


def _step_by_step(words: _Wording) -> str:
    """'Begin with a blue cross. Then add a green triangle to the left of the blue cross.'"""
    steps = ("then add", "next, add", "after that, add")
    start = int(words.rng.integers(len(steps)))
    clauses: list[str] = []
    for index in words.indices():
        where = words.where(index)
        if not clauses:
            clauses.append(f"{words.pick('begin', 'start')} with {words.a(index)} {where}".rstrip())
            continue
        last = index == len(words.include) - 1
        step = "finally, add" if last and index > 1 else steps[(start + index) % len(steps)]
        clauses.append(f"{step} {words.a(index)} {where or 'wherever ' + words.verb(index, 'it fits', 'they fit')}")
    return _sentences(clauses)


def _passive(words: _Wording) -> str:
    """'A blue cross has been drawn. A green triangle has been placed to the left of the blue cross.'"""
    one, more = words.pick("has been/have been", "is/are", "was/were").split("/")
    clauses: list[str] = []
    for index in words.indices():
        where = words.where(index)
        done = words.pick("placed", "put", "positioned", "drawn") if where else "drawn"
        clause = f"{words.a(index)} {words.verb(index, one, more)} {done} {where}".rstrip()
        clauses.append(clause if where or not clauses else f"{clause} as well")
    return _sentences(clauses)


def _color_after(words: _Wording) -> str:
    """'a cross in blue sits in the very middle, while a triangle in green lies to the left of the cross in blue'"""
    words.color = words.pick("in", "that is")
    text = ""
    joints = (", while ", "; furthermore, ", ", and ", "; moreover, ", ", whereas ")
    for index in words.indices():
        where = words.where(index)
        name = words.a(index)
        clause = f"{name} {words.stands(index)} {where}" if where else f"there {words.is_(index)} {name}"
        text += (joints[index - 1] if text else "") + clause
    return _one_sentence(words, text)


def _along_with(words: _Wording) -> str:
    """'An image of a blue cross and a green triangle, along with two red stars. The triangle is left of the cross.'"""
    *parts, last = [words.a(index) for index in words.indices()]
    joint = words.pick(", along with ", ", as well as ", ", together with ")
    clauses = [
        f"{words.pick('an image of', 'a drawing with', 'this scene has')} {_listed(parts, ' and ')}{joint}{last}"
    ]
    verb = words.pick("{be}", "{be} found", "can be found", "{be} located")
    for index in words.located():
        clauses.append(
            f"{words.short(index)} {verb.format(be=words.is_(index))} {words.where(index, words.short)}",
        )
    return _sentences(clauses)


def _anchor_has(words: _Wording) -> str:
    """'A blue cross has a green triangle on its left side. The green triangle has two red stars above it.'"""
    clauses: list[str] = []
    for index in words.indices():
        children = words.children(index)
        introduced = words.position(index) is not None
        if words.place(index) is not None:
            place = words.pick(*_PLACE_NAMES[words.place(index) or ""])
            clauses.append(f"{words.a(index)} {words.verb(index, 'occupies', 'occupy')} the {place}")
            introduced = True
        elif not introduced and not children:
            clauses.append(f"there {words.is_(index)} {'also ' if clauses else ''}{words.a(index)}")
        for number, child in enumerate(children):
            subject = words.the(index) if introduced else words.a(index)
            has = words.verb(index, "has", "have")
            clauses.append(f"{subject} {'also ' if number else ''}{has} {words.a(child)} {words.side(child)}")
            introduced = True
    return _sentences(clauses)


def _request(words: _Wording) -> str:
    """'Please create an image with a blue cross and a green triangle. Make sure that the triangle is ...'"""
    inventory = words.inventory()
    inverse = words.rng.random(len(words.include)) < 0.5
    if words.rng.random() < 0.5:
        facts = [words.fact(index, words.is_, bool(inverse[index])) for index in words.located()]
        facts = [f"that {fact}" for fact in facts]
        last = ", and " if len(facts) > 2 else " and "
        request = words.pick("please create an image with", "please produce an image showing", "I want an image with")
        return _sentences([f"{request} {inventory}", f"make sure {_listed(facts, last)}"])
    facts = [words.fact(index, lambda _: "should be", bool(inverse[index])) for index in words.located()]
    question = words.pick("could you make an image that has", "can you show me an image with")
    return f"{_capital(question)} {inventory}? {_sentences(facts)}"


def _on_which(words: _Wording) -> str:
    """'a canvas on which a green triangle lies to the left of a blue cross, and a red star sits in the very middle'"""
    introduced: set[int] = set()

    def anchor(index: int) -> str:
        name = words.the(index) if index in introduced else words.a(index)
        introduced.add(index)
        return name

    clauses = []
    for index in words.indices():
        if index not in words.located():
            if not words.children(index):  # otherwise its first child introduces it
                clauses.append(f"there {words.is_(index)} {words.a(index)}")
            continue
        clauses.append(f"{words.a(index)} {words.stands(index)} {words.where(index, anchor)}")
        introduced.add(index)
    opening = words.pick("a canvas on which", "a simple image in which", "imagine an image where")
    return _one_sentence(words, f"{opening} {_listed(clauses, ', and ')}")


def _in_total(words: _Wording) -> str:
    """'Exactly three objects are visible: a cross in blue and two triangles in green. Above the cross in blue ...'"""
    words.color = words.pick("in", "that is")
    total = words.number(words.total())
    opening = words.pick("exactly {} objects are visible", "in total there are {} shapes", "the image has {} objects")
    clauses = [f"{opening.format(total)}: {words.inventory()}"]
    for index in words.located():
        clauses.append(f"{words.where(index)} {words.is_(index)} {words.the(index)}")
    return _sentences(clauses)


def _notes(words: _Wording) -> str:
    """'1 blue cross (very middle), 2 green triangles (left of the blue cross), 1 red star'"""
    parts = []
    for index in words.indices():
        position, place = words.position(index), words.place(index)
        note = ""
        if position is not None:
            note = f" ({words.relation(position[0])} {words.the(position[1])})"
        elif place is not None:
            note = f" ({words.pick(*_PLACE_NAMES[place])})"
        parts.append(words.counted(index) + note)
    text = words.pick(", ", "; ", " | ", " + ").join(parts)
    return words.pick("", f"{words.number(words.total())} shapes: ", "image: ") + text


def _areas(words: _Wording) -> str:
    """'The image includes a blue cross. The area to the left of the blue cross holds a green triangle.'"""
    clauses: list[str] = []
    said = set()
    for index in words.indices():
        position, place = words.position(index), words.place(index)
        if place is not None:
            occupied = words.pick("is occupied by", "is filled by", "is taken by")
            clauses.append(f"the {words.pick(*_PLACE_NAMES[place])} {occupied} {words.a(index)}")
        elif position is not None:
            relation, anchor = position
            also = "also " if position in said else ""
            side = words.pick(*(text for text in _RELATIONS[relation] if not text.startswith("on ")))
            area = f"the {words.pick('area', 'space', 'region')} {side} {words.the(anchor)}"
            clauses.append(f"{area} {also}{words.pick('holds', 'contains')} {words.a(index)}")
            said.add(position)
        else:
            clauses.append(f"the image {'also ' if clauses else ''}includes {words.a(index)}")
    return _sentences(clauses)


_STYLES: tuple[Callable[[_Wording], str], ...] = (
    _where_first,
    _with,
    _from_the_anchor,
    _objects_and_layout,
    _step_by_step,
    _passive,
    _color_after,
    _along_with,
    _anchor_has,
    _request,
    _on_which,
    _in_total,
    _notes,
    _areas,
)
NUM_STYLES = len(_STYLES)
"""Number of styles; their indices in `second_phrase` are below it."""


def second_phrase(metadata: Metadata, rng: np.random.Generator, style: int | None = None) -> tuple[str, int]:
    """Writes a prompt in the English of the second grammar.

    Args:
      metadata: as `parse_metadata` returns it, with or without "prompt"; of the tag `complex`, with 3 to 6 objects, a
        color for every item, no two items with the same color and shape, and no item with both position and place.
      rng: chooses the words; the same state gives the same text.
      style: index of the style, below NUM_STYLES; None draws one.
    Returns: the prompt and the index of its style.
    Raises: ClvrError for a metadata that the grammar cannot say.
    """
    include = metadata["include"]
    total = sum(item["count"] for item in include)
    if metadata["tag"] != "complex" or total not in TIERS:
        raise ClvrError(f"second_phrase: needs the tag complex and {TIERS} objects, got {metadata['tag']} and {total}")
    pairs = {(item.get("color"), item["class"]) for item in include}
    if len(pairs) < len(include) or not all(color for color, _ in pairs):
        raise ClvrError("second_phrase: every item needs a color, and a pair of color and shape of its own")
    known = [("position" in item) + ("place" in item) for item in include]
    if max(known) > 1 or not any(known):
        raise ClvrError("second_phrase: an item may have a position or a place, not both, and one item must have one")
    if style is None:
        style = int(rng.integers(NUM_STYLES))
    if not 0 <= style < NUM_STYLES:
        raise ClvrError(f"second_phrase: style {style} does not exist; there are {NUM_STYLES}, counted from 0")
    words = _Wording(include, rng, digits=bool(rng.random() < 0.5))
    return _STYLES[style](words), style
