"""Progress for people: a bar on a terminal, plain lines elsewhere.

Progress is never worth the work that it reports on: if stderr is full or closed, nothing is shown and work goes on.
"""

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clvr_jax.interrupts import check_interrupt


class _Stderr:
    """The stderr of the moment; what it cannot take is dropped."""

    @property
    def _stream(self) -> Any:
        # A progress bar puts a proxy in place of sys.stderr that writes through the console, which writes here.
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


# ESC and its like, and those that turn the direction of writing; tabs and line breaks are no commands.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_MOST_CHARACTERS, _LAST_CHARACTERS = 1800, 400
"""Characters of a line of error, and of its end, which says what to do."""

console = Console(file=cast(IO[str], _Stderr()), soft_wrap=True, highlight=False)


def without_controls(text: str) -> str:
    """Returns a text with escapes in place of characters that command a terminal; files and servers may send them."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def complain(message: str) -> None:
    """Prints one line on stderr, whatever the message holds."""
    stderr = _Stderr()
    line = without_controls(" ".join(message.split())).encode("utf-8", "backslashreplace").decode()
    if len(line) > _MOST_CHARACTERS:  # names from files and servers may have any length
        line = f"{line[: _MOST_CHARACTERS - _LAST_CHARACTERS]} ... {line[-_LAST_CHARACTERS:]}"
    stderr.write(f"clvr: {line}\n")
    stderr.flush()


class Advance(Protocol):
    """Tells a progress display that `done` units are finished, with a short note such as the loss."""

    def __call__(self, done: int, note: str = "") -> None:
        """Reports that `done` units are finished."""


@contextmanager
def progress(title: str, total: int, start: int = 0, seconds_between_lines: float = 15.0) -> Iterator[Advance]:
    """Shows work of `total` units that begins at `start`; yields the function to report with.

    On a terminal it draws a bar; elsewhere it prints a line at most every `seconds_between_lines`, and always the last.
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
