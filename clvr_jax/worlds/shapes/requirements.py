"""Requirements of a prompt of the shapes world, and exact answers to them: what the small verifier learns, and how it
is measured.

A requirement is one line in the words of plans: "red star top left", "two blue circles", "green cross left of two blue
circles", and "four objects", the number of all objects, which nothing unclear may disturb. An answer is evidence quoted
from a description of the image, then yes or no.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from clvr_jax.worlds.shapes.detect import Reading
from clvr_jax.worlds.shapes.grammar import counted
from clvr_jax.worlds.shapes.layout import counts
from clvr_jax.worlds.shapes.metadata import Metadata
from clvr_jax.worlds.shapes.scene import CELLS

_UNCLEAR = "something unclear"


@dataclass(frozen=True)
class Thing:
    """Some objects of one kind: how many at least, their shape, and their color unless it is free."""

    count: int
    shape: str
    color: str | None = None

    def __str__(self) -> str:
        return counted(self.count, self.shape, self.color).removeprefix("one ")

    @property
    def absent(self) -> str:
        """Says that there is none: "no red star"."""
        return "no " + " ".join(part for part in (self.color, self.shape) if part)


@dataclass(frozen=True)
class ShapesRequirement:
    """One thing that a prompt asks for.

    Attributes:
      thing: what must be there; None for the requirement on the number of all objects.
      cell: where, or None.
      relation: the relation to `anchor`, or None.
      anchor: what the relation refers to.
      total: the number of all objects, only if `thing` is None.
    """

    thing: Thing | None = None
    cell: str | None = None
    relation: str | None = None
    anchor: Thing | None = None
    total: int = 0

    def __str__(self) -> str:
        if self.thing is None:
            return total_objects(self.total)
        if self.relation:
            return f"{self.thing} {self.relation} {self.anchor}"
        return f"{self.thing} {self.cell}" if self.cell else str(self.thing)


def total_objects(number: int) -> str:
    """Names a number of objects of any kind: "four objects"."""
    return f"{counted(number)} {'object' if number == 1 else 'objects'}" if number else "no object"


def requirements(metadata: Metadata) -> tuple[ShapesRequirement, ...]:
    """Derives the requirements of a prompt from its metadata.

    Returns: one requirement for each item of the include list (two if it has both a place and a relation), in order,
      and the number of all objects at the end: an image that shows more than was asked for is not what was asked for.
    """
    include = metadata["include"]
    things = [Thing(item["count"], item["class"], item.get("color")) for item in include]
    found = []
    for item, thing in zip(include, things, strict=True):
        if "place" in item or "position" not in item:
            found.append(ShapesRequirement(thing, item.get("place")))
        if "position" in item:
            relation, target = item["position"]
            found.append(ShapesRequirement(thing, None, relation, things[target]))
    return (*found, ShapesRequirement(total=sum(item["count"] for item in include)))


def describe(reading: Reading) -> str:
    """Describes an image in words: "I see red star top left; something unclear top."."""
    clear = {item.cell: str(item) for item in reading.objects}
    seen = [clear.get(cell, f"{_UNCLEAR} {cell}") for cell in CELLS if cell in clear or cell in reading.unclear]
    return f"I see {'; '.join(seen) or 'nothing'}."


def check_requirement(requirement: ShapesRequirement, reading: Reading) -> tuple[str, bool]:
    """Holds a requirement against what an image shows.

    A relation is judged by cells, see `counts`: an object diagonally beside its anchor counts, as for the checker. The
    evidence for the number of all objects counts them one by one, "one: red star top left; two: blue circle top", which
    a small model learns where it fails to count at a glance.

    Returns: the evidence in words, and whether the requirement is met.
    """
    if requirement.thing is None:
        return _enumerated(reading), len(reading.objects) == requirement.total and not reading.unclear
    if requirement.cell:
        clear = {item.cell: item for item in reading.objects}
        item = clear.get(requirement.cell)
        if item is None:
            kind = _UNCLEAR if requirement.cell in reading.unclear else "nothing"
            return f"{kind} {requirement.cell}", False
        return str(item), item.shape == requirement.thing.shape and requirement.thing.color in (None, item.color)
    own = _cells(requirement.thing, reading)
    evidence = [*_shown(requirement.thing, reading)]
    if requirement.relation is None or requirement.anchor is None:
        return "; ".join(evidence), len(own) >= requirement.thing.count
    anchors = _cells(requirement.anchor, reading)
    evidence += _shown(requirement.anchor, reading)
    met = any(
        all(counts(requirement.relation, cell, anchor) for cell in chosen for anchor in held)
        for held in itertools.combinations(anchors, requirement.anchor.count)
        for chosen in itertools.combinations([cell for cell in own if cell not in held], requirement.thing.count)
    )
    return "; ".join(evidence), met


def _enumerated(reading: Reading) -> str:
    """Counts the clear objects one by one, in the order of the description or the plan."""
    numbers = itertools.count(1)
    items = []
    for item in _seen(reading):
        items.append(item if item.startswith(_UNCLEAR) else f"{counted(next(numbers))}: {item}")
    return "; ".join(items) or "nothing"


def _seen(reading: Reading) -> list[str]:
    """Names the objects of a reading and its unclear cells; in reading order if there are unclear cells."""
    if not reading.unclear:
        return [str(item) for item in reading.objects]
    clear = {item.cell: str(item) for item in reading.objects}
    return [clear.get(cell, f"{_UNCLEAR} {cell}") for cell in CELLS if cell in clear or cell in reading.unclear]


def _cells(thing: Thing, reading: Reading) -> list[str]:
    return [item.cell for item in reading.objects if item.shape == thing.shape and thing.color in (None, item.color)]


def _shown(thing: Thing, reading: Reading) -> Sequence[str]:
    found = [str(item) for item in reading.objects if item.shape == thing.shape and thing.color in (None, item.color)]
    return found or [thing.absent]
