"""Summaries of the scores of images: one score for each tag and tier and one overall, with intervals."""

from __future__ import annotations

import statistics as descriptive
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.harness.benchmark import Benchmark, Item, Score
from clvr_jax.evaluation.harness.results import GroupResult, ImageCost, ImageResult, OverallResult, ScoreSummary
from clvr_jax.evaluation.harness.run_directory import Record
from clvr_jax.evaluation.statistics import Interval, clustered_interval, weighted_mean

K = TypeVar("K", str, int)

TAG_ORDER = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "complex")


@dataclass(frozen=True)
class ScoredImage:
    """The score of one image of a run.

    Attributes:
      index: of its prompt in the benchmark, from 0.
      sample: index among the images of the prompt, from 0.
      item: its prompt.
      score: its score.
      record: its seed and cost; None for external images.
    """

    index: int
    sample: int
    item: Item
    score: Score
    record: Record | None = None

    @property
    def name(self) -> str:
        """The name of the image in lists."""
        return f"{self.item.id}/{self.sample}"

    def to_json(self) -> ImageResult:
        """Returns the entry of results.json."""
        cost: ImageCost = {} if self.record is None else self.record.cost()
        return {
            "index": self.index,
            "sample": self.sample,
            "id": self.item.id,
            "prompt": self.item.prompt,
            "tag": self.item.tag,
            "tier": self.item.tier,
            "score": self.score.score,
            "correct": self.score.correct,
            "parts": dict(self.score.parts),
            "reasons": list(self.score.reasons),
            "readable": self.score.readable,
            "refused": self.score.refused,
            **cost,
        }


@dataclass(frozen=True)
class GroupScore:
    """The score of a group of prompts.

    Attributes:
      interval: the mean over prompts of the mean score of their images, with its 95 % interval; see
        `clustered_interval`.
      prompts, images: their numbers.
      correct: the number of correct images, if they were counted.
    """

    interval: Interval
    prompts: int
    images: int
    correct: int = 0

    @classmethod
    def from_scores(cls, scores: Sequence[Sequence[float]], correct: int = 0, seed: int = 0) -> Self:
        """Returns the score of a group from the scores of the images of each prompt. seed: of a bootstrap."""
        return cls(clustered_interval(scores, seed), len(scores), sum(map(len, scores)), correct)

    @classmethod
    def from_images(cls, images: Iterable[ScoredImage]) -> Self:
        """Returns the score of images, at least one."""
        prompts: dict[int, list[float]] = {}
        correct = 0
        for image in images:
            prompts.setdefault(image.index, []).append(image.score.score)
            correct += bool(image.score.correct)
        return cls.from_scores(list(prompts.values()), correct)

    def to_json(self, counts_images: bool = False) -> GroupResult:
        """Returns the JSON value in summaries. counts_images: as in `Benchmark`."""
        group: GroupResult = {
            "score": self.interval.estimate,
            "interval": [self.interval.low, self.interval.high],
            "prompts": self.prompts,
            "pictures": self.images,
        }
        return {"correct": self.correct, "accuracy": self.interval.estimate, **group} if counts_images else group


def summarize(benchmark: Benchmark, images: Sequence[ScoredImage]) -> ScoreSummary:
    """Computes the scores of tags and tiers, and the overall score.

    Args:
      benchmark: defines the weights of tags.
      images: all images that the rules do not leave out.
    Returns: {"tags": {tag: group}, "tiers": {tier: group}, "overall": {"score", "interval"} or {"score": None,
      "reason"}, "parts", "unreadable", "refused"} with group = {"score", "interval", "prompts", "pictures"}. If the
      benchmark counts images, groups also have "correct" and "accuracy", and "overall" has "mean_of_tags", which is the
      score, and "over_pictures", the group of all images. Intervals are 95 %; that of the overall score combines the
      intervals of tags, see `weighted_mean`.
    Raises: ClvrError if there are no images.
    """
    if not images:
        raise ClvrError(
            f"{benchmark.title}: there are no scored images; choose prompts that the rules do not leave out"
        )
    tags = _groups(images, lambda image: image.item.tag, tags_in_order(image.item.tag for image in images))
    tiers = _groups(
        images, lambda image: image.item.tier, sorted({i.item.tier for i in images if i.item.tier is not None})
    )
    overall = _overall(benchmark, tags)
    if benchmark.counts_images:
        everything = GroupScore.from_images(images).to_json(counts_images=True)
        overall = {**overall, "mean_of_tags": overall["score"], "over_pictures": everything}
    parts = dict.fromkeys(name for image in images for name in image.score.parts)
    return {
        "tags": {tag: group.to_json(benchmark.counts_images) for tag, group in tags.items()},
        "tiers": {str(tier): group.to_json(benchmark.counts_images) for tier, group in tiers.items()},
        "overall": overall,
        "parts": {
            name: descriptive.fmean(image.score.parts[name] for image in images if name in image.score.parts)
            for name in parts
        },
        "unreadable": [image.name for image in images if not (image.score.readable or image.score.refused)],
        "refused": [image.name for image in images if image.score.refused],
    }


def tags_in_order(tags: Iterable[str]) -> list[str]:
    """Returns the distinct tags: those of GenEval in its order, then the others as they first occur."""
    distinct = dict.fromkeys(tags)
    return [tag for tag in TAG_ORDER if tag in distinct] + [tag for tag in distinct if tag not in TAG_ORDER]


def _groups(
    images: Sequence[ScoredImage], key: Callable[[ScoredImage], K | None], keys: Iterable[K]
) -> dict[K, GroupScore]:
    return {name: GroupScore.from_images(image for image in images if key(image) == name) for name in keys}


def _overall(benchmark: Benchmark, tags: Mapping[str, GroupScore]) -> OverallResult:
    weights = benchmark.weights({tag: group.prompts for tag, group in tags.items()})
    if missing := [tag for tag in weights if tag not in tags]:
        return {"score": None, "reason": f"no prompt of {', '.join(missing)}"}
    mean = weighted_mean([tags[tag].interval for tag in weights], list(weights.values()))
    return {"score": mean.estimate, "interval": [mean.low, mean.high]}
