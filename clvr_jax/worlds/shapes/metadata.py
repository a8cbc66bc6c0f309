"""Metadata of prompts in GenEval's format: validation, comparison, names of relations.

Metadata is a JSON object `{"tag", "include": [{"class", "count", "color"?, "position"?, "place"?}], "exclude"?:
[{"class", "count"}], "prompt"}`. "class" is a shape, "position" is `[relation, index of an earlier include item]`, and
"place", an extension of the format, is a cell. Prompts of the tag `complex` also have "tier", the number of objects;
generated prompts have "phrasing", the index of the template.
Source: the file format of djghosh13/geneval.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NotRequired, TypedDict

from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import JSON, UncheckedJSON, shown
from clvr_jax.worlds.shapes.scene import CELLS, COLORS, HELD_OUT_PAIRS, SHAPES

Item = TypedDict(
    "Item",
    {
        "class": str,
        "count": int,
        "color": NotRequired[str],
        "position": NotRequired[Any],
        "place": NotRequired[str],
    },
)
"""An item of `include` or `exclude` that was validated; "position" is the pair of a relation and an index."""
Metadata = dict[str, Any]
"""Validated metadata; unknown keys of the file are kept."""

GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TAGS = (*GENEVAL_TAGS, "complex")
RELATIONS = ("left of", "right of", "above", "below")
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_MAX_INTEGER = 10**9
_ITEM_KEYS = frozenset({"class", "count", "color", "position", "place"})


def parse_metadata(raw: UncheckedJSON) -> Metadata:
    """Validates metadata of the shapes world.

    Args:
      raw: a decoded JSON object. Unknown keys at the top level are kept, inside include and exclude they are errors.
    Returns: a copy that shares nothing with `raw`.
    Raises: ClvrError, one line that names the invalid key and the valid values. Callers add file and line.
    """
    if not isinstance(raw, Mapping):
        raise ClvrError(f"metadata must be a JSON object, got {type(raw).__name__}")
    metadata: Metadata = dict(raw)
    _one_of(metadata.get("tag"), TAGS, "tag")
    prompt = metadata.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ClvrError(f"prompt must be a non-empty text, got {shown(prompt)}")
    for key in ("tier", "phrasing"):
        if key in metadata:
            _integer(metadata[key], key, low=0)
    include = metadata.get("include")
    if not isinstance(include, list) or not include:
        raise ClvrError(f"include must be a non-empty list, got {shown(include)}")
    metadata["include"] = [_include_item(item, index) for index, item in enumerate(include)]
    needed = Counter[str]()
    for item in metadata["include"]:
        needed[item["class"]] += item["count"]
    if needed.total() > len(CELLS):
        raise ClvrError(f"include asks for {needed.total()} objects; the canvas has {len(CELLS)} cells")
    if "exclude" in metadata:
        metadata["exclude"] = _exclude_items(metadata["exclude"], needed)
    places = [item["place"] for item in metadata["include"] if "place" in item]
    if len(set(places)) < len(places):
        raise ClvrError(f"include puts two objects in one place ({', '.join(places)})")
    return metadata


def _include_item(raw: JSON, index: int) -> dict[str, Any]:
    where = f"include[{index}]"
    item = _object(raw, where, _ITEM_KEYS)
    _one_of(item.get("class"), SHAPES, f"{where}.class")
    _integer(item.get("count"), f"{where}.count", low=1)
    if "color" in item:
        _one_of(item["color"], tuple(COLORS), f"{where}.color")
    if "place" in item:
        _one_of(item["place"], CELLS, f"{where}.place")
        if item["count"] != 1:
            raise ClvrError(f"{where}.place needs count 1, got {item['count']}: a cell holds one object")
    if "position" in item:
        position = item["position"]
        if not isinstance(position, (list, tuple)) or len(position) != 2:
            raise ClvrError(f"{where}.position must be [relation, index], got {shown(position)}")
        _one_of(position[0], RELATIONS, f"{where}.position[0]")
        _integer(position[1], f"{where}.position[1]", low=0)
        if position[1] >= index:
            raise ClvrError(
                f"{where}.position[1] must be the index of an earlier item (below {index}), got {position[1]}"
            )
        item["position"] = [position[0], position[1]]
    return item


def _exclude_items(raw: JSON, needed: Counter[str]) -> list[dict[str, Any]]:
    if not isinstance(raw, list):
        raise ClvrError(f"exclude must be a list, got {shown(raw)}")
    items = []
    for index, entry in enumerate(raw):
        where = f"exclude[{index}]"
        item = _object(entry, where, frozenset({"class", "count"}))
        _one_of(item.get("class"), SHAPES, f"{where}.class")
        _integer(item.get("count"), f"{where}.count", low=1)
        if needed[item["class"]] >= item["count"]:
            raise ClvrError(
                f"{where} forbids {item['count']} of {item['class']} but include asks for {needed[item['class']]}"
            )
        items.append(item)
    return items


def _object(raw: JSON, where: str, keys: frozenset[str]) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise ClvrError(f"{where} must be a JSON object, got {shown(raw)}")
    unknown = sorted(set(raw) - keys)
    if unknown:
        raise ClvrError(
            f"{where} has unknown keys {', '.join(map(str, unknown))[:200]}; known: {', '.join(sorted(keys))}"
        )
    return dict(raw)


def _one_of(value: JSON, known: tuple[str, ...], where: str) -> None:
    if not isinstance(value, str) or value not in known:
        raise ClvrError(f"{where} must be one of {', '.join(known)}; got {shown(value)}")


def _integer(value: JSON, where: str, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= _MAX_INTEGER:
        raise ClvrError(f"{where} must be a whole number of at least {low}, got {shown(value)}")


def colored_pairs(metadata: Metadata) -> Iterator[tuple[str, str]]:
    """Returns the (color, shape) pairs that the metadata names."""
    return ((item["color"], item["class"]) for item in metadata["include"] if "color" in item)


def has_held_out_pair(metadata: Metadata) -> bool:
    """Returns whether the metadata names one of HELD_OUT_PAIRS."""
    return any(pair in HELD_OUT_PAIRS for pair in colored_pairs(metadata))


def canonical_key(metadata: Metadata) -> str:
    """Returns a text that is equal for all metadata that ask for the same image.

    It does not depend on prompt, tag, phrasing, the order of the items, or the direction in which a relation is written
    ("a left of b", "b right of a"). Items with the same color and shape are distinguished by count and place only.
    """
    labels = [
        [item.get("color", ""), item["class"], item["count"], item.get("place", "")] for item in metadata["include"]
    ]
    relations = []
    for label, item in zip(labels, metadata["include"], strict=True):
        if "position" in item:
            relation, target = item["position"][0], labels[item["position"][1]]
            if relation in ("right of", "below"):
                relations.append([target, _INVERSE[relation], label])
            else:
                relations.append([label, relation, target])
    exclude = sorted([item["class"], item["count"]] for item in metadata.get("exclude", ()))
    return json.dumps([sorted(labels), sorted(relations), exclude], separators=(",", ":"))
