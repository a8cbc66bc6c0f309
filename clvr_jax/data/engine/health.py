"""Whether the providers of a worker process work at all, told from what comes of its prompts."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clvr_jax.data.engine.engine import Outcome


@dataclass(frozen=True)
class Held:
    """An outcome that is not written yet, with what `OutcomeStore.write` takes."""

    outcome: Outcome
    usage: Mapping[str, Mapping[str, float]]
    seconds: float
    adapted: Mapping[str, Sequence[str]]


class Health:
    """Counts prompts that failed one after the other; may be used from many threads.

    An outcome that says only that replies could not be read is held back until another prompt shows that the models
    work: a server that replies nonsense to everyone must not use up all prompts.

    Args:
      limit: failures in a row that end the run.

    Attributes:
      stop: set once the run ends; what is in flight ends at its next call.
    """

    def __init__(self, limit: int):
        self.stop = threading.Event()
        self._limit, self._in_a_row, self._works = limit, 0, False
        self._held: list[Held] = []
        self._last = ""
        self._lock = threading.Lock()

    @property
    def verdict(self) -> str | None:
        """Why the run stops; None as long as it may go on."""
        if self._in_a_row < self._limit:
            return None
        return (
            f"synth: {self._in_a_row} prompts failed one after the other, so the run stops; no prompt is lost, run it "
            f"again once this is mended: {self._last}"
        )

    def failed(self, detail: str) -> None:
        """Counts a prompt that a provider failed."""
        with self._lock:
            self._count(detail)

    def hold(self, held: Held) -> None:
        """Counts a prompt whose replies could not be read, and holds its outcome back."""
        with self._lock:
            self._held.append(held)
            self._count(f"{held.outcome.reason}: {held.outcome.detail}")

    def worked(self) -> list[Held]:
        """Counts a prompt that came to its end; returns the outcomes that may be written now."""
        with self._lock:
            self._works, self._in_a_row = True, 0
            held, self._held = self._held, []
            return held

    def take_held(self) -> tuple[list[Held], bool]:
        """Returns the outcomes that are still held back at the end, and whether they may be written."""
        with self._lock:
            held, self._held = self._held, []
            return held, self._works and self._in_a_row < self._limit

    def _count(self, detail: str) -> None:
        self._in_a_row += 1
        self._last = detail
        if self._in_a_row >= self._limit:
            self.stop.set()
