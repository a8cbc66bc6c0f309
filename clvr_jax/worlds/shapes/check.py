"""Decides whether a picture shows what a metadata asks for, by GenEval's rules.

Source: evaluation/evaluate_images.py of djghosh13/geneval (counts, exclusions, relative position); instead of its first
`count` objects of a class, any choice of objects that satisfies everything counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clvr_jax.worlds.shapes.detect import DetectedObject, Reading
from clvr_jax.worlds.shapes.grammar import counted
from clvr_jax.worlds.shapes.metadata import Metadata

_POSITION_THRESHOLD = 0.1
_DIRECTION_THRESHOLD = 0.5
_Group = tuple[DetectedObject, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether a picture is correct; if not, every reason as one short phrase."""

    correct: bool
    reasons: tuple[str, ...] = ()


def relations(subject: DetectedObject, anchor: DetectedObject) -> frozenset[str]:
    """Where the subject lies as seen from the anchor: a subset of RELATIONS; diagonal neighbors may have two.

    The offset of the centers shrinks by a tenth of both sizes; a direction counts if more than half of the full offset
    remains in it.
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
    """Compares a reading with a metadata.

    Correct means: distinct objects can be assigned to the include items so that class, color, count (at least), place
    and relations all hold (a relation between groups holds for every pair), and no exclude count is reached. Unclear
    cells count as nothing.

    Args:
      reading: what `detect` returned.
      metadata: as `parse_metadata` returns it.
    """
    reasons = _excess(reading.objects, metadata)
    if not _assign(reading.objects, metadata["include"], ()):
        reasons = [*_lacks(reading.objects, metadata["include"]), *reasons]
        if not reasons:
            reasons = ["the objects satisfy each request alone but not all together"]
    return Verdict(not reasons, tuple(reasons))


def _excess(objects: Sequence[DetectedObject], metadata: Metadata) -> list[str]:
    reasons = []
    for item in metadata.get("exclude", ()):
        found = sum(thing.shape == item["class"] for thing in objects)
        if found >= item["count"]:
            allowed = item["count"] - 1
            limit = f"at most {counted(allowed)}" if allowed else "none"
            reasons.append(f"{counted(found, item['class'])} instead of {limit}")
    return reasons


def _assign(objects: Sequence[DetectedObject], include: list[dict[str, Any]], groups: tuple[_Group, ...]) -> bool:
    """Whether the items from number len(groups) on can get groups of their own that fit the earlier ones."""
    if len(groups) == len(include):
        return True
    item = include[len(groups)]
    taken = {id(thing) for group in groups for thing in group}
    options = [thing for thing in objects if id(thing) not in taken and _matches(thing, item, place=True)]
    return any(
        _related(group, item, groups) and _assign(objects, include, (*groups, group))
        for group in itertools.combinations(options, item["count"])
    )


def _matches(thing: DetectedObject, item: dict[str, Any], place: bool) -> bool:
    return (
        thing.shape == item["class"]
        and item.get("color", thing.color) == thing.color
        and (not place or item.get("place", thing.cell) == thing.cell)
    )


def _related(group: _Group, item: dict[str, Any], groups: Sequence[_Group]) -> bool:
    if "position" not in item:
        return True
    relation, target = item["position"]
    return all(relation in relations(thing, anchor) for thing in group for anchor in groups[target])


def _lacks(objects: Sequence[DetectedObject], include: list[dict[str, Any]]) -> list[str]:
    """Reasons that can be told from one item, or from one item and its anchor."""
    reasons = []
    present = [[thing for thing in objects if _matches(thing, item, place=False)] for item in include]
    for item, things in zip(include, present, strict=True):
        if len(things) < item["count"]:
            if things:
                reasons.append(f"{_named(item, len(things))} instead of {counted(item['count'])}")
            else:
                reasons.append(f"missing: {_named(item, item['count'])}")
        elif "place" in item and item["place"] not in {thing.cell for thing in things}:
            reasons.append(f"{_named(item, 1)} not at the {item['place']}")
        elif "position" in item:
            relation, target = item["position"]
            anchor = include[target]
            possible = any(
                all(relation in relations(thing, other) for thing in group for other in others)
                for group in itertools.combinations(things, item["count"])
                for others in itertools.combinations(present[target], anchor["count"])
            )
            if len(present[target]) >= anchor["count"] and not possible:
                reasons.append(f"{_named(item, item['count'])} not {relation} {_named(anchor, anchor['count'])}")
    return reasons


def _named(item: dict[str, Any], number: int) -> str:
    """'red circle' for one, 'two red circles' for more."""
    text = counted(number, item["class"], item.get("color"))
    return text.removeprefix("one ") if number == 1 and item["count"] == 1 else text
