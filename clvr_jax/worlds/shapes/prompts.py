"""Training prompts and evaluation prompts, which never overlap, and their files."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import check_unicode, parse_object, read_lines
from clvr_jax.worlds.shapes.language.grammar import (
    DENSE_TIERS,
    PHRASINGS,
    TIERS,
    sample_complex,
    sample_metadata,
    words,
)
from clvr_jax.worlds.shapes.language.second_grammar import NUM_STYLES, second_phrase
from clvr_jax.worlds.shapes.metadata import TAGS, Metadata, canonical_key, has_held_out_pair, parse_metadata

EVALUATION_SETS = ("eval", "complex", "dense", "second")
EVAL_COUNTS = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
"""Number of prompts per tag in the set "eval", the same as in GenEval."""
COMPLEX_PER_TIER = 75
DENSE_PER_TIER = 100
SECOND_PER_TIER = 75
TRAIN_WEIGHTS: dict[str, float] = {
    "single_object": 0.04,
    "two_object": 0.08,
    "counting": 0.12,
    "colors": 0.07,
    "position": 0.12,
    "color_attr": 0.12,
    "complex": 0.45,
}
# A change of a seed, the grammar or the sampling changes the evaluation sets, so that old scores are not comparable.
_SEEDS = {"eval": 553, "complex": 300, "dense": 789, "second": 2026}
_HELD_OUT_EVERY = 3


def evaluation_prompts(name: str) -> list[Metadata]:
    """Returns the fixed evaluation prompts.

    A third of the prompts of each tag with colors name one of HELD_OUT_PAIRS, the others do not. Phrasings alternate.

    Args:
      name: "eval" (553 prompts, GenEval's tags in GenEval's proportions), "complex" (300: 75 for each of 3, 4, 5 and
        6 objects, with "tier"), "dense" (300: 100 for each of 7, 8 and 9 objects, which fill the canvas) or "second"
        (300: 75 for each of 3, 4, 5 and 6 objects, worded by `language.second_grammar`, which is not used for training;
        "phrasing" is the style).
    Returns: a new list, the same in every process. All prompts differ; in "complex", "dense" and "second" all requests
      differ too, see `canonical_key`.
    Raises: ClvrError for an unknown set.
    """
    if name not in EVALUATION_SETS:
        raise ClvrError(f"evaluation_prompts: unknown set {name!r}; known: {', '.join(EVALUATION_SETS)}")
    return copy.deepcopy(_evaluation_set(name))


@functools.cache
def _evaluation_set(name: str) -> list[Metadata]:
    rng = np.random.default_rng(_SEEDS[name])
    if name == "second":
        return _second_set(rng)
    plan: list[tuple[str, int | None, int]]
    if name == "eval":
        plan = [(tag, None, count) for tag, count in EVAL_COUNTS.items()]
    else:
        tiers, count = (TIERS, COMPLEX_PER_TIER) if name == "complex" else (DENSE_TIERS, DENSE_PER_TIER)
        plan = [("complex", tier, count) for tier in tiers]
    chosen: list[Metadata] = []
    seen: set[str] = set()
    for tag, tier, count in plan:
        for index in range(count):
            # No number of phrasings is a multiple of three, so phrasing and held-out pairs are independent.
            phrasing = index % len(PHRASINGS[tag])
            held_out = tag not in ("single_object", "two_object") and index % _HELD_OUT_EVERY == 0
            while True:
                metadata = sample_metadata(rng, tag, tier, allow_held_out=held_out, phrasing=phrasing)
                keys = _keys(metadata)
                if has_held_out_pair(metadata) == held_out and not keys & seen:
                    break
            seen |= keys
            chosen.append(metadata)
    return chosen


def _second_set(rng: np.random.Generator) -> list[Metadata]:
    """Samples the set "second".

    Half of the prompts must repeat a color and a shape, and have at least three relations if they have five or six
    objects; a quarter must have a group, such as "two red stars". All other prompts may have these properties, too.
    """
    chosen: list[Metadata] = []
    others = [metadata for name in EVALUATION_SETS if name != "second" for metadata in _evaluation_set(name)]
    seen = {key for metadata in others for key in _keys(metadata)}
    for tier in TIERS:
        for index in range(SECOND_PER_TIER):
            held_out, kind = index % _HELD_OUT_EVERY == 0, int(rng.integers(4))
            style = len(chosen) % NUM_STYLES
            while True:
                metadata = sample_complex(rng, tier, allow_held_out=held_out)
                if has_held_out_pair(metadata) != held_out or not _is_of_kind(metadata, kind):
                    continue
                metadata["prompt"], metadata["phrasing"] = second_phrase(metadata, rng, style)
                if not _keys(metadata) & seen:
                    break
            seen |= _keys(metadata)
            chosen.append(metadata)
    return chosen


def _is_of_kind(metadata: Metadata, kind: int) -> bool:
    """Returns whether metadata is of a kind of the set "second".

    Args:
      kind: 0 or 1: it repeats a color and a shape, and has three relations if it has at least five objects; 2: it has
        a group; 3: any.
    """
    include = metadata["include"]
    if kind < 2:
        repeats = all(len({item[key] for item in include}) < len(include) for key in ("color", "class"))
        return repeats and (metadata["tier"] < 5 or sum("position" in item for item in include) >= 3)
    return kind > 2 or any(item["count"] > 1 for item in include)


def _keys(metadata: Metadata) -> set[str]:
    """Returns the keys that no two prompts may share: the text, and the request of a complex prompt."""
    return {_text_key(metadata)} | ({canonical_key(metadata)} if metadata["tag"] == "complex" else set())


def _text_key(metadata: Metadata) -> str:
    return " ".join(words(metadata["prompt"]))


@functools.cache
def _reserved() -> frozenset[str]:
    """Returns the keys of all evaluation prompts, see `_keys`."""
    return frozenset(key for name in EVALUATION_SETS for metadata in _evaluation_set(name) for key in _keys(metadata))


def train_prompt(
    rng: np.random.Generator, weights: Mapping[str, float] | None = None, tiers: Sequence[int] = TIERS
) -> Metadata:
    """Samples a training prompt.

    It never has the text of an evaluation prompt (ignoring case and punctuation), the request of a complex evaluation
    prompt, or a held-out pair.

    Args:
      rng: numpy generator.
      weights: tag -> weight, not negative, need not sum to one; None is TRAIN_WEIGHTS.
      tiers: numbers of objects of complex prompts, sampled uniformly; of TIERS and DENSE_TIERS.
    Raises: ClvrError for an unknown tag, an invalid weight, or no weight above 0.
    """
    tags, shares = _shares(tuple((TRAIN_WEIGHTS if weights is None else weights).items()))
    tag = tags[int(np.searchsorted(shares, rng.random(), side="right"))]
    while True:
        tier = tiers[int(rng.integers(len(tiers)))] if tag == "complex" else None
        metadata = sample_metadata(rng, tag, tier)
        if not is_reserved(metadata):
            return metadata


def is_reserved(metadata: Metadata) -> bool:
    """Returns whether the text of the prompt, or its request if it is complex, is in an evaluation set."""
    return bool(_keys(metadata) & _reserved())


@functools.lru_cache(maxsize=16)
def _shares(weights: tuple[tuple[str, float], ...]) -> tuple[tuple[str, ...], np.ndarray]:
    for tag, weight in weights:
        if tag not in TAGS or not 0 <= weight < float("inf"):
            raise ClvrError(f"train_prompt: weight {weight!r} of tag {tag!r}; tags: {', '.join(TAGS)}, weights >= 0")
    kept = [(tag, weight) for tag, weight in weights if weight > 0]
    if not kept:
        raise ClvrError("train_prompt: at least one tag needs a weight above 0")
    shares = np.cumsum([weight for _, weight in kept])
    shares = shares / shares[-1]
    shares[-1] = 1.0
    return tuple(tag for tag, _ in kept), shares


def read_prompts(path: str | os.PathLike[str]) -> list[Metadata]:
    """Reads a JSONL file with the metadata of one prompt per line; empty lines are skipped.

    Raises: ClvrError with file and line if a line is not JSON or not metadata of the shapes world, and ClvrError if the
      file cannot be read or contains no prompts.
    """
    found = []
    for where, line in read_lines(Path(path)):
        entry = parse_object(line, where)
        check_unicode(entry.content, where)
        try:
            found.append(parse_metadata(entry.content))
        except ClvrError as error:
            raise ClvrError(f"{where}: {error}") from error
    if not found:
        raise ClvrError(f"{path}: no prompts in this file; write one JSON object per line")
    return found


def write_prompts(path: str | os.PathLike[str], prompts: Iterable[Metadata]) -> None:
    """Writes metadata as JSONL in GenEval's format, one prompt per line; an existing file is replaced.

    Raises: ClvrError if the file cannot be written.
    """
    text = "".join(json.dumps(metadata) + "\n" for metadata in prompts)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ClvrError(f"{path}: cannot write prompts: {error}") from error
