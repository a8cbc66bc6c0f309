"""Batches on their way to the devices: made one ahead in a thread, laid out over the mesh, their position known."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from clvr_jax.errors import UsageError
from clvr_jax.sharding import MeshLayout

Batch = Any
Position = Mapping[str, Any]


@runtime_checkable
class Input(Protocol):
    """Batches from a dataset: this process's rows of each, and a position to go on from.

    The rows of all processes, in the order of their numbers, are the batch; every process gives batches of the same
    shapes at the same step.
    """

    def __next__(self) -> Batch:
        """This process's rows of the next batch, a pytree of NumPy arrays."""
        ...

    def state(self) -> Position:
        """Where it stands, as JSON can hold it."""
        ...

    def restore(self, state: Position) -> None:
        """Goes on from such a state."""
        ...


Batches = Callable[[int], Batch] | Input
"""step -> the whole batch, a pure function; or an `Input`."""


class Fed(NamedTuple):
    """A batch on the devices, and the position after it."""

    batch: Batch
    position: Position


def feed(batches: Batches, layout: MeshLayout, steps: range, accumulate: int) -> Iterator[Fed]:
    """The batches of some steps, the next one made while this one is used.

    Args:
      batches: the source; an `Input` stands where the first of `steps` begins.
      layout: gives each device its rows.
      steps: which.
      accumulate: parts that each batch will be cut into.
    Raises: UsageError if a batch cannot be cut so.
    """

    def make(step: int) -> Fed:
        if isinstance(batches, Input):
            rows = next(batches)
            return Fed(_place(rows, layout, accumulate, is_whole=False), dict(batches.state()))
        return Fed(_place(batches(step), layout, accumulate, is_whole=True), {})

    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(make, steps[0]) if steps else None
        for step in steps:
            assert following is not None
            fed = following.result()
            following = thread.submit(make, step + 1) if step + 1 < steps.stop else None
            yield fed


def _place(batch: Batch, layout: MeshLayout, accumulate: int, *, is_whole: bool) -> Batch:
    """Puts a batch on the devices; `is_whole`, or the rows of this process."""
    processes = 1 if is_whole else jax.process_count()
    check_batch(batch, layout, accumulate, processes)

    def place(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        if not is_whole:
            shape = (leaf.shape[0] * processes, *leaf.shape[1:])
            return jax.make_array_from_process_local_data(
                layout.batch(jax.ShapeDtypeStruct(shape, leaf.dtype)), leaf, shape
            )
        return jax.make_array_from_callback(leaf.shape, layout.batch(leaf), lambda index: leaf[index])

    return jax.tree.map(place, batch)


def check_batch(batch: Batch, layout: MeshLayout, accumulate: int, processes: int = 1) -> None:
    """Whether a batch, of which each of several processes has its rows, can be cut for a mesh.

    Raises: UsageError if not.
    """
    for count in {leaf.shape[0] * processes for leaf in jax.tree.leaves(batch) if leaf.ndim}:
        if count % (layout.batch_shards * accumulate) and layout.mesh.size > 1:
            raise UsageError(
                f"a batch of {count} rows cannot be cut into {layout.batch_shards} parts (mesh axes "
                f"{' x '.join(layout.rules.batch)}) of {accumulate} pieces (accumulate); change the batch or the mesh"
            )
