"""Queues by key: works of one key share a batch, and the largest group goes first.

Loops that wait at the same stage form a group. The largest group moves through the stages together and takes along
those that it meets, so loops get into step and their batches grow. If each key had its turn in a round, small groups
would be performed as soon as they form, and loops would stay out of step. A key that was passed over `MAX_PASSES` times
is next, whatever its size, so none waits forever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
MAX_PASSES = 12
"""How many batches of other keys a key that is ready lets pass. A loop has about six stages, so a group that moves
through them comes by earlier."""


@dataclass
class _Queue(Generic[Item]):
    """Items with the time from which each may be performed alone, and how often others were performed meanwhile."""

    items: deque[tuple[float, Item]] = field(default_factory=deque)
    passes: int = 0


class GroupQueues(Generic[Item]):
    """Queues by key. Not safe for several threads; the scheduler holds its lock.

    Args:
      max_batch: maximum number of items in a batch.
    """

    def __init__(self, max_batch: int):
        self._max_batch = max_batch
        self._queues: dict[Hashable, _Queue[Item]] = {}

    def __len__(self) -> int:
        return sum(len(queue.items) for queue in self._queues.values())

    def add(self, key: Hashable, item: Item, ready: float) -> None:
        """Appends an item.

        Args:
          key: items with equal keys share a batch.
          item: what is performed.
          ready: the time, in seconds of a monotonic clock, until which it waits for others to share its batch, unless
            the batch is full or one of its items is ready.
        """
        self._queues.setdefault(key, _Queue()).items.append((ready, item))

    def remove(self, is_removed: Callable[[Item], bool]) -> list[Item]:
        """Removes and returns the items for which the function is true."""
        removed = []
        for key, queue in list(self._queues.items()):
            removed += [item for _, item in queue.items if is_removed(item)]
            queue.items = deque(entry for entry in queue.items if not is_removed(entry[1]))
            if not queue.items:
                del self._queues[key]
        return removed

    def next_batch(self, now: float) -> tuple[Any, list[Item]] | None:
        """Removes and returns the next batch with its key; None if no key is ready."""
        ready = [key for key in self._queues if self._ready_at(key) <= now]
        if not ready:
            return None
        chosen = max(ready, key=self._priority)
        for key in ready:
            self._queues[key].passes += 1
        return chosen, self._take(chosen)

    def seconds_until_ready(self, now: float) -> float | None:
        """Returns the seconds until a key is ready, 0 if one is; None if there are no items."""
        return max(0.0, min(map(self._ready_at, self._queues)) - now) if self._queues else None

    def _priority(self, key: Hashable) -> tuple[bool, int, int]:
        """Returns what is compared: a key that waited too long, the larger batch, the longer wait."""
        queue = self._queues[key]
        return queue.passes >= MAX_PASSES, min(len(queue.items), self._max_batch), queue.passes

    def _ready_at(self, key: Hashable) -> float:
        items = self._queues[key].items
        return float("-inf") if len(items) >= self._max_batch else min(ready for ready, _ in items)

    def _take(self, key: Hashable) -> list[Item]:
        queue = self._queues[key]
        batch = [queue.items.popleft()[1] for _ in range(min(self._max_batch, len(queue.items)))]
        queue.passes = 0
        if not queue.items:
            del self._queues[key]
        return batch
