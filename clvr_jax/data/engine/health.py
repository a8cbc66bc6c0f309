"""The health of the providers of a worker process, estimated from the outcomes of its prompts."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clvr_jax.data.engine.engine import Outcome


@dataclass(frozen=True)
class Held:
    """An outcome that is not written yet; the attributes are the arguments of `OutcomeStore.write`."""

    outcome: Outcome
    usage: Mapping[str, Mapping[str, float]]
    seconds: float
    adapted: Mapping[str, Sequence[str]]


class Health:
    """A counter of consecutive failures; it may be used from many threads.

    An outcome of replies that could not be parsed is held back until another prompt shows that the models work: a
    server that replies nonsense to every request must not use up all prompts.

    Args:
      limit: number of consecutive failures that ends the run.

    Attributes:
      stop: set once the run ends; prompts in flight stop before their next call.
    """

    def __init__(self, limit: int):
        self.stop = threading.Event()
        self._limit, self._in_a_row, self._works = limit, 0, False
        self._held: list[Held] = []
        self._last = ""
        self._lock = threading.Lock()

    @property
    def verdict(self) -> str | None:
        """The reason why the run stops; None while it may continue."""
        if self._in_a_row < self._limit:
            return None
        return (
            f"synth: {self._in_a_row} prompts failed in a row, so the run stops; no prompt is lost, run it again "
            f"once the cause is fixed: {self._last}"
        )

    def failed(self, detail: str) -> None:
        """Counts a prompt for which a provider failed."""
        with self._lock:
            self._count(detail)

    def hold(self, held: Held) -> None:
        """Counts a prompt whose replies could not be parsed, and holds its outcome back."""
        with self._lock:
            self._held.append(held)
            self._count(f"{held.outcome.reason}: {held.outcome.detail}")

    def worked(self) -> list[Held]:
        """Counts a prompt that was finished; returns the held outcomes, which may be written now."""
        with self._lock:
            self._works, self._in_a_row = True, 0
            held, self._held = self._held, []
            return held

    def take_held(self) -> tuple[list[Held], bool]:
        """Returns the outcomes that are still held back at the end of a bundle, and whether they may be written."""
        with self._lock:
            held, self._held = self._held, []
            return held, self._works and self._in_a_row < self._limit

    def _count(self, detail: str) -> None:
        self._in_a_row += 1
        self._last = detail
        if self._in_a_row >= self._limit:
            self.stop.set()
