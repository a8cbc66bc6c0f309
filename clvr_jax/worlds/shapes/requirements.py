"""Requirements of a prompt of the shapes world and exact answers to them, to train and evaluate the small verifier.

A requirement is one line in the words of plans: "red star top left", "two blue circles", "green cross left of two blue
circles", or "four objects", the number of all objects, which is unmet if anything is unclear. An answer is evidence
quoted from a description of the image, then yes or no.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from clvr_jax.worlds.shapes.detect import Reading
from clvr_jax.worlds.shapes.language.grammar import counted
from clvr_jax.worlds.shapes.layout import counts
from clvr_jax.worlds.shapes.metadata import Metadata
from clvr_jax.worlds.shapes.scene import CELLS

_UNCLEAR = "something unclear"


@dataclass(frozen=True)
class ObjectGroup:
    """Objects of one kind.

    Attributes:
      count: least number of them.
      shape: their shape, one of SHAPES.
      color: their color, one of COLORS, or None for any.
    """

    count: int
    shape: str
    color: str | None = None

    def __str__(self) -> str:
        return counted(self.count, self.shape, self.color).removeprefix("one ")

    @property
    def absent(self) -> str:
        """The phrase for their absence: "no red star"."""
        return "no " + " ".join(part for part in (self.color, self.shape) if part)


@dataclass(frozen=True)
class ShapesRequirement:
    """A requirement of a prompt.

    Attributes:
      group: the objects required; None for a requirement on the number of all objects.
      cell: the cell that they must be in, or None.
      relation: the relation to `anchor`, or None.
      anchor: the objects to which the relation refers.
      total: the number of all objects, only if `group` is None.
    """

    group: ObjectGroup | None = None
    cell: str | None = None
    relation: str | None = None
    anchor: ObjectGroup | None = None
    total: int = 0

    def __str__(self) -> str:
        if self.group is None:
            return total_objects(self.total)
        if self.relation:
            return f"{self.group} {self.relation} {self.anchor}"
        return f"{self.group} {self.cell}" if self.cell else str(self.group)


def total_objects(number: int) -> str:
    """Returns the phrase for a number of objects of any kind: "four objects"."""
    return f"{counted(number)} {'object' if number == 1 else 'objects'}" if number else "no object"


def requirements(metadata: Metadata) -> tuple[ShapesRequirement, ...]:
    """Derives the requirements of a prompt from its metadata.

    Returns: one requirement for each item of the include list (two if it has both a place and a relation), in order,
      and the number of all objects at the end, so that an image with additional objects is wrong.
    """
    include = metadata["include"]
    groups = [ObjectGroup(item["count"], item["class"], item.get("color")) for item in include]
    found = []
    for item, group in zip(include, groups, strict=True):
        if "place" in item or "position" not in item:
            found.append(ShapesRequirement(group, item.get("place")))
        if "position" in item:
            relation, target = item["position"]
            found.append(ShapesRequirement(group, None, relation, groups[target]))
    return (*found, ShapesRequirement(total=sum(item["count"] for item in include)))


def describe(reading: Reading) -> str:
    """Describes an image in words: "I see red star top left; something unclear top."."""
    clear = {item.cell: str(item) for item in reading.objects}
    seen = [clear.get(cell, f"{_UNCLEAR} {cell}") for cell in CELLS if cell in clear or cell in reading.unclear]
    return f"I see {'; '.join(seen) or 'nothing'}."


def check_requirement(requirement: ShapesRequirement, reading: Reading) -> tuple[str, bool]:
    """Checks a requirement against the detected content of an image.

    A relation is decided by cells, see `counts`: an object diagonally next to its anchor is accepted, as in `check`.
    The evidence for the number of all objects counts them one by one, "one: red star top left; two: blue circle top": a
    small model learns this, but not to name the number at once.

    Returns: the evidence in words, and whether the requirement is met.
    """
    if requirement.group is None:
        return _enumerated(reading), len(reading.objects) == requirement.total and not reading.unclear
    if requirement.cell:
        clear = {item.cell: item for item in reading.objects}
        item = clear.get(requirement.cell)
        if item is None:
            kind = _UNCLEAR if requirement.cell in reading.unclear else "nothing"
            return f"{kind} {requirement.cell}", False
        return str(item), item.shape == requirement.group.shape and requirement.group.color in (None, item.color)
    own = _cells(requirement.group, reading)
    evidence = [*_shown(requirement.group, reading)]
    if requirement.relation is None or requirement.anchor is None:
        return "; ".join(evidence), len(own) >= requirement.group.count
    anchors = _cells(requirement.anchor, reading)
    evidence += _shown(requirement.anchor, reading)
    met = any(
        all(counts(requirement.relation, cell, anchor) for cell in chosen for anchor in held)
        for held in itertools.combinations(anchors, requirement.anchor.count)
        for chosen in itertools.combinations([cell for cell in own if cell not in held], requirement.group.count)
    )
    return "; ".join(evidence), met


def _enumerated(reading: Reading) -> str:
    """Lists the clear objects with their numbers, in the order of the description or the plan."""
    numbers = itertools.count(1)
    items = []
    for item in _seen(reading):
        items.append(item if item.startswith(_UNCLEAR) else f"{counted(next(numbers))}: {item}")
    return "; ".join(items) or "nothing"


def _seen(reading: Reading) -> list[str]:
    """Returns the phrases of all objects and unclear cells; in reading order if there are unclear cells."""
    if not reading.unclear:
        return [str(item) for item in reading.objects]
    clear = {item.cell: str(item) for item in reading.objects}
    return [clear.get(cell, f"{_UNCLEAR} {cell}") for cell in CELLS if cell in clear or cell in reading.unclear]


def _cells(group: ObjectGroup, reading: Reading) -> list[str]:
    return [item.cell for item in reading.objects if item.shape == group.shape and group.color in (None, item.color)]


def _shown(group: ObjectGroup, reading: Reading) -> Sequence[str]:
    found = [str(item) for item in reading.objects if item.shape == group.shape and group.color in (None, item.color)]
    return found or [group.absent]
