"""Prefetching of batches: the next one is made in a thread and put on the devices while the current one is used."""

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.typing import ArrayLike

from clvr_jax.errors import UsageError
from clvr_jax.files.json_input import JSON
from clvr_jax.sharding import MeshLayout
from clvr_jax.trees import Batch

IteratorState = Mapping[str, JSON]


@runtime_checkable
class DataIterator(Protocol):
    """Batches of a dataset: this process's rows of each, and a state to resume from.

    The rows of all processes, in the order of their numbers, are the batch; every process returns batches of the same
    shapes at the same step.
    """

    def __next__(self) -> Batch:
        """Returns this process's rows of the next batch, a pytree of NumPy arrays."""
        ...

    def state(self) -> IteratorState:
        """Returns the position in the dataset as JSON values."""
        ...

    def restore(self, state: IteratorState) -> None:
        """Resumes from such a state."""
        ...


Batches = Callable[[int], Batch] | DataIterator
"""step -> the whole batch, a pure function; or a `DataIterator`."""


class DeviceBatch(NamedTuple):
    """A batch on the devices, and the state of the iterator after it."""

    batch: Batch
    iterator_state: IteratorState


def prefetch(
    batches: Batches,
    layout: MeshLayout,
    steps: range,
    gradient_accumulation_steps: int,
    wait: Callable[[Future[DeviceBatch], int], None] | None = None,
) -> Generator[DeviceBatch, None, None]:
    """Yields the batches of some steps, and makes the next one while one is used.

    Args:
      batches: the source; a `DataIterator` is at the first of `steps`.
      layout: gives each device its rows.
      steps: of the run.
      gradient_accumulation_steps: number of microbatches that each batch will be split into.
      wait: called with the batch that is being made, and its step; returns when it is there or has failed.
    Raises: UsageError if a batch cannot be sharded so.
    """

    def make(step: int) -> DeviceBatch:
        is_whole = not isinstance(batches, DataIterator)
        batch = next(batches) if isinstance(batches, DataIterator) else batches(step)
        check_batch(batch, layout, gradient_accumulation_steps, 1 if is_whole else jax.process_count())
        iterator_state = dict(batches.state()) if isinstance(batches, DataIterator) else {}
        return DeviceBatch(shard_batch(batch, layout, is_whole=is_whole), iterator_state)

    with ThreadPoolExecutor(1) as thread:
        next_batch = thread.submit(make, steps[0]) if steps else None
        for step in steps:
            assert next_batch is not None
            if wait is not None:
                wait(next_batch, step)
            batch = next_batch.result()
            next_batch = thread.submit(make, step + 1) if step + 1 < steps.stop else None
            yield batch


def shard_batch(batch: Batch, layout: MeshLayout, *, is_whole: bool = True) -> Batch:
    """Puts a batch on the devices, sharded by rows.

    Args:
      batch: pytree of NumPy arrays.
      layout: of the mesh.
      is_whole: whether every process passes the whole batch, or only its own rows.
    """

    def place(leaf: ArrayLike) -> jax.Array:
        leaf = np.asarray(leaf)
        if not is_whole:
            shape = (leaf.shape[0] * jax.process_count(), *leaf.shape[1:])
            out: jax.Array = jax.make_array_from_process_local_data(
                layout.batch(jax.ShapeDtypeStruct(shape, leaf.dtype)), leaf, shape
            )
            return out
        return jax.make_array_from_callback(leaf.shape, layout.batch(leaf), lambda index: leaf[index])

    return jax.tree.map(place, batch)


def check_batch(batch: Batch, layout: MeshLayout, gradient_accumulation_steps: int, processes: int = 1) -> None:
    """Checks that a batch, of which each of several processes has its rows, can be sharded over a mesh.

    Raises: UsageError if not.
    """
    for count in {leaf.shape[0] * processes for leaf in jax.tree.leaves(batch) if leaf.ndim}:
        if count % (layout.batch_shards * gradient_accumulation_steps) and layout.mesh.size > 1:
            raise UsageError(
                f"a batch of {count} rows cannot be sharded into {layout.batch_shards} parts (mesh axes "
                f"{' x '.join(layout.rules.batch)}) in {gradient_accumulation_steps} microbatches "
                "(gradient_accumulation_steps); change the batch or the mesh"
            )
