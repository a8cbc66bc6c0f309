"""Progress and errors on stderr: a progress bar on a terminal, plain lines elsewhere.

If stderr is full or closed, nothing is printed and the work continues.
"""

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Protocol, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clvr_jax.interrupts import check_interrupt


class _Stderr:
    """The current sys.stderr; output that cannot be written is dropped."""

    @property
    def _stream(self) -> IO[str]:
        # A progress bar replaces sys.stderr by a proxy that prints to the console, which would write here again.
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # full; closed; None in a process without one
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(ValueError, AttributeError):
            return bool(self._stream.isatty())
        return False

    def fileno(self) -> int:
        return int(self._stream.fileno())


# Control characters except tab and line break, and those that change the direction of writing.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_MAX_CHARACTERS, _LAST_CHARACTERS = 1800, 400
"""Maximum characters of an error, and of its end, which says what to do."""

console = Console(file=cast(IO[str], _Stderr()), soft_wrap=True, highlight=False)


def escape_control_characters(text: str) -> str:
    """Returns a text with escapes in place of control characters, which files and servers may contain."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def print_error(message: str) -> None:
    """Prints a message as one line on stderr."""
    stderr = _Stderr()
    line = escape_control_characters(" ".join(message.split())).encode("utf-8", "backslashreplace").decode()
    if len(line) > _MAX_CHARACTERS:  # names from files and servers may have any length
        line = f"{line[: _MAX_CHARACTERS - _LAST_CHARACTERS]} ... {line[-_LAST_CHARACTERS:]}"
    stderr.write(f"clvr: {line}\n")
    stderr.flush()


class Advance(Protocol):
    """Updates a progress display: `done` units are finished; the note is a short text such as the loss."""

    def __call__(self, done: int, note: str = "") -> None:
        """Reports that `done` units are finished."""


@contextmanager
def progress(title: str, total: int, start: int = 0, seconds_between_lines: float = 15.0) -> Iterator[Advance]:
    """Displays the progress of `total` units that begins at `start`; yields the function that updates it.

    On a terminal a bar is shown; elsewhere a line is printed at most every `seconds_between_lines`, and at the end.
    """
    if console.is_terminal:
        columns = (
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, completed=start, note="")

            def move(done: int, note: str = "") -> None:
                check_interrupt()
                bar.update(task, completed=done, note=note)

            yield move
        return
    last, stderr = time.monotonic() - seconds_between_lines, _Stderr()

    def line(done: int, note: str = "") -> None:
        nonlocal last
        check_interrupt()
        if done >= total or time.monotonic() - last >= seconds_between_lines:
            last = time.monotonic()
            stderr.write(f"{title}  {done}/{total}  {note}".rstrip() + "\n")
            stderr.flush()

    yield line
