"""Decides whether an image shows what the metadata of a prompt asks for, by GenEval's rules.

Source: evaluation/evaluate_images.py of djghosh13/geneval (counts, exclusions, relative position). GenEval takes the
first `count` objects of a class; here the image is correct if any choice of objects satisfies all items.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from clvr_jax.worlds.shapes.detect import DetectedObject, Reading
from clvr_jax.worlds.shapes.language.grammar import counted
from clvr_jax.worlds.shapes.metadata import Item, Metadata

_POSITION_THRESHOLD = 0.1
_DIRECTION_THRESHOLD = 0.5
_Group = tuple[DetectedObject, ...]


@dataclass(frozen=True)
class Verdict:
    """The result of a check.

    Attributes:
      correct: whether the image is correct.
      reasons: one short phrase for each reason why it is not; () if it is.
    """

    correct: bool
    reasons: tuple[str, ...] = ()


def relations(subject: DetectedObject, anchor: DetectedObject) -> frozenset[str]:
    """Returns the relations of the subject to the anchor, a subset of RELATIONS; diagonal neighbors may have two.

    The offset of the centers is reduced by a tenth of both sizes. A relation holds if more than half of the full offset
    remains in its direction.
    """
    offsets = (subject.x - anchor.x, subject.y - anchor.y)
    distance = math.hypot(*offsets)
    slack = _POSITION_THRESHOLD * 2 * (subject.radius + anchor.radius)
    dx, dy = (math.copysign(max(abs(offset) - slack, 0.0), offset) / max(distance, 1e-9) for offset in offsets)
    found = {
        "left of": dx < -_DIRECTION_THRESHOLD,
        "right of": dx > _DIRECTION_THRESHOLD,
        "above": dy < -_DIRECTION_THRESHOLD,
        "below": dy > _DIRECTION_THRESHOLD,
    }
    return frozenset(name for name, true in found.items() if true)


def check(reading: Reading, metadata: Metadata) -> Verdict:
    """Checks the detected objects of an image against the metadata of a prompt.

    An image is correct if distinct objects can be assigned to the include items so that class, color, count (at least),
    place and relations all hold (a relation between groups holds for every pair), and no exclude count is reached.
    Unclear cells are ignored.

    Args:
      reading: the detected objects, see `detect`.
      metadata: as `parse_metadata` returns it.
    Returns: the verdict with all reasons.
    """
    reasons = _excess(reading.objects, metadata)
    if not _assign(reading.objects, metadata["include"], ()):
        reasons = [*_lacks(reading.objects, metadata["include"]), *reasons]
        if not reasons:
            reasons = ["the objects satisfy each request alone but not all together"]
    return Verdict(not reasons, tuple(reasons))


def _excess(objects: Sequence[DetectedObject], metadata: Metadata) -> list[str]:
    """Returns the reasons for which the exclude list is violated."""
    reasons = []
    for item in metadata.get("exclude", ()):
        found = sum(obj.shape == item["class"] for obj in objects)
        if found >= item["count"]:
            allowed = item["count"] - 1
            limit = f"at most {counted(allowed)}" if allowed else "none"
            reasons.append(f"{counted(found, item['class'])} instead of {limit}")
    return reasons


def _assign(objects: Sequence[DetectedObject], include: list[Item], groups: tuple[_Group, ...]) -> bool:
    """Returns whether the items from index len(groups) on can be assigned groups that fit the earlier ones."""
    if len(groups) == len(include):
        return True
    item = include[len(groups)]
    taken = {id(obj) for group in groups for obj in group}
    options = [obj for obj in objects if id(obj) not in taken and _matches(obj, item, place=True)]
    return any(
        _related(group, item, groups) and _assign(objects, include, (*groups, group))
        for group in itertools.combinations(options, item["count"])
    )


def _matches(obj: DetectedObject, item: Item, place: bool) -> bool:
    """Returns whether an object has the class and color of an item, and with `place` its place."""
    return (
        obj.shape == item["class"]
        and item.get("color", obj.color) == obj.color
        and (not place or item.get("place", obj.cell) == obj.cell)
    )


def _related(group: _Group, item: Item, groups: Sequence[_Group]) -> bool:
    """Returns whether the relation of an item holds between a group and the group of its anchor."""
    if "position" not in item:
        return True
    relation, target = item["position"]
    return all(relation in relations(obj, anchor) for obj in group for anchor in groups[target])


def _lacks(objects: Sequence[DetectedObject], include: list[Item]) -> list[str]:
    """Returns the reasons that follow from one item, or from one item and its anchor."""
    reasons = []
    present = [[obj for obj in objects if _matches(obj, item, place=False)] for item in include]
    for item, matching in zip(include, present, strict=True):
        if len(matching) < item["count"]:
            if matching:
                reasons.append(f"{_named(item, len(matching))} instead of {counted(item['count'])}")
            else:
                reasons.append(f"missing: {_named(item, item['count'])}")
        elif "place" in item and item["place"] not in {obj.cell for obj in matching}:
            reasons.append(f"{_named(item, 1)} not at the {item['place']}")
        elif "position" in item:
            relation, target = item["position"]
            anchor = include[target]
            possible = any(
                all(relation in relations(obj, other) for obj in group for other in others)
                for group in itertools.combinations(matching, item["count"])
                for others in itertools.combinations(present[target], anchor["count"])
            )
            if len(present[target]) >= anchor["count"] and not possible:
                reasons.append(f"{_named(item, item['count'])} not {relation} {_named(anchor, anchor['count'])}")
    return reasons


def _named(item: Item, number: int) -> str:
    """Returns 'red circle' for one object, 'two red circles' for more."""
    text = counted(number, item["class"], item.get("color"))
    return text.removeprefix("one ") if number == 1 and item["count"] == 1 else text
