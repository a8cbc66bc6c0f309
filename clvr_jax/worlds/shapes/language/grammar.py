"""The first grammar of prompts: samples metadata and writes English prompts for them.

Each tag has several phrasings, `len(PHRASINGS[tag])` in number; the index of the one used is stored in the metadata, so
that results can be broken down by phrasing. The vocabulary is closed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.worlds.shapes.layout import holds, plan
from clvr_jax.worlds.shapes.metadata import RELATIONS, TAGS, Item, Metadata
from clvr_jax.worlds.shapes.scene import CELLS, COLORS, SHAPES, Scene, place, sample_pair

Option = TypeVar("Option")

TIERS = (3, 4, 5, 6)
DENSE_TIERS = (7, 8, 9)
"""Numbers of objects that nearly fill the nine cells; they are sampled only on request."""
_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}
_PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
_ENDINGS = ("", " on a plain background", " on an empty canvas", " on a light background")
_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_PLACE_WORDS = {
    "top left": ("at the top left", "in the top left corner"),
    "top": ("at the top",),
    "top right": ("at the top right", "in the top right corner"),
    "left": ("at the left", "on the left"),
    "center": ("in the center", "in the middle"),
    "right": ("at the right", "on the right"),
    "bottom left": ("at the bottom left", "in the bottom left corner"),
    "bottom": ("at the bottom",),
    "bottom right": ("at the bottom right", "in the bottom right corner"),
}
_ONE = (
    "a photo of {a}{end}",
    "a picture of {a}{end}",
    "an image of {a}{end}",
    "a drawing of {a}{end}",
    "draw {a}{end}",
    "show {a}{end}",
    "{a}{end}",
    "paint {a}{end}",
    "there is {a}{end}",
    "a simple picture with {a}{end}",
)
_TWO = (
    "a photo of {a} and {b}{end}",
    "a picture of {a} and {b}{end}",
    "{a} and {b}{end}",
    "draw {a} and {b}{end}",
    "an image with {a} and {b}{end}",
    "show {a} together with {b}{end}",
    "there is {a} and there is {b}{end}",
    "both {a} and {b}{end}",
)
PHRASINGS: dict[str, tuple[str, ...]] = {
    "single_object": _ONE,
    "two_object": _TWO,
    "counting": (
        "a photo of {a}{end}",
        "{a}{end}",
        "a picture of {a}{end}",
        "draw {a}{end}",
        "show exactly {a}{end}",
        "there are {a}{end}",
        "exactly {a}{end}",
        "an image with {a}{end}",
    ),
    "colors": _ONE,
    "position": (
        "a photo of {a} {rel} {b}{end}",
        "{a} {rel} {b}{end}",
        "draw {a} {rel} {b}{end}",
        "a picture with {a} {rel} {b}{end}",
        "{b} with {a} {rel} it{end}",
        "there is {a} {rel} {b}{end}",
        "{b} and, {rel} it, {a}{end}",
        "show {b} and put {a} {rel} it{end}",
    ),
    "color_attr": _TWO,
    # One function of `_COMPLEX` for each of these joins the items.
    "complex": (
        "{items}{end}",
        "a photo of {items}{end}",
        "there is {item}. there is {item}.",
        "draw {item}, then {item}{end}",
        "a picture with {objects}. {object} is {where}.",
        "put {object} {where}; add {object}{end}",
        "{object} is {where}. there is also {object}.",
    ),
}


def vocabulary() -> frozenset[str]:
    """Returns all words, in lower case, that generated prompts use."""
    texts = [*_ENDINGS, *COLORS, *SHAPES, *_PLURALS.values(), *(_NUMBERS[n] for n in (2, 3, 4)), "a an and the are"]
    texts += [text for group in (*_RELATION_WORDS.values(), *_PLACE_WORDS.values()) for text in group]
    texts += [re.sub(r"\{\w+\}", " ", text) for group in PHRASINGS.values() for text in group]
    return frozenset(words(" ".join(texts)))


def words(prompt: str) -> list[str]:
    """Returns the words of a prompt in lower case, without punctuation."""
    return re.findall(r"[a-z0-9]+", prompt.lower())


def sample_metadata(
    rng: np.random.Generator,
    tag: str,
    tier: int | None = None,
    allow_held_out: bool = False,
    phrasing: int | None = None,
) -> Metadata:
    """Samples metadata with a prompt that can be satisfied.

    Args:
      rng: numpy generator.
      tag: one of TAGS.
      tier: number of objects, one of TIERS or DENSE_TIERS; only for `complex`, None samples one of TIERS.
      allow_held_out: the prompt may name HELD_OUT_PAIRS; never set it for training data.
      phrasing: index into PHRASINGS[tag]; None samples one.
    Returns: metadata as `parse_metadata` returns it.
    Raises: ClvrError for an unknown tag, tier or phrasing.
    """
    if tag not in TAGS:
        raise ClvrError(f"sample_metadata: unknown tag {tag!r}; known: {', '.join(TAGS)}")
    if tier is not None and (tag != "complex" or tier not in TIERS + DENSE_TIERS):
        raise ClvrError(f"sample_metadata: tier {tier!r} needs the tag complex and one of {TIERS + DENSE_TIERS}")
    if tag == "complex":
        metadata = sample_complex(rng, _pick(rng, TIERS) if tier is None else tier, allow_held_out)
    else:
        metadata = _sample_simple(rng, tag, allow_held_out)
    metadata["phrasing"] = _phrasing_index(rng, tag, phrasing)
    metadata["prompt"] = phrase(metadata, rng, metadata["phrasing"])
    return metadata


def scene_for(metadata: Metadata, rng: np.random.Generator, allow_held_out: bool = False) -> Scene:
    """Samples a scene with exactly the objects of the metadata, in a random arrangement that satisfies it.

    Args:
      metadata: as `parse_metadata` returns it.
      rng: numpy generator.
      allow_held_out: colors that the metadata leaves open may form HELD_OUT_PAIRS.
    Raises: ClvrError if no arrangement satisfies the metadata.
    """
    objects = plan(metadata, rng, allow_held_out)
    return Scene(tuple(place(item.color, item.shape, item.cell, rng) for item in objects))


def _pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(rng.integers(len(options)))]


def _phrasing_index(rng: np.random.Generator, tag: str, phrasing: int | None) -> int:
    number = len(PHRASINGS[tag])
    if phrasing is None:
        return int(rng.integers(number))
    if not 0 <= phrasing < number:
        raise ClvrError(f"phrasing {phrasing} of {tag} does not exist; there are {number}, counted from 0")
    return phrasing


def _two_pairs(rng: np.random.Generator, allow_held_out: bool) -> tuple[tuple[str, str], tuple[str, str]]:
    """Samples two (color, shape) pairs that differ in both."""
    first = sample_pair(rng, allow_held_out)
    while True:
        second = sample_pair(rng, allow_held_out)
        if first[0] != second[0] and first[1] != second[1]:
            return first, second


def _sample_simple(rng: np.random.Generator, tag: str, allow_held_out: bool) -> Metadata:
    colored = tag in ("colors", "color_attr") or (tag in ("counting", "position") and rng.random() < 0.5)
    pairs: tuple[tuple[str, str], ...] = _two_pairs(rng, allow_held_out)
    if tag in ("single_object", "counting", "colors"):
        pairs = pairs[:1]
    include: list[Item] = []
    for color, shape in pairs:
        item: Item = {"class": shape, "count": 1}
        include.append({**item, "color": color} if colored else item)
    metadata: Metadata = {"tag": tag, "include": include}
    if tag == "counting":
        count = int(rng.integers(2, 5))
        include[0]["count"] = count
        metadata["exclude"] = [{"class": include[0]["class"], "count": count + 1}]
    if tag == "position":
        include[1]["position"] = [_pick(rng, RELATIONS), 0]
    return metadata


def sample_complex(rng: np.random.Generator, tier: int, allow_held_out: bool) -> Metadata:
    """Samples metadata of the tag `complex`, without a prompt, for `tier` objects.

    An arrangement is sampled first and then described by true statements, so that the metadata can be satisfied.
    """
    while True:
        include = _describe_arrangement(rng, tier, allow_held_out)
        relations = sum("position" in item for item in include)
        if relations >= 1 and relations + sum("place" in item for item in include) >= len(include) - 1:
            break
    exclude = []
    for shape in SHAPES:
        number = sum(item["count"] for item in include if item["class"] == shape)
        exclude.append({"class": shape, "count": number + 1})
    return {"tag": "complex", "include": include, "exclude": exclude, "tier": tier}


def _describe_arrangement(rng: np.random.Generator, tier: int, allow_held_out: bool) -> list[Item]:
    counts = [1] * tier
    if rng.random() < 0.25:
        size = 2 if tier == 3 else int(rng.integers(2, 4))
        counts = [1] * (tier - size)
        counts.insert(int(rng.integers(len(counts) + 1)), size)
    cells = [CELLS[index] for index in rng.permutation(len(CELLS))[:tier]]
    include: list[Item] = []
    taken: list[list[str]] = []
    pairs: set[tuple[str, str]] = set()
    for count in counts:
        pair = sample_pair(rng, allow_held_out)
        while pair in pairs:
            pair = sample_pair(rng, allow_held_out)
        pairs.add(pair)
        mine, cells = cells[:count], cells[count:]
        item: Item = {"class": pair[1], "count": count, "color": pair[0]}
        options = [
            [relation, index]
            for index, others in enumerate(taken)
            for relation in RELATIONS
            if all(holds(relation, cell, other) for cell in mine for other in others)
        ]
        choice = rng.random()
        if options and choice < 0.7:
            item["position"] = _pick(rng, options)
        elif count == 1 and choice < 0.85:
            item["place"] = mine[0]
        include.append(item)
        taken.append(mine)
    return include


# --- wording ----------------------------------------------------------------------------------------------------------


def article(noun: str) -> str:
    """Returns the noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def counted(number: int, shape: str | None = None, color: str | None = None) -> str:
    """Returns a number from 1 to 9 in words, with the noun that it counts: `three`, `one red circle`, `two stars`."""
    noun = None if shape is None else shape if number == 1 else _PLURALS[shape]
    return " ".join(part for part in (_NUMBERS[number], color, noun) if part)


