"""Leaving in good order: SIGTERM asks a run to save and stop, on every host at the same step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Preemption:
    """Whether the run was asked to stop."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def ask(self, *_: Any) -> None:
        """Asks, as the signal does."""
        self._asked.set()

    def reached(self, step: int) -> bool:
        """True, on every process at the same step, once one was asked."""
        if jax.process_count() == 1:
            return self._asked.is_set()
        # The coordination service, which JAX starts with several processes, catches the signal itself.
        return bool(multihost_utils.reached_preemption_sync_point(step)) or self._asked.is_set()


@contextmanager
def preemption() -> Iterator[Preemption]:
    """Catches SIGTERM while it lasts, where a handler can be set: in the main thread of a single process."""
    asked = Preemption()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, asked.ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def agreed(decision: bool) -> bool:
    """Process 0's decision, on every process: clocks differ, and what all take part in must begin together."""
    if jax.process_count() == 1:
        return decision
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(decision)))
