"""The input pipeline of supervised fine-tuning: batches by step, and a Grain iterator whose state is the step.

    loader = BatchLoader(GenerationExamples(TrajectoryDataset(directory), tokenizer), batch_size=32)
    batches = Batches(loader)

`loader(step)` returns the batch of a step; `next(batches)` returns the batches in order, from a prefetch buffer.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Self

import jax
import numpy as np

from clvr_jax.data.batch_plan import BatchPlan
from clvr_jax.data.sft_examples import Examples
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.json_input import JSON, JsonObject
from clvr_jax.training_packages import training_package
from clvr_jax.trees import Batch

if TYPE_CHECKING:
    import grain

_ENDLESS = 2**48
_ROWS = 2
"""Stream of the random generators of rows, different from the streams of `BatchPlan`."""


class BatchLoader:
    """(step) -> this process's rows of the global batch of that step, which has one shape on all processes.

    Attributes:
      plan: the batch plan.
      fingerprint: equal for loaders of the same global batches; compared between processes and with a saved state.

    Args:
      examples: the examples.
      batch_size: rows of a global batch, a multiple of `process_count`.
      seed: seed of order and dropout.
      process_index, process_count: those of JAX if None. A resumed run may have another number of processes; the global
        batches are the same.
    Raises: UsageError for a process index out of range, or a batch size that is no multiple of the process count.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        *,
        seed: int = 0,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        index = jax.process_index() if process_index is None else process_index
        count = jax.process_count() if process_count is None else process_count
        if not 0 <= index < count:
            raise UsageError(f"batch loader: process_index {index} of {count} processes")
        if batch_size % count:
            raise UsageError(f"batch loader: batch_size {batch_size} is no multiple of the {count} processes")
        self.plan = BatchPlan(tuple(sample.bucket for sample in examples.samples), batch_size, seed)
        self._examples = examples
        self._rows = range(batch_size)[index * batch_size // count : (index + 1) * batch_size // count]
        content = repr((batch_size, seed, examples.samples)).encode(errors="backslashreplace")
        self.fingerprint = hashlib.blake2b(content, digest_size=8).hexdigest()

    def __call__(self, step: int) -> Batch:
        """Returns the rows of step `step`, from 0, as a function of the loader's arguments and the step."""
        numbers = self.plan(step)
        samples = [self._examples.samples[numbers[row]] for row in self._rows]
        rngs = [np.random.default_rng((self.plan.seed, _ROWS, step, row)) for row in self._rows]
        return self._examples.batch(samples, rngs)


class Batches(Iterator[Batch]):
    """An endless iterator over the batches of a loader, prefetched by Grain.

    Args:
      loader: makes the batches.
      threads: number of threads that prepare batches.
      prefetch: size of the prefetch buffer of a process, in batches.
      workers: number of worker processes that prepare batches; 0 uses threads of this process. No batch depends on
        threads, prefetch or workers.
    Raises: UsageError for threads or prefetch below 1, or negative workers.
    """

    def __init__(self, loader: BatchLoader, *, threads: int = 4, prefetch: int = 8, workers: int = 0):
        if threads < 1 or prefetch < 1 or workers < 0:
            raise UsageError(f"batches: {threads} threads, {prefetch} prefetched, {workers} workers")
        self._loader, self._threads, self._prefetch, self._workers = loader, threads, prefetch, workers
        self._step = 0
        self._iterator: grain.DatasetIterator[Batch] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        self._step += 1
        return _copied(batch) if self._workers else batch

    def state(self) -> Mapping[str, JSON]:
        """Returns the iterator state after the latest batch, in types of JSON."""
        return {"step": self._step, "input": self._loader.fingerprint}

    def restore(self, state: Mapping[str, JSON]) -> None:
        """Continues after the batch at which `state` was saved.

        Raises: ClvrError if the state belongs to other data or other batches.
        """
        if state.get("input") != self._loader.fingerprint:
            raise ClvrError(
                "batches: the saved state belongs to other batches; restore it with the dataset, tokenizer, batch "
                "size and seed it was saved with"
            )
        self.close()
        self._step = JsonObject(state, "batches: the saved state").integer("step", low=0)

    def close(self) -> None:
        """Stops prefetching; the next batch starts it again."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator.close()

    def _start(self) -> "grain.DatasetIterator[Batch]":
        grain = training_package("grain")

        steps = grain.MapDataset.range(_ENDLESS)[self._step :].map(self._loader)
        threads = min(self._threads, self._prefetch)
        batches = steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self._prefetch))
        if self._workers:
            # Grain reads absl flags here, which are not parsed in a program without absl.app.
            flags = training_package("absl.flags")
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        return iter(batches)


def _copied(batch: Batch) -> Batch:
    """Copies arrays out of shared memory of a worker, which would not be freed if the program ended while using it."""
    return {name: np.array(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}