def _indefinite(item: Item) -> str:
    text = counted(item["count"], item["class"], item.get("color"))
    return text if item["count"] > 1 else article(text.removeprefix("one "))


def _definite(item: Item) -> str:
    return "the " + counted(item["count"], item["class"], item.get("color")).removeprefix("one ")


def phrase(metadata: Metadata, rng: np.random.Generator, phrasing: int | None = None) -> str:
    """Writes an English prompt for metadata.

    Args:
      metadata: as `sample_metadata` returns it; its "prompt" is ignored and may be missing.
      rng: samples the phrasing and the choices inside it.
      phrasing: index into PHRASINGS[tag]; None samples one.
    Raises: ClvrError for a phrasing that does not exist.
    """
    tag, include = metadata["tag"], metadata["include"]
    index = _phrasing_index(rng, tag, phrasing)
    # Half of all prompts do not mention the background.
    ending = _ENDINGS[max(int(rng.integers(-3, len(_ENDINGS))), 0)]
    if tag == "complex":
        where = [_where(item, include, rng) for item in include]
        return _COMPLEX[index](include, where, ending)
    slots = {"a": _indefinite(include[0]), "end": ending}
    if len(include) > 1:
        slots["b"] = _indefinite(include[1])
    if tag == "position":
        slots["a"], slots["b"] = slots["b"], slots["a"]
        slots["rel"] = _pick(rng, _RELATION_WORDS[include[1]["position"][0]])
    return PHRASINGS[tag][index].format(**slots)


