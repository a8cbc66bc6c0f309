"""A second grammar of English prompts for the shapes world, for evaluation only.

It was written independently of the first grammar (`grammar.py`), on whose prompts models are trained, so that the
evaluation set "second" measures how well a model understands wordings that it was not trained on. Nothing here may be
used to make training prompts.

Each style states all items with their colors and counts, all places and all relations, and nothing else. A definite
noun phrase ("the blue cross") refers only to an item that the prompt has introduced. Relations are worded so that they
have the meaning of `metadata.RELATIONS`; "higher than", for example, would also be true of objects far to one side.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.worlds.shapes.language.grammar import TIERS
from clvr_jax.worlds.shapes.language.second_wording import (
    PLACE_NAMES,
    RELATIONS,
    Wording,
    capitalized,
    listed,
    one_sentence,
    sentences,
)
from clvr_jax.worlds.shapes.metadata import Metadata


def _where_first(words: Wording) -> str:
    """Writes the place or relation of each item before it.

    Example: 'The image contains a blue cross. To the left of the blue cross stands a green triangle.'
    """
    clauses: list[str] = []
    stated = set()
    for index in words.indices():
        position = words.position(index)
        if index in words.located():
            also = "also " if position is not None and position in stated else ""
            clauses.append(f"{also}{words.where(index)} {words.position_verb(index)} {words.a(index)}")
            stated.add(position)
        elif not clauses:
            clauses.append(words.pick("the image contains ", "this image shows ") + words.a(index))
        else:
            clauses.append(f"somewhere in the image {words.is_(index)} {words.a(index)}")
    return sentences(clauses)


def _with(words: Wording) -> str:
    """Writes each anchor together with the first item that refers to it.

    Example: 'a blue cross with a green triangle on its left side; two red stars above the green triangle'
    """
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
    return one_sentence(words, words.pick("", "an image of ", "scene: ") + "; ".join(parts))


def _from_the_anchor(words: Wording) -> str:
    """Writes relations with the anchor as subject.

    Example: 'One can see a blue cross and a green triangle. The blue cross is to the right of the green triangle.'
    """
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
    return sentences([f"{opening} {words.inventory()}", *facts])


def _objects_and_layout(words: Wording) -> str:
    """Writes a list of objects and a list of positions.

    Example: 'Objects: 1 blue cross, 2 green triangles. Layout: green triangles to the left of the blue cross.'
    """
    objects = ", ".join(words.counted(index) for index in words.indices())
    layout = "; ".join(f"{words.bare(index)} {words.where(index)}" for index in words.located())
    first, second = words.pick("Objects Layout", "Shapes Positions", "Contents Arrangement").split()
    text = f"{first}: {objects}. {second}: {layout}."
    return text.lower() if words.rng.random() < 0.4 else text


def _step_by_step(words: Wording) -> str:
    """Writes instructions in steps.

    Example: 'Begin with a blue cross. Then add a green triangle to the left of the blue cross.'
    """
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
    return sentences(clauses)


def _passive(words: Wording) -> str:
    """Writes statements in the passive voice.

    Example: 'A blue cross has been drawn. A green triangle has been placed to the left of the blue cross.'
    """
    one, more = words.pick("has been/have been", "is/are", "was/were").split("/")
    clauses: list[str] = []
    for index in words.indices():
        where = words.where(index)
        done = words.pick("placed", "put", "positioned", "drawn") if where else "drawn"
        clause = f"{words.a(index)} {words.verb(index, one, more)} {done} {where}".rstrip()
        clauses.append(clause if where or not clauses else f"{clause} as well")
    return sentences(clauses)


def _color_after(words: Wording) -> str:
    """Writes one sentence with colors after the nouns.

    Example: 'a cross in blue sits in the very middle, while a triangle in green lies to the left of the cross in blue'
    """
    words.color = words.pick("in", "that is")
    text = ""
    joints = (", while ", "; furthermore, ", ", and ", "; moreover, ", ", whereas ")
    for index in words.indices():
        where = words.where(index)
        name = words.a(index)
        clause = f"{name} {words.position_verb(index)} {where}" if where else f"there {words.is_(index)} {name}"
        text += (joints[index - 1] if text else "") + clause
    return one_sentence(words, text)


def _along_with(words: Wording) -> str:
    """Writes a list of objects, then statements that name shapes only.

    Example:
    'An image of a blue cross and a green triangle, along with two red stars. The triangle is left of the cross.'
    """
    *parts, last = [words.a(index) for index in words.indices()]
    joint = words.pick(", along with ", ", as well as ", ", together with ")
    clauses = [f"{words.pick('an image of', 'a drawing with', 'this scene has')} {listed(parts, ' and ')}{joint}{last}"]
    verb = words.pick("{be}", "{be} found", "can be found", "{be} located")
    for index in words.located():
        clauses.append(
            f"{words.short(index)} {verb.format(be=words.is_(index))} {words.where(index, words.short)}",
        )
    return sentences(clauses)


def _anchor_has(words: Wording) -> str:
    """Writes statements in which anchors have objects at their sides.

    Example: 'A blue cross has a green triangle on its left side. The green triangle has two red stars above it.'
    """
    clauses: list[str] = []
    for index in words.indices():
        children = words.children(index)
        introduced = words.position(index) is not None
        if words.place(index) is not None:
            place = words.pick(*PLACE_NAMES[words.place(index) or ""])
            clauses.append(f"{words.a(index)} {words.verb(index, 'occupies', 'occupy')} the {place}")
            introduced = True
        elif not introduced and not children:
            clauses.append(f"there {words.is_(index)} {'also ' if clauses else ''}{words.a(index)}")
        for number, child in enumerate(children):
            subject = words.the(index) if introduced else words.a(index)
            has = words.verb(index, "has", "have")
            clauses.append(f"{subject} {'also ' if number else ''}{has} {words.a(child)} {words.side(child)}")
            introduced = True
    return sentences(clauses)


def _request(words: Wording) -> str:
    """Writes a request or a question with conditions.

    Example: 'Please create an image with a blue cross and a green triangle. Make sure that the triangle is ...'
    """
    inventory = words.inventory()
    inverse = words.rng.random(len(words.include)) < 0.5
    if words.rng.random() < 0.5:
        facts = [words.fact(index, words.is_, bool(inverse[index])) for index in words.located()]
        facts = [f"that {fact}" for fact in facts]
        last = ", and " if len(facts) > 2 else " and "
        request = words.pick("please create an image with", "please produce an image showing", "I want an image with")
        return sentences([f"{request} {inventory}", f"make sure {listed(facts, last)}"])
    facts = [words.fact(index, lambda _: "should be", bool(inverse[index])) for index in words.located()]
    question = words.pick("could you make an image that has", "can you show me an image with")
    return f"{capitalized(question)} {inventory}? {sentences(facts)}"


def _on_which(words: Wording) -> str:
    """Writes one sentence with a relative clause.

    Example:
    'a canvas on which a green triangle lies to the left of a blue cross, and a red star sits in the very middle'
    """
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
        clauses.append(f"{words.a(index)} {words.position_verb(index)} {words.where(index, anchor)}")
        introduced.add(index)
    opening = words.pick("a canvas on which", "a simple image in which", "imagine an image where")
    return one_sentence(words, f"{opening} {listed(clauses, ', and ')}")


def _in_total(words: Wording) -> str:
    """Writes the number of objects first.

    Example:
    'Exactly three objects are visible: a cross in blue and two triangles in green. Above the cross in blue ...'
    """
    words.color = words.pick("in", "that is")
    total = words.number(words.total())
    opening = words.pick("exactly {} objects are visible", "in total there are {} shapes", "the image has {} objects")
    clauses = [f"{opening.format(total)}: {words.inventory()}"]
    for index in words.located():
        clauses.append(f"{words.where(index)} {words.is_(index)} {words.the(index)}")
    return sentences(clauses)


def _notes(words: Wording) -> str:
    """Writes short notes in parentheses.

    Example: '1 blue cross (very middle), 2 green triangles (left of the blue cross), 1 red star'
    """
    parts = []
    for index in words.indices():
        position, place = words.position(index), words.place(index)
        note = ""
        if position is not None:
            note = f" ({words.relation(position[0])} {words.the(position[1])})"
        elif place is not None:
            note = f" ({words.pick(*PLACE_NAMES[place])})"
        parts.append(words.counted(index) + note)
    text = words.pick(", ", "; ", " | ", " + ").join(parts)
    return words.pick("", f"{words.number(words.total())} shapes: ", "image: ") + text


def _areas(words: Wording) -> str:
    """Writes statements about areas of the image.

    Example: 'The image includes a blue cross. The area to the left of the blue cross holds a green triangle.'
    """
    clauses: list[str] = []
    stated = set()
    for index in words.indices():
        position, place = words.position(index), words.place(index)
        if place is not None:
            occupied = words.pick("is occupied by", "is filled by", "is taken by")
            clauses.append(f"the {words.pick(*PLACE_NAMES[place])} {occupied} {words.a(index)}")
        elif position is not None:
            relation, anchor = position
            also = "also " if position in stated else ""
            side = words.pick(*(text for text in RELATIONS[relation] if not text.startswith("on ")))
            area = f"the {words.pick('area', 'space', 'region')} {side} {words.the(anchor)}"
            clauses.append(f"{area} {also}{words.pick('holds', 'contains')} {words.a(index)}")
            stated.add(position)
        else:
            clauses.append(f"the image {'also ' if clauses else ''}includes {words.a(index)}")
    return sentences(clauses)


_STYLES: tuple[Callable[[Wording], str], ...] = (
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
"""Number of styles; valid indices in `second_phrase` are 0 .. NUM_STYLES - 1."""


def second_phrase(metadata: Metadata, rng: np.random.Generator, style: int | None = None) -> tuple[str, int]:
    """Writes a prompt in the English of the second grammar.

    Args:
      metadata: as `parse_metadata` returns it, with or without "prompt"; of the tag `complex`, with 3 to 6 objects, a
        color for every item, no two items with the same color and shape, and no item with both position and place.
      rng: chooses the words; the same state gives the same text.
      style: index of the style, below NUM_STYLES; None samples one.
    Returns: the prompt and the index of its style.
    Raises: ClvrError for metadata that the grammar cannot express.
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
    words = Wording(include, rng, digits=bool(rng.random() < 0.5))
    return _STYLES[style](words), style
