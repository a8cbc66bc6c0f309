"""The content of results.json and of benchmark.json, as types. Keys are part of the file format, so they stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NotRequired, TypedDict

from clvr_jax.files.json_input import JSON

CostKey = Literal[
    "nfe_per_picture",
    "seconds_per_picture",
    "median_seconds_per_picture",
    "input_tokens_per_picture",
    "output_tokens_per_picture",
    "dollars",
]
"""The numbers of a cost summary."""


class ImageCost(TypedDict, total=False):
    """The cost of one image, see `run_directory.Record`; a field that is missing or None was not recorded."""

    nfe: int | None
    seconds: float | None
    steps: int | None
    outcome: str | None
    input_tokens: int | None
    output_tokens: int | None
    dollars: float | None
    device: str | None


class ImageResult(ImageCost):
    """The result of one image: its prompt, its score and its cost.

    `score` may be missing where an image is either correct or not; `correct` is None for the other benchmarks.
    """

    index: int
    prompt: str
    tag: str
    tier: int | None
    id: NotRequired[str]
    sample: NotRequired[int]
    score: NotRequired[float | None]
    correct: NotRequired[bool | None]
    parts: NotRequired[Mapping[str, float]]
    reasons: NotRequired[list[str]]
    readable: NotRequired[bool]
    refused: NotRequired[bool]


class CostSummary(TypedDict):
    """Means per image, and the number of images with each number of steps, outcome and device; None: not recorded."""

    nfe_per_picture: float | None
    seconds_per_picture: float | None
    median_seconds_per_picture: float | None
    input_tokens_per_picture: NotRequired[float | None]
    output_tokens_per_picture: NotRequired[float | None]
    dollars: NotRequired[float | None]
    steps: NotRequired[dict[str, int]]
    outcomes: NotRequired[dict[str, int]]
    devices: NotRequired[dict[str, int]]


class GroupResult(TypedDict):
    """The score of a group of prompts with its 95 % interval; `correct` and `accuracy` if images are counted."""

    score: float
    interval: list[float]
    prompts: int
    pictures: int
    correct: NotRequired[int]
    accuracy: NotRequired[float]


class OverallResult(TypedDict):
    """The overall score of a benchmark with its interval; a score of None has a reason in place of the interval.

    Benchmarks that count images also have `mean_of_tags`, which is the score, and the group of all images.
    """

    score: float | None
    interval: NotRequired[list[float]]
    reason: NotRequired[str]
    mean_of_tags: NotRequired[float | None]
    over_pictures: NotRequired[GroupResult]


class ScoreSummary(TypedDict):
    """The scores of tags and tiers, the overall score, and the images without a readable reply."""

    tags: dict[str, GroupResult]
    tiers: dict[str, GroupResult]
    overall: OverallResult
    parts: dict[str, float]
    unreadable: list[str]
    refused: list[str]


class RunSummary(ScoreSummary):
    """The scores of a run with its cost, the prompts that the rules leave out, and the usage of the judge."""

    cost: CostSummary
    left_out: list[str]
    judging: dict[str, float]


class Provenance(TypedDict):
    """The settings and the seed of the run that generated images; external images have no seed."""

    settings: Mapping[str, JSON]
    seed: int | None


class PooledResults(TypedDict):
    """The images of one or several runs of a system, scored by one judge on one benchmark."""

    benchmark: str
    judge: Mapping[str, str | None]
    pictures: list[ImageResult]


class Results(PooledResults, Provenance):
    """The content of results.json."""

    adapted: list[str]
    generator_adapted: list[str]
    samples: int
    unit: str
    faults: list[str]
    summary: RunSummary
    versions: dict[str, str]


class StoredResults(PooledResults, total=False):
    """A results.json that was read: an earlier version, or another program, may have left out other fields."""

    unit: str
    settings: Mapping[str, JSON]
    seed: int | None
    summary: RunSummary


class Identity(TypedDict):
    """The content of benchmark.json, which is the same for all images of a run."""

    benchmark: str
    settings: Mapping[str, JSON]
    seed: int
    samples: int
    prompts: int
    metadata_sha256: NotRequired[str]
