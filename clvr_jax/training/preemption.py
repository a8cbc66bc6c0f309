"""Leaving in good order: SIGTERM and the first Ctrl-C ask a run to save and stop, on every host at the same step."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clvr_jax.console import console

_HEARD = b"\nclvr: saving a checkpoint first; press Ctrl-C again to end at once\n"


class Preemption:
    """Whether the run was asked to stop, and whether a person did so with Ctrl-C."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._interrupted = threading.Event()
        self._is_stopped = False
        self._saved = "a checkpoint is saved, --resume continues the run"

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C (SIGINT) asked."""
        return self._interrupted.is_set()

    def ask(self, *_: Any) -> None:
        """Asks, as SIGTERM does."""
        self._asked.set()

    def interrupt(self) -> None:
        """Asks, as the first Ctrl-C does."""
        self._interrupted.set()
        if jax.process_count() == 1:
            self._asked.set()
        else:
            signal.raise_signal(signal.SIGTERM)  # the coordination service tells the other processes

    def reached(self, step: int) -> bool:
        """True, on every process at the same step, once one was asked."""
        if jax.process_count() == 1:
            return self._asked.is_set()
        # The coordination service, which JAX starts with several processes, catches the signal itself.
        self._is_stopped |= bool(multihost_utils.reached_preemption_sync_point(step)) or self._asked.is_set()
        return self._is_stopped

    def report(self, name: str, saved: str) -> None:
        """Says that the run stops and how it goes on; after Ctrl-C this is the message of the KeyboardInterrupt.

        Args:
          name: of the task.
          saved: what is saved, "step 12".
        """
        if self.is_interrupted:
            self._saved = f"{name}: {saved} is saved, --resume continues the run"
        else:
            console.print(f"{name}: asked to stop; {saved} is saved, --resume continues the run")

    def end(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C asked.

        With several processes not if the run was complete before all of them stopped: the others export it, together.
        """
        if self.is_interrupted and (jax.process_count() == 1 or self._is_stopped):
            raise KeyboardInterrupt(f"interrupted; {self._saved}")


@contextmanager
def preemption() -> Iterator[Preemption]:
    """Catches SIGTERM and the first SIGINT while it lasts, where handlers can be set: in the main thread.

    A second SIGINT does what SIGINT did before. SIGINT is left alone where it is ignored, as shells do for jobs in the
    background, and SIGTERM where several processes make the run, since JAX catches it.

    Raises: KeyboardInterrupt at the end of a block that SIGINT has asked to stop.
    """
    asked = Preemption()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    with contextlib.ExitStack() as stack:
        if jax.process_count() == 1:
            stack.enter_context(_handled(signal.SIGTERM, asked.ask))
        before = signal.getsignal(signal.SIGINT)
        if callable(before):
            stack.enter_context(_handled(signal.SIGINT, _first_interrupt(asked, before)))
        yield asked
    asked.end()


@contextmanager
def _handled(number: int, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL if before is None else before)  # None: not Python's own handler


def _first_interrupt(asked: Preemption, before: Any) -> Any:
    def handle(number: int, frame: Any) -> None:
        if asked.is_interrupted:
            before(number, frame)
            return
        asked.interrupt()
        with contextlib.suppress(OSError):
            os.write(2, _HEARD)  # a handler may run inside of a write to sys.stderr

    return handle


def agreed(decision: bool) -> bool:
    """Process 0's decision, on every process: clocks differ, and what all take part in must begin together."""
    if jax.process_count() == 1:
        return decision
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(decision)))
