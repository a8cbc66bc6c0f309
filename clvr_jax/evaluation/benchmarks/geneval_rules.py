"""GenEval's rules over detections, without a model or an image.

Source: Ghosh et al. 2023 (arXiv 2310.11513); decisions as in evaluate_images.py (djghosh13/geneval at af4902f).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import UncheckedJSON

_OBJECTS = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, "
    "skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, "
    "sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, "
    "dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, "
    "toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
OBJECTS = tuple(_OBJECTS.split(", "))
"""GenEval's names of COCO's 80 classes, in COCO's order."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MOST_OBJECTS = 16
_POSITION_SLACK = 0.1
_POSITION_SHARE = 0.5


@dataclass(frozen=True)
class Detection:
    """A detected object.

    Attributes:
      box: (x0, y0, x1, y1) in pixels.
      confidence: of the detector, in [0, 1].
      color: one of COLORS; None if it was not classified.
    """

    box: tuple[float, float, float, float]
    confidence: float
    color: str | None = None


Objects = Mapping[str, Sequence[Detection]]
"""Detections by class, the most confident first."""


def keep_confident(found: Objects, tag: str) -> dict[str, list[Detection]]:
    """Returns the 16 most confident objects of each class with a confidence above .3, or .9 for the tag counting."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    objects = {}
    for name, each in found.items():
        above = sorted(
            (one for one in each if one.confidence > threshold), key=lambda one: one.confidence, reverse=True
        )
        if above:
            objects[name] = above[:MOST_OBJECTS]
    return objects


def objects_to_color(objects: Objects, metadata: UncheckedJSON) -> dict[str, int]:
    """Returns the number of objects of each class whose color is needed, most confident first.

    A class with fewer objects than its clause requires is left out, because that clause fails without colors.
    """
    return {
        clause["class"]: clause["count"]
        for clause in metadata.get("include", [])
        if "color" in clause and len(objects.get(clause["class"], ())) >= clause["count"]
    }


def check(objects: Objects, metadata: UncheckedJSON) -> tuple[bool, tuple[str, ...]]:
    """Checks an image by its metadata: every "include" clause must hold, and no "exclude" clause may hold.

    Colors and positions are those of the most confident objects, as many as the clause counts. A position refers to the
    objects of an earlier clause.

    Args:
      objects: from `keep_confident`, with colors for the objects of `objects_to_color`.
      metadata: in GenEval's format.
    Returns: whether the image is correct, and the reasons why not.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", []):
        name, count = clause["class"], clause["count"]
        seen = list(objects.get(name, ()))[:count]
        complaint = None
        if len(seen) < count:
            complaint = f"expected {count} or more of {name}, found {len(seen)}"
        elif "color" in clause and (right := sum(one.color == clause["color"] for one in seen)) < count:
            colors = ", ".join(str(one.color) for one in seen)
            complaint = f"expected {count} or more {clause['color']} {name}, found {right} ({colors})"
        elif "position" in clause:
            complaint = _position_error(name, seen, groups, clause["position"])
        groups.append(seen if complaint is None else None)
        if complaint is not None:
            reasons.append(complaint)
    for clause in metadata.get("exclude", []):
        number = len(objects.get(clause["class"], ()))
        if number >= clause["count"]:
            reasons.append(f"expected fewer than {clause['count']} of {clause['class']}, found {number}")
    return not reasons, tuple(reasons)


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Returns the position of `box` relative to `other`; both are (x0, y0, x1, y1), with y downwards.

    The distance of the centers is reduced, on each axis, by a tenth of the sum of both sizes. A direction holds if its
    reduced component is more than half of the distance.
    """
    corners = np.array([box, other], dtype=np.float64).reshape(2, 2, 2)
    centers, sizes = corners.mean(axis=1), np.abs(corners[:, 1] - corners[:, 0])
    offset = centers[0] - centers[1]
    beyond = np.maximum(np.abs(offset) - _POSITION_SLACK * sizes.sum(axis=0), 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    right, down = beyond / np.linalg.norm(offset)
    found = {
        "left of": right < -_POSITION_SHARE,
        "right of": right > _POSITION_SHARE,
        "above": down < -_POSITION_SHARE,
        "below": down > _POSITION_SHARE,
    }
    return {name for name, holds in found.items() if holds}


def check_metadata(metadata: UncheckedJSON) -> None:
    """Raises ClvrError, one line, for metadata to which the rules do not apply."""
    tag, include = metadata.get("tag"), metadata.get("include")
    if not isinstance(tag, str) or not tag or not isinstance(include, list) or not include:
        raise ClvrError("needs a tag and a list of include clauses")
    exclude = metadata.get("exclude", [])
    if not isinstance(exclude, list):
        raise ClvrError("exclude must be a list of clauses")
    for clause in [*include, *exclude]:
        name, count = (clause.get("class"), clause.get("count")) if isinstance(clause, dict) else (None, None)
        if not isinstance(name, str) or name not in OBJECTS:
            raise ClvrError(
                f"class {name!r} is none of COCO's 80; use GenEval's names, such as 'computer mouse' and 'tv remote'"
            )
        if type(count) is not int or count < 1:
            raise ClvrError(f"count of {name} must be a number from 1, got {count!r}")
    for place, clause in enumerate(include):
        if clause.get("color", COLORS[0]) not in COLORS:
            raise ClvrError(f"color {clause['color']!r} is none of {', '.join(COLORS)}")
        position = clause.get("position", [RELATIONS[0], 0] if place else None)
        if position is None and "position" not in clause:
            continue
        good = isinstance(position, list) and len(position) == 2 and position[0] in RELATIONS
        if not good or type(position[1]) is not int or not 0 <= position[1] < place:
            raise ClvrError(
                f"position {position!r} must be one of {', '.join(RELATIONS)} and the number of an earlier clause"
            )


def _position_error(
    name: str, seen: Sequence[Detection], groups: Sequence[Sequence[Detection] | None], position: Sequence[Any]
) -> str | None:
    """Returns why objects are not at their position; None if they are."""
    relation, number = position
    targets = groups[number]
    if targets is None:
        return f"nothing for {name} to be {relation}"
    for one in seen:
        for target in targets:
            places = relations(one.box, target.box)
            if relation not in places:
                return f"expected {name} {relation} the other, found {' and '.join(sorted(places)) or 'neither'}"
    return None
