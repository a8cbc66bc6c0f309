"""The events of one job: the device thread appends them, connections follow them and can resume."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

Event = dict[str, Any]
"""{"id": number from 0, above those before it, "type": text, and the event's own fields}."""


class EventLog:
    """An append-only list of events.

    Args:
      loop: the event loop of the connections that follow it; None for a log that is complete.
      events: that there are already.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None, events: Sequence[Event] = ()):
        self._loop, self._events = loop, list(events)
        self._next = max((event["id"] for event in self._events), default=-1) + 1
        self._is_complete = loop is None
        self._lock = threading.Lock()
        self._waiting: set[asyncio.Event] = set()

    @property
    def events(self) -> list[Event]:
        """A copy of all events so far."""
        with self._lock:
            return list(self._events)

    def append(self, kind: str, **fields: Any) -> None:
        """Appends an event; any thread may call it."""
        with self._lock:
            self._events.append({"id": self._next, "type": kind, **fields})
            self._next += 1
        self._wake()

    def skip(self, count: int) -> None:
        """Leaves out this many ids before the next event."""
        with self._lock:
            self._next += count

    @property
    def next_id(self) -> int:
        """The id of the next event."""
        return self._next

    def complete(self) -> None:
        """Ends the log: those who follow it get what is left, and then the end."""
        self._is_complete = True
        self._wake()

    async def follow(self, after: int = -1, keepalive: float = 15.0) -> AsyncIterator[Event | None]:
        """Yields all events with an id above `after`, old and new, until the log is complete.

        Args:
          after: id of the last event that the connection has; -1 for none.
          keepalive: seconds without an event after which None is yielded.
        """
        changed = asyncio.Event()
        with self._lock:
            position = sum(event["id"] <= after for event in self._events)
        self._waiting.add(changed)
        try:
            while True:
                changed.clear()
                is_complete = self._is_complete  # read before the events: none is appended after it is set
                with self._lock:
                    new = self._events[position:]
                for event in new:
                    yield event
                position += len(new)
                if is_complete and not new:
                    return
                if not new:
                    try:
                        await asyncio.wait_for(changed.wait(), keepalive)
                    except TimeoutError:
                        yield None
        finally:
            self._waiting.discard(changed)

    def _wake(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._set_all)

    def _set_all(self) -> None:
        for changed in self._waiting:
            changed.set()
