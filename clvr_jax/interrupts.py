"""Ctrl-C that nobody can swallow: a flag beside the exception.

Python raises KeyboardInterrupt wherever it happens to be. Inside a callback of JAX the exception is turned into another
error, or only logged, and the run would go on. The flag stays set, so that the next report of progress, or the end of
the command, ends the run as an interrupted one.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_interrupted = threading.Event()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Remembers SIGINT inside the block, where that is possible: in the main thread, if nobody else handles SIGINT.

    The flag is cleared at the end of the block, so that the next call of a program that survives Ctrl-C is not ended.
    """
    _interrupted.clear()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _interrupted.clear()


def is_interrupted() -> bool:
    """Whether SIGINT has come, even if its KeyboardInterrupt was swallowed."""
    return _interrupted.is_set()


def check_interrupt() -> None:
    """Raises KeyboardInterrupt if an earlier one was swallowed."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


def _interrupt(*_: Any) -> None:
    _interrupted.set()
    raise KeyboardInterrupt
