"""Which samples make up the batch of each step: batches of one shape, the same on every process, at random access.

Every process computes the same plan from the shapes of all samples and loads its own rows of each batch. So no process
waits for another's shape, and a position in the data is one number.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from clvr_jax.errors import ClvrError, UsageError

_BATCHES, _SAMPLES = range(2)
"""What is shuffled; each has a seed of its own."""


def length_bounds(lengths: Sequence[int], max_padding: float, multiple: int = 1) -> tuple[int, ...]:
    """The fewest lengths to pad to that keep the share of padding at or below `max_padding`.

    Args:
      lengths: of all samples, at least one.
      max_padding: share of padding among all tokens, in [0, 1).
      multiple: bounds are multiples of it, or of its half, its quarter ... if whole ones leave too much padding.
    Returns: bounds, rising; the last holds the longest sample. Among equally many bounds they are those with the
      least padding.
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
    # sizes[j]: fewest tokens, padding included, of the samples below tops[j] with as many bounds as there were rounds.
    sizes = np.concatenate([[0.0], np.full(len(tops), np.inf)])
    choices: list[np.ndarray] = []
    while sizes[-1] > allowed:
        if len(choices) == len(tops):
            return length_bounds(lengths, max_padding, multiple // 2)
        # One more bound, tops[j - 1], for the samples from i on; i < j.
        costs = sizes[None, :-1] + (before[1:, None] - before[None, :-1]) * tops[:, None]
        costs[np.triu_indices(len(tops), 1)] = np.inf
        choices.append(costs.argmin(axis=1))
        sizes = np.concatenate([[0.0], costs.min(axis=1)])
    bounds, end = [], len(tops)
    for choice in reversed(choices):
        bounds.append(int(tops[end - 1]))
        end = int(choice[end - 1])
    return tuple(reversed(bounds))


@dataclass(frozen=True)
class BatchPlan:
    """An endless, shuffled sequence of batches whose samples are all of one bucket.

    The samples of a bucket come in one random order after another, and its batches are cut from that stream. None is
    dropped: a bucket has had all its samples e times after e epochs, give or take half a batch; one with fewer samples
    than a batch waits several epochs, and its batches may hold a sample twice. The batches of an epoch are shuffled.

    buckets: of each sample; anything that can be sorted.
    batch_size: rows of a global batch.
    seed: of both shuffles.
    """

    buckets: tuple[Any, ...]
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.buckets:
            raise ClvrError("batch plan: there are no samples")
        if self.batch_size < 1 or self.seed < 0:
            raise UsageError(f"batch plan: batch_size {self.batch_size} and seed {self.seed} must be positive")

    def __call__(self, step: int) -> tuple[int, ...]:
        """The samples of the global batch of `step`, from 0: a function of the plan and the step alone."""
        epoch = self.epoch(step)
        first, last = self._batches(epoch), self._batches(epoch + 1)
        ends = np.cumsum(last - first)
        order = np.random.default_rng((self.seed, _BATCHES, epoch)).permutation(ends[-1])
        place = order[step - self.steps(epoch)]
        bucket = int(np.searchsorted(ends, place, side="right"))
        return self._samples(bucket, int(last[bucket] - ends[bucket] + place))

    def epoch(self, step: int) -> int:
        """The epoch that `step` belongs to, from 0."""
        # No bucket is a whole batch behind.
        most = (step + 1 + len(self._members)) * self.batch_size // len(self.buckets) + 1
        return bisect.bisect_right(range(most + 1), step, key=self.steps) - 1

    def steps(self, epochs: int) -> int:
        """How many steps the first `epochs` epochs have."""
        return int(self._batches(epochs).sum())

    def _batches(self, epochs: int) -> np.ndarray:
        """How many batches each bucket has had after `epochs` epochs."""
        # Rounded, not cut: rare buckets would come late, or never in a short run.
        half = self.batch_size // 2
        return np.array([(len(members) * epochs + half) // self.batch_size for members in self._members])

    def _samples(self, bucket: int, batch: int) -> tuple[int, ...]:
        """Batch number `batch` of a bucket's stream."""
        members = self._members[bucket]
        cycles, places = np.divmod(np.arange(batch * self.batch_size, (batch + 1) * self.batch_size), len(members))
        orders = {
            cycle: np.random.default_rng((self.seed, _SAMPLES, bucket, cycle)).permutation(members)
            for cycle in set(cycles.tolist())
        }
        return tuple(int(orders[cycle][place]) for cycle, place in zip(cycles.tolist(), places, strict=True))

    @cached_property
    def _members(self) -> list[np.ndarray]:
        """The samples of each bucket, buckets in order."""
        members: dict[Any, list[int]] = {bucket: [] for bucket in sorted(set(self.buckets))}
        for sample, bucket in enumerate(self.buckets):
            members[bucket].append(sample)
        return [np.array(samples) for samples in members.values()]
