"""Reliable Ctrl-C: a flag that is set in addition to KeyboardInterrupt.

Python raises KeyboardInterrupt at any point of the program. Inside a callback of JAX the exception becomes another
error or is only logged, and the run would continue. The flag stays set, so that the next progress report, or the end of
the command, ends the run as interrupted.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

_interrupted = threading.Event()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Records SIGINT inside the block; in the main thread only, and only if no other handler is installed.

    The flag is cleared at the end of the block, so that a later call in the same process is not interrupted.
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
    """Returns whether SIGINT was received, even if its KeyboardInterrupt was caught elsewhere."""
    return _interrupted.is_set()


def check_interrupt() -> None:
    """Raises KeyboardInterrupt if an earlier one was caught elsewhere."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


def _interrupt(*_: object) -> None:
    _interrupted.set()
    raise KeyboardInterrupt