def _where(item: Item, include: list[Item], rng: np.random.Generator) -> str:
    """Returns the place and the relation of an item in words, "" if it has neither."""
    parts = []
    if "place" in item:
        parts.append(_pick(rng, _PLACE_WORDS[item["place"]]))
    if "position" in item:
        relation, target = item["position"]
        parts.append(f"{_pick(rng, _RELATION_WORDS[relation])} {_definite(include[target])}")
    return " and ".join(parts)


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _listed(parts: list[str], last: str = " and ") -> str:
    return last.join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _with_where(include: list[Item], where: list[str]) -> list[str]:
    return [f"{_indefinite(item)} {text}".rstrip() for item, text in zip(include, where, strict=True)]


def _is(item: Item) -> str:
    return "is" if item["count"] == 1 else "are"


def _inline(include: list[Item], where: list[str], ending: str) -> str:
    # Commas before "and" and before the ending: without them the last two items could be read as sharing one place.
    return _listed(_with_where(include, where), ", and ") + ("," if ending else "") + ending


def _photo(include: list[Item], where: list[str], ending: str) -> str:
    return "a photo of " + _inline(include, where, ending)


def _there_is(include: list[Item], where: list[str], ending: str) -> str:
    texts = _with_where(include, where)
    return " ".join(f"There {_is(item)} {text}." for item, text in zip(include, texts, strict=True))


def _draw_then(include: list[Item], where: list[str], ending: str) -> str:
    return "draw " + ", then ".join(_with_where(include, where)) + ("," if ending else "") + ending


def _objects_first(include: list[Item], where: list[str], ending: str) -> str:
    sentences = ["a picture with " + _listed([_indefinite(item) for item in include]) + "."]
    sentences += [f"{_definite(item)} {_is(item)} {text}." for item, text in zip(include, where, strict=True) if text]
    return " ".join([sentences[0], *map(_capital, sentences[1:])])


def _put(include: list[Item], where: list[str], ending: str) -> str:
    texts = [
        f"put {_indefinite(item)} {text}" if text else f"add {_indefinite(item)}"
        for item, text in zip(include, where, strict=True)
    ]
    return "; ".join(texts) + ("," if ending else "") + ending


def _sentences(include: list[Item], where: list[str], ending: str) -> str:
    texts = [
        f"{_indefinite(item)} {_is(item)} {text}." if text else f"there {_is(item)} also {_indefinite(item)}."
        for item, text in zip(include, where, strict=True)
    ]
    return " ".join(map(_capital, texts))


_COMPLEX: tuple[Callable[[list[Item], list[str], str], str], ...] = (
    _inline, _photo, _there_is, _draw_then, _objects_first, _put, _sentences
)  # fmt: skip
