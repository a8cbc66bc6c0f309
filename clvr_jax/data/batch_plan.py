"""Batch plans: the samples of the batch of each step, with random access.

Every process computes the same plan from the shapes of all samples and loads its own rows of each batch. All batches of
a bucket have one shape, no process waits for the shapes of another, and the iterator state is one number.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from clvr_jax.errors import ClvrError, UsageError

_BATCHES, _SAMPLES = range(2)
"""Streams of random numbers, for the order of batches and the order of samples."""


def length_bounds(lengths: Sequence[int], max_padding: float, multiple: int = 1) -> tuple[int, ...]:
    """Returns the fewest lengths to pad to that keep the share of padding at or below `max_padding`.

    Args:
      lengths: lengths of all samples in tokens, at least one.
      max_padding: share of padding among all tokens, in [0, 1).
      multiple: bounds are multiples of it, or of its half, its quarter and so on if they leave too much padding.
    Returns: bounds in increasing order; the last one holds the longest sample. They have the least padding of all
      equally many bounds.
    Raises: UsageError for no lengths, or a share or multiple out of range.
    """
    if not lengths or not 0 <= max_padding < 1 or multiple < 1:
        raise UsageError(
            f"length bounds: need lengths, max_padding in [0, 1) and multiple >= 1, got {len(lengths)} lengths, "
            f"{max_padding} and {multiple}"
        )
    tops, counts = np.unique(-(-np.asarray(lengths) // multiple) * multiple, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])  # samples below each top
    allowed = sum(lengths) / (1 - max_padding)
    # sizes[j]: fewest tokens, with padding, of the samples below tops[j]; each iteration adds a bound.
    sizes = np.concatenate([[0.0], np.full(len(tops), np.inf)])
    choices: list[np.ndarray] = []
    while sizes[-1] > allowed:
        if len(choices) == len(tops):
            return length_bounds(lengths, max_padding, multiple // 2)
        # The next bound is tops[j - 1], for the samples from i on; i < j.
        costs = sizes[None, :-1] + (before[1:, None] - before[None, :-1]) * tops[:, None]
        costs[np.triu_indices(len(tops), 1)] = np.inf
        choices.append(costs.argmin(axis=1))
        sizes = np.concatenate([[0.0], costs.min(axis=1)])
    bounds, end = [], len(tops)
    for choice in reversed(choices):
        bounds.append(int(tops[end - 1]))
        end = int(choice[end - 1])
    return tuple(reversed(bounds))


Bucket: TypeAlias = tuple[Any, ...]
"""The key of samples that may share a batch: values that can be compared with those of any other bucket."""


@dataclass(frozen=True)
class BatchPlan:
    """An endless, shuffled sequence of batches; all samples of a batch are of one bucket.

    The samples of a bucket form a stream of random permutations, which is divided into batches. No sample is dropped:
    after e epochs each sample of a bucket has been used e times, up to half a batch. A bucket with fewer samples than a
    batch has no batch in some epochs, and its batches may contain a sample twice. The batches of an epoch are shuffled.

    Attributes:
      buckets: the bucket of each sample; any values that can be sorted.
      batch_size: rows of a global batch.
      seed: seed of both shuffles.
    Raises: ClvrError for no samples; UsageError for a batch size below 1 or a negative seed.
    """

    buckets: tuple[Bucket, ...]
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.buckets:
            raise ClvrError("batch plan: there are no samples")
        if self.batch_size < 1 or self.seed < 0:
            raise UsageError(f"batch plan: batch_size {self.batch_size} and seed {self.seed} must be positive")

    def __call__(self, step: int) -> tuple[int, ...]:
        """Returns the indices of the samples in the global batch of `step`, from 0."""
        epoch = self.epoch(step)
        first, last = self._batches(epoch), self._batches(epoch + 1)
        ends = np.cumsum(last - first)
        order = np.random.default_rng((self.seed, _BATCHES, epoch)).permutation(ends[-1])
        place = order[step - self.steps(epoch)]
        bucket = int(np.searchsorted(ends, place, side="right"))
        return self._samples(bucket, int(last[bucket] - ends[bucket] + place))

    def epoch(self, step: int) -> int:
        """Returns the epoch of `step`; both count from 0."""
        # Each bucket has had all but at most half a batch of its samples.
        most = (step + 1 + len(self._members)) * self.batch_size // len(self.buckets) + 1
        return bisect.bisect_right(range(most + 1), step, key=self.steps) - 1

    def steps(self, epochs: int) -> int:
        """Returns the number of steps in the first `epochs` epochs."""
        return int(self._batches(epochs).sum())

    def _batches(self, epochs: int) -> np.ndarray:
        """Returns the number of batches of each bucket after `epochs` epochs, (buckets,) int."""
        # Rounded to nearest: rounded down, rare buckets would come late, or never in a short run.
        half = self.batch_size // 2
        return np.array([(len(members) * epochs + half) // self.batch_size for members in self._members])

    def _samples(self, bucket: int, batch: int) -> tuple[int, ...]:
        """Returns the indices of the samples in batch `batch` of a bucket's stream."""
        members = self._members[bucket]
        cycles, places = np.divmod(np.arange(batch * self.batch_size, (batch + 1) * self.batch_size), len(members))
        orders = {
            cycle: np.random.default_rng((self.seed, _SAMPLES, bucket, cycle)).permutation(members)
            for cycle in set(cycles.tolist())
        }
        return tuple(int(orders[cycle][place]) for cycle, place in zip(cycles.tolist(), places, strict=True))

    @cached_property
    def _members(self) -> list[np.ndarray]:
        """The indices of the samples of each bucket, buckets in sorted order."""
        members: dict[Bucket, list[int]] = {bucket: [] for bucket in sorted(set(self.buckets))}
        for sample, bucket in enumerate(self.buckets):
            members[bucket].append(sample)
        return [np.array(samples) for samples in members.values()]
