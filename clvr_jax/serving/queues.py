"""Fair queues: works of one key share a batch, and device time is divided among the keys.

Deficit round robin over seconds: each visit of a key adds `QUANTUM_SECONDS` to its deficit; its next batch runs as soon
as the deficit covers the seconds that a batch of this key took so far. A key with expensive batches is therefore
visited more often before it runs, and none waits forever.
Source: Shreedhar and Varghese, "Efficient Fair Queuing using Deficit Round Robin" (1995), with seconds for bytes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
QUANTUM_SECONDS = 0.05
_SMOOTHING = 0.3
"""Weight of the latest batch in the average seconds of a key."""
_MAX_KNOWN = 4096
"""Maximum number of keys whose average seconds are kept."""


@dataclass
class _Queue(Generic[Item]):
    items: deque[tuple[float, Item]] = field(default_factory=deque)
    deficit: float = 0.0


class FairQueues(Generic[Item]):
    """Queues by key. Not safe for several threads; the scheduler holds its lock.

    Args:
      max_batch: maximum number of items in a batch.
      window: seconds that the oldest item of a key waits for others, if the batch is not full.
    """

    def __init__(self, max_batch: int, window: float):
        self._max_batch, self._window = max_batch, window
        self._queues: OrderedDict[Hashable, _Queue[Item]] = OrderedDict()
        self._seconds: OrderedDict[Hashable, float] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(queue.items) for queue in self._queues.values())

    def add(self, key: Hashable, item: Item, now: float) -> None:
        """Appends an item that arrived at `now`, in seconds of a monotonic clock."""
        self._queues.setdefault(key, _Queue()).items.append((now, item))

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
        while any(self._ready_at(key) <= now for key in self._queues):
            for key, queue in list(self._queues.items()):
                if self._ready_at(key) > now:
                    continue
                # Before the key's first batch its cost is unknown, and it may run at once.
                if queue.deficit >= self._seconds.get(key, 0.0):
                    return key, self._take(key)
                queue.deficit += QUANTUM_SECONDS
                self._queues.move_to_end(key)  # the end of its turn
        return None

    def seconds_until_ready(self, now: float) -> float | None:
        """Returns the seconds until a key is ready, 0 if one is; None if there are no items."""
        return max(0.0, min(map(self._ready_at, self._queues)) - now) if self._queues else None

    def charge(self, key: Hashable, seconds: float) -> None:
        """Adds the seconds that a batch of this key took; they are subtracted from the key's deficit."""
        known = self._seconds.pop(key, seconds)
        self._seconds[key] = (1 - _SMOOTHING) * known + _SMOOTHING * seconds
        if len(self._seconds) > _MAX_KNOWN:
            self._seconds.popitem(last=False)
        if key in self._queues:
            self._queues[key].deficit -= seconds

    def _ready_at(self, key: Hashable) -> float:
        items = self._queues[key].items
        return items[0][0] + (0.0 if len(items) >= self._max_batch else self._window)

    def _take(self, key: Hashable) -> list[Item]:
        """Removes a batch of a key, whose turn continues while its deficit covers a further batch."""
        items = self._queues[key].items
        batch = [items.popleft()[1] for _ in range(min(self._max_batch, len(items)))]
        if not items:
            del self._queues[key]  # an idle key saves up no device time
        return batch
