"""Wide phrasings of training prompts: the same requests as `grammar`, told in many more ways.

A model that has only read the seven templates of `grammar` reads nothing else. Here the relation may stand before or
after its subject, be told from the side of the anchor, or refer to a pronoun; objects are listed first, or introduced
one sentence at a time, in an order of their own. The evaluation set "second" has a grammar of its own, which must never
be copied from here or to here.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from clvr_jax.worlds.shapes.grammar import sample_metadata
from clvr_jax.worlds.shapes.metadata import Metadata

Item = dict[str, Any]

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_OPENERS = (
    "", "", "", "a photo of ", "a picture of ", "an image of ", "please draw ", "i want ", "make a picture with ",
    "create an image with ", "generate ", "an illustration showing ", "a drawing with ", "show ", "i need ", "paint ",
    "a simple graphic of ", "a plain canvas with ", "a scene with ", "could you draw ",
)  # fmt: skip
_ENDINGS = (
    "",
    "",
    "",
    " on a plain background",
    " on an empty canvas",
    " on a light background",
    " on white",
    ", please",
)
_RELATIONS = {
    "left of": ("left of", "to the left of", "on the left of", "on the left side of", "at the left of", "just left of"),
    "right of": ("right of", "to the right of", "on the right of", "on the right side of", "at the right of",
                 "just right of"),
    "above": ("above", "over", "on top of", "directly above", "somewhere above", "right above"),
    "below": ("below", "under", "underneath", "directly below", "somewhere below", "right below"),
}  # fmt: skip
_ITS_SIDE = {
    "left of": ("to {its} left", "on {its} left"),
    "right of": ("to {its} right", "on {its} right"),
    "above": ("above {it}", "over {it}"),
    "below": ("below {it}", "under {it}"),
}
_VERTICAL = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}
_PLACES = {
    "top": ("at the top", "at the top center", "in the top middle", "in the middle of the top row", "at the very top"),
    "left": ("at the left", "on the left", "on the left side", "at the left edge", "in the middle left"),
    "center": ("in the center", "in the middle", "at the center", "in the central spot", "right in the middle"),
    "right": ("at the right", "on the right", "on the right side", "at the right edge", "in the middle right"),
    "bottom": ("at the bottom", "at the bottom center", "in the bottom middle", "in the middle of the bottom row",
               "at the very bottom"),
}  # fmt: skip
_VERBS = ("placed", "put", "drawn", "set", "located", "positioned", "shown")
_ORDERS = ("place", "put", "draw", "add", "paint", "set", "position")
_ALSO = ("there {is_} also {a}", "also {a}", "add {a}", "include {a}", "{a} {is_} in it too")
_JOINTS = (", ", ", and ", "; ", " and ", ", plus ", ", then ", ", with ", ", next to that ")


def wide_metadata(
    rng: np.random.Generator, tier: int | None = None, min_relations: int = 0, allow_held_out: bool = False
) -> Metadata:
    """Draws a request of the tag `complex` and tells it in one of the wide phrasings.

    Args:
      rng: numpy generator.
      tier: number of objects, of TIERS or DENSE_TIERS; None draws one of TIERS.
      min_relations: the least number of relations; it must be possible for the tier.
      allow_held_out: may name HELD_OUT_PAIRS; never set it for training data.
    Returns: metadata whose include list is in the order in which the prompt introduces the objects, anchors first.
    """
    while True:
        metadata = sample_metadata(rng, "complex", tier, allow_held_out)
        if sum("position" in item for item in metadata["include"]) >= min_relations:
            break
    return rephrase(metadata, rng)


def rephrase(metadata: Metadata, rng: np.random.Generator) -> Metadata:
    """Tells a `complex` request in a wide phrasing; "phrasing" is the index into `STYLES`."""
    metadata = copy.deepcopy(metadata)
    if rng.random() < 0.35:
        metadata["include"] = _reordered(metadata["include"], rng)
    style = int(rng.integers(len(STYLES)))
    text = STYLES[style](metadata["include"], rng)
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.3:
        text = text.rstrip(".")
    metadata["prompt"], metadata["phrasing"] = text, style
    return metadata


def _reordered(include: list[Item], rng: np.random.Generator) -> list[Item]:
    """The items in another order, each still after the anchor of its relation."""
    order: list[int] = []

    def add(index: int) -> None:
        if index not in order:
            if "position" in include[index]:
                add(include[index]["position"][1])
            order.append(index)

    for index in rng.permutation(len(include)):
        add(int(index))
    items = [dict(include[index]) for index in order]
    for item in items:
        if "position" in item:
            item["position"] = [item["position"][0], order.index(item["position"][1])]
    return items


def _pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _noun(item: Item, rng: np.random.Generator) -> str:
    """Color and shape without number: "red star", "star in red"."""
    shape = item["class"] if item["count"] == 1 else _PLURALS[item["class"]]
    if "color" not in item:
        return shape
    if rng.random() < 0.15:
        be = "is" if item["count"] == 1 else "are"
        return f"{shape} {_pick(rng, ('in', 'of color', f'that {be}', 'colored'))} {item['color']}"
    return f"{item['color']} {shape}"


def _a(item: Item, rng: np.random.Generator) -> str:
    noun = _noun(item, rng)
    if item["count"] == 1:
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" if rng.random() < 0.93 else f"one {noun}"
    number = _NUMBERS[item["count"] - 1]
    if rng.random() < 0.15:
        number = str(item["count"])
    elif item["count"] == 2 and rng.random() < 0.1:
        number = "a pair of"
    return f"{number} {noun}"


def _the(item: Item, rng: np.random.Generator) -> str:
    count = "" if item["count"] == 1 or rng.random() < 0.4 else _NUMBERS[item["count"] - 1] + " "
    shape = item["class"] if item["count"] == 1 else _PLURALS[item["class"]]
    return f"the {count}{item['color'] + ' ' if 'color' in item else ''}{shape}"


def _be(item: Item) -> str:
    return "is" if item["count"] == 1 else "are"


def _place(cell: str, rng: np.random.Generator) -> str:
    if cell in _PLACES:
        return _pick(rng, _PLACES[cell])
    vertical, horizontal = cell.split()
    vertical = _pick(rng, _VERTICAL[vertical])
    return _pick(
        rng, ("at the {} {}", "in the {} {} corner", "in the {} {}", "in the {}-{} corner", "to the {} {}")
    ).format(vertical, horizontal)


def _where(item: Item, include: list[Item], rng: np.random.Generator) -> str:
    """Where the item is, possibly nothing."""
    parts = []
    if "place" in item:
        parts.append(_place(item["place"], rng))
    if "position" in item:
        relation, target = item["position"]
        parts.append(f"{_pick(rng, _RELATIONS[relation])} {_the(include[target], rng)}")
    return " and ".join(parts)


def _its(item: Item, relation: str, rng: np.random.Generator) -> str:
    words = {"its": "its", "it": "it"} if item["count"] == 1 else {"its": "their", "it": "them"}
    return _pick(rng, _ITS_SIDE[relation]).format(**words)


def _clause(index: int, include: list[Item], rng: np.random.Generator, known: bool = False) -> str:
    """A clause that introduces an item, or only places it if it is `known`."""
    item = include[index]
    where = _where(item, include, rng)
    subject = _the(item, rng) if known else _a(item, rng)
    if not where:
        return _pick(rng, _ALSO).format(a=subject, is_=_be(item))
    options = [
        f"{subject} {_be(item)} {where}",
        f"{subject} {_be(item)} {_pick(rng, _VERBS)} {where}",
        f"{_pick(rng, _ORDERS)} {subject} {where}",
        f"{where} {_be(item)} {subject}",
        f"{where}, {'' if known else f'there {_be(item)} '}{subject}",
    ]
    if not known:
        options.append(f"there {_be(item)} {subject} {where}")
    if "position" in item and "place" not in item:
        relation, target = item["position"]
        anchor = include[target]
        inverse = _pick(rng, _RELATIONS[_INVERSE[relation]])
        options.append(f"{_the(anchor, rng)} {_be(anchor)} {inverse} {subject}")
        has = "has" if anchor["count"] == 1 else "have"
        options.append(f"{_the(anchor, rng)} {has} {subject} {_its(anchor, relation, rng)}")
        if target == index - 1 and not known:
            options.append(f"{_its(anchor, relation, rng)}, there {_be(item)} {subject}")
            options.append(f"{subject} {_be(item)} {_its(anchor, relation, rng)}")
    return _pick(rng, options)


def _listed(parts: list[str], rng: np.random.Generator) -> str:
    last = _pick(rng, (", and ", " and ", ", ", " as well as ", " plus "))
    return last.join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _inline(include: list[Item], rng: np.random.Generator) -> str:
    """One sentence of noun phrases, each with its place after or before it."""
    texts = []
    for item in include:
        where, subject = _where(item, include, rng), _a(item, rng)
        texts.append(f"{where} {subject}" if where and rng.random() < 0.2 else f"{subject} {where}".rstrip())
    joint = _pick(rng, _JOINTS)
    text = joint.join(texts) if rng.random() < 0.5 else ", ".join(texts[:-1]) + ", and " + texts[-1]
    return _pick(rng, _OPENERS) + text + _pick(rng, _ENDINGS)


def _sentences(include: list[Item], rng: np.random.Generator) -> str:
    """One sentence for each item."""
    clauses = [_clause(index, include, rng) for index in range(len(include))]
    if rng.random() < 0.5:
        clauses = [clause[0].upper() + clause[1:] for clause in clauses]
    return ". ".join(clauses) + "."


def _one_sentence(include: list[Item], rng: np.random.Generator) -> str:
    """All clauses joined into one sentence."""
    joint = _pick(rng, ("; ", ", ", ", and ", ", while ", ", then "))
    return joint.join(_clause(index, include, rng) for index in range(len(include))) + _pick(rng, ("", "."))


def _objects_first(include: list[Item], rng: np.random.Generator) -> str:
    """The objects first, then where they are, in any order."""
    head = _pick(rng, _OPENERS) + _listed([_a(item, rng) for item in include], rng) + "."
    placed = [index for index, item in enumerate(include) if "place" in item or "position" in item]
    if rng.random() < 0.4:
        placed = [int(index) for index in rng.permutation(placed)]
    joint = _pick(rng, (". ", "; ", ", ", " and "))
    return f"{head} {joint.join(_clause(index, include, rng, known=True) for index in placed)}."


def _labeled(include: list[Item], rng: np.random.Generator) -> str:
    """A list with a label for each item."""
    dash = _pick(rng, (": ", " - ", ", ", " "))
    joint = _pick(rng, ("; ", ". ", ", ", "\n"))
    parts = []
    for item in include:
        where = _where(item, include, rng)
        subject = _a(item, rng) if rng.random() < 0.5 else _a(item, rng).removeprefix("a ").removeprefix("an ")
        parts.append(f"{subject}{dash}{where}" if where else subject)
    return _pick(rng, ("", "", "objects: ", "draw this: ", "list: ")) + joint.join(parts)


def _nested(include: list[Item], rng: np.random.Generator) -> str:
    """An anchor together with what stands around it: "a red star with a blue circle to its left"."""
    told: set[int] = set()
    groups = []
    for index, item in enumerate(include):
        if index in told:
            continue
        told.add(index)
        where = _where(item, include, rng)
        around = [
            other
            for other in range(index + 1, len(include))
            if other not in told
            and "place" not in include[other]
            and include[other].get("position", [0, -1])[1] == index
        ]
        text = f"{_a(item, rng)} {where}".rstrip()
        if around:
            told.update(around)
            sides = [f"{_a(include[o], rng)} {_its(item, include[o]['position'][0], rng)}" for o in around]
            text += f" {_pick(rng, ('with', 'that has', 'having'))} " + _listed(sides, rng)
        groups.append(text)
    return _pick(rng, _OPENERS) + _pick(rng, (", ", "; ", ". also ", ", and ")).join(groups)


STYLES = (_inline, _sentences, _one_sentence, _objects_first, _labeled, _nested)
"""Each turns an include list into a prompt."""
