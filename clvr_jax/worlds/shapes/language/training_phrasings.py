"""Wide phrasings of training prompts: the requests of `grammar` in many more wordings.

A model that was trained on the seven templates of `grammar` alone understands no other wording. Here objects are
listed, stated one by one or in tables; a relation may come before or after its subject, have its anchor as subject, or
refer to a pronoun. Words are in `training_words`, clauses in `training_clauses`, layouts in `training_styles`. The
evaluation set "second" has a separate grammar; nothing may be copied between the two.

The include list of a wide prompt follows from its text by these rules:
 1. Items are in the order of their first mention.
 2. A relation belongs to the item that the clause places; but if that item was mentioned before its anchor ("the circle
    is below a red star", or "a circle and a star; the circle is below the star"), the inverse relation belongs to the
    anchor.
 3. An anchor that is mentioned after the item that refers to it moves directly before it, with its own anchor before
    it: "a red star that is above a blue circle" becomes blue circle, then red star above blue circle.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.worlds.shapes.language import training_words as words
from clvr_jax.worlds.shapes.language.grammar import DENSE_TIERS, TIERS, sample_complex
from clvr_jax.worlds.shapes.language.training_clauses import TextBuilder
from clvr_jax.worlds.shapes.language.training_lists import capital
from clvr_jax.worlds.shapes.language.training_styles import STYLES
from clvr_jax.worlds.shapes.metadata import Item, Metadata

_LONG = 370
"""Length in characters above which another style is tried: small models read about 150 tokens."""
_TRIES = 3

__all__ = ["STYLES", "rephrase", "wide_metadata"]


def wide_metadata(
    rng: np.random.Generator, tier: int | None = None, min_relations: int = 0, allow_held_out: bool = False
) -> Metadata:
    """Samples metadata of the tag `complex` with a prompt in one of the wide phrasings.

    Args:
      rng: numpy generator.
      tier: number of objects, of TIERS or DENSE_TIERS; None samples one of TIERS.
      min_relations: least number of relations; it must be possible for the tier.
      allow_held_out: the prompt may name HELD_OUT_PAIRS; never set it for training data.
    Returns: metadata whose include list is in the order in which the prompt introduces the objects, anchors first.
    Raises: ClvrError if the tier is none of these.
    """
    if tier is not None and tier not in TIERS + DENSE_TIERS:
        raise ClvrError(f"wide_metadata: tier {tier!r} must be one of {TIERS + DENSE_TIERS}")
    while True:
        drawn = TIERS[int(rng.integers(len(TIERS)))] if tier is None else tier
        metadata = sample_complex(rng, drawn, allow_held_out)
        if sum("position" in item for item in metadata["include"]) >= min_relations:
            return rephrase(metadata, rng)


def rephrase(metadata: Metadata, rng: np.random.Generator) -> Metadata:
    """Returns `complex` metadata with a prompt in a wide phrasing; "phrasing" is the index into `STYLES`."""
    include = _anchors_first(metadata["include"], range(len(metadata["include"])))
    if rng.random() < 0.35:
        include = _anchors_first(include, rng.permutation(len(include)).tolist())
    for _ in range(_TRIES):
        style = int(rng.random() * len(STYLES))
        builder = TextBuilder(include, rng)
        text = _finished(STYLES[style](builder), builder)
        if len(text) <= _LONG:
            break
    return metadata | {"include": _anchors_first(include, builder.mentioned), "prompt": text, "phrasing": style}


def _anchors_first(include: Sequence[Item], mentioned: Sequence[int]) -> list[Item]:
    """Copies the items in the given order, except that an anchor comes directly before the first item that needs it."""
    order: list[int] = []

    def add(index: int) -> None:
        if index not in order:
            if "position" in include[index]:
                add(include[index]["position"][1])
            order.append(index)

    for index in mentioned:
        add(index)
    items = [include[index].copy() for index in order]
    for item in items:
        if "position" in item:
            item["position"] = [item["position"][0], order.index(item["position"][1])]
    return items


def _finished(text: str, t: TextBuilder) -> str:
    """Returns the prompt, perhaps with a title, sentences without a request, and in upper or lower case."""
    short = len(text) < 260
    if short and t.chance(0.06):
        title = t.pick(words.TITLES).format(t.filler(words.TITLE_NAMES))
        text = title + text
    if short and t.chance(0.1):
        text = capital(t.filler(words.FILLERS)) + t.pick((". ", ".\n", ": ", "! ")) + text
    if t.chance(0.5):
        text = capital(text)
    if short and t.chance(0.12):
        text = text.rstrip(". ")
        text += t.pick((". ", ".\n", "\n") if text[-1] not in "!?" else (" ", "\n"))
        text += t.filler(words.FILLERS) + t.pick((".", ""))
    if t.chance(0.25):
        text = text.rstrip(".")
    # Upper case takes about twice as many tokens, since few upper-case words are in the vocabulary.
    if len(text) < 170 and t.chance(0.05):
        text = text.upper()
    elif t.chance(0.15):
        text = text.lower()
    return text
