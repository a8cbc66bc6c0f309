"""Prompts to train on and prompts to evaluate on, which never overlap, and their files."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.worlds.shapes.grammar import DENSE_TIERS, PHRASINGS, TIERS, sample_metadata, words
from clvr_jax.worlds.shapes.metadata import TAGS, Metadata, canonical_key, has_held_out_pair, parse_metadata

EVALUATION_SETS = ("eval", "complex", "dense")
EVAL_COUNTS = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
"""Prompts per tag in the set "eval", as many as GenEval has."""
COMPLEX_PER_TIER = 75
DENSE_PER_TIER = 100
TRAIN_WEIGHTS: dict[str, float] = {
    "single_object": 0.04,
    "two_object": 0.08,
    "counting": 0.12,
    "colors": 0.07,
    "position": 0.12,
    "color_attr": 0.12,
    "complex": 0.45,
}
# Changing a seed, the grammar or the sampling changes the evaluation sets, and with them the meaning of old scores.
_SEEDS = {"eval": 553, "complex": 300, "dense": 789}
_HELD_OUT_EVERY = 3


def evaluation_prompts(name: str) -> list[Metadata]:
    """The fixed evaluation prompts.

    A third of the prompts of every tag with colors name a pair of HELD_OUT_PAIRS, the others do not; phrasings take
    turns.

    Args:
      name: "eval" (553 prompts, GenEval's tags in GenEval's proportions), "complex" (300: 75 for each of 3, 4, 5 and
        6 objects, with "tier") or "dense" (300: 100 for each of 7, 8 and 9 objects, which fill the canvas).
    Returns: a new list, the same in every process; all prompts differ, and in "complex" and "dense" all requests.
    """
    if name not in EVALUATION_SETS:
        raise ClvrError(f"evaluation_prompts: unknown set {name!r}; known: {', '.join(EVALUATION_SETS)}")
    return copy.deepcopy(_evaluation_set(name))


@functools.cache
def _evaluation_set(name: str) -> list[Metadata]:
    rng = np.random.default_rng(_SEEDS[name])
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
            # Both take turns; no number of phrasings is a multiple of three, so the turns are not tied to each other.
            phrasing = index % len(PHRASINGS[tag])
            held_out = tag not in ("single_object", "two_object") and index % _HELD_OUT_EVERY == 0
            while True:
                metadata = sample_metadata(rng, tag, tier, allow_held_out=held_out, phrasing=phrasing)
                keys = {_text_key(metadata)} | ({canonical_key(metadata)} if tag == "complex" else set())
                if has_held_out_pair(metadata) == held_out and not keys & seen:
                    break
            seen |= keys
            chosen.append(metadata)
    return chosen


def _text_key(metadata: Metadata) -> str:
    return " ".join(words(metadata["prompt"]))


@functools.cache
def _reserved() -> frozenset[str]:
    """Texts of all evaluation prompts and canonical requests of the complex ones."""
    everything = [metadata for name in EVALUATION_SETS for metadata in _evaluation_set(name)]
    texts = {_text_key(metadata) for metadata in everything}
    return frozenset(texts | {canonical_key(metadata) for metadata in everything if metadata["tag"] == "complex"})


def train_prompt(
    rng: np.random.Generator, weights: Mapping[str, float] | None = None, tiers: Sequence[int] = TIERS
) -> Metadata:
    """Draws a training prompt: never the text of an evaluation prompt (case and punctuation aside), never the request
    of a complex one, never a held-out pair.

    Args:
      rng: numpy generator.
      weights: tag -> weight, not negative, need not sum to one; None is TRAIN_WEIGHTS.
      tiers: numbers of objects of complex prompts, equally often; of TIERS and DENSE_TIERS.
    """
    tags, shares = _shares(tuple((TRAIN_WEIGHTS if weights is None else weights).items()))
    tag = tags[int(np.searchsorted(shares, rng.random(), side="right"))]
    while True:
        tier = tiers[int(rng.integers(len(tiers)))] if tag == "complex" else None
        metadata = sample_metadata(rng, tag, tier)
        taken = {_text_key(metadata)} | ({canonical_key(metadata)} if tag == "complex" else set())
        if not taken & _reserved():
            return metadata


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
    """Reads a JSONL file with one metadata per line; empty lines are skipped.

    Raises: ClvrError that names file and line if a line is not JSON or not a metadata of the shapes world, or that the
    file cannot be read or holds no prompts.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ClvrError(f"{path}: cannot read prompts: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(parse_metadata(json.loads(line)))
        except json.JSONDecodeError as error:
            raise ClvrError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
        except ClvrError as error:
            raise ClvrError(f"{path}:{number}: {error}") from error
    if not found:
        raise ClvrError(f"{path}: no prompts in this file; write one JSON object per line")
    return found


def write_prompts(path: str | os.PathLike[str], prompts: Iterable[Metadata]) -> None:
    """Writes metadata as JSONL, one per line in GenEval's format; an existing file is replaced."""
    text = "".join(json.dumps(metadata) + "\n" for metadata in prompts)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ClvrError(f"{path}: cannot write prompts: {error}") from error
