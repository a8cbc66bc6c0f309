"""Graceful shutdown: SIGTERM and the first Ctrl-C ask a run to save and stop, on every host at the same point."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils

from clvr_jax.display.console import console

SignalHandler = Callable[[int, FrameType | None], object]

_stopped = threading.Event()
_NOTICE = b"\nclvr: saving a checkpoint first; press Ctrl-C again to end at once\n"


def was_stopped() -> bool:
    """Returns whether a run of this process stopped before its end, because this process or another one was asked."""
    return _stopped.is_set()


class GracefulShutdown:
    """Whether the run was asked to stop, and whether a person did so with Ctrl-C."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._interrupted = threading.Event()
        self._is_agreed = False
        self._sync_points = 0
        self._message = "a checkpoint is saved, --resume continues the run"

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C (SIGINT) asked."""
        return self._interrupted.is_set()

    def request(self, *_: object) -> None:
        """Asks the run to stop, as SIGTERM does."""
        self._requested.set()

    def interrupt(self) -> None:
        """Asks the run to stop, as the first Ctrl-C does."""
        self._interrupted.set()
        if jax.process_count() == 1:
            self._requested.set()
        else:
            signal.raise_signal(signal.SIGTERM)  # the coordination service notifies the other processes

    def should_stop(self) -> bool:
        """Returns whether the run was asked to stop: with several processes, on all of them at the same call.

        Every process of a run must call it equally often and in the same places.
        """
        if jax.process_count() == 1:
            return self._requested.is_set()
        # The coordination service, which JAX starts with several processes, catches the signal itself. It picks the
        # number of one future sync point, so that the numbers must have no gaps.
        is_reached = multihost_utils.reached_preemption_sync_point(self._sync_points)
        self._sync_points += 1
        self._is_agreed |= bool(is_reached) or self._requested.is_set()
        return self._is_agreed

    def report(self, name: str, saved: str) -> None:
        """Prints that the run stops and how it is resumed; after Ctrl-C the KeyboardInterrupt says it instead.

        Args:
          name: of the task.
          saved: what is saved, "step 12".
        """
        _stopped.set()
        if self.is_interrupted:
            self._message = f"{name}: {saved} is saved, --resume continues the run"
        else:
            console.print(f"{name}: asked to stop; {saved} is saved, --resume continues the run")

    def finish(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C asked the run to stop.

        With several processes it does not if the run was complete before all of them stopped: they export it together.
        """
        if self.is_interrupted and (jax.process_count() == 1 or self._is_agreed):
            raise KeyboardInterrupt(f"interrupted; {self._message}")


@contextmanager
def graceful_shutdown() -> Iterator[GracefulShutdown]:
    """Catches SIGTERM and the first SIGINT inside the block, where handlers can be set: in the main thread.

    A second SIGINT does what SIGINT did before. SIGINT stays ignored where it is ignored, as shells do for background
    jobs. SIGTERM is left alone where several processes make the run, since JAX catches it.

    Raises: KeyboardInterrupt at the end of a block that SIGINT has asked to stop.
    """
    shutdown = GracefulShutdown()
    if threading.current_thread() is not threading.main_thread():
        yield shutdown
        return
    with contextlib.ExitStack() as stack:
        if jax.process_count() == 1:
            stack.enter_context(_handled(signal.SIGTERM, shutdown.request))
        before = signal.getsignal(signal.SIGINT)
        if callable(before):
            stack.enter_context(_handled(signal.SIGINT, _first_interrupt(shutdown, before)))
        yield shutdown
    shutdown.finish()


@contextmanager
def _handled(number: int, handler: SignalHandler) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL if before is None else before)  # None: not Python's own handler


def _first_interrupt(shutdown: GracefulShutdown, before: SignalHandler) -> SignalHandler:
    def handle(number: int, frame: FrameType | None) -> None:
        if shutdown.is_interrupted:
            before(number, frame)
            return
        shutdown.interrupt()
        with contextlib.suppress(OSError):
            os.write(2, _NOTICE)  # a handler may run inside of a write to sys.stderr

    return handle
