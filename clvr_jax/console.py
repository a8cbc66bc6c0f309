"""Progress for people: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, soft_wrap=True, highlight=False)


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
            yield lambda done, note="": bar.update(task, completed=done, note=note)
        return
    last = time.monotonic() - seconds_between_lines

    def line(done: int, note: str = "") -> None:
        nonlocal last
        if done >= total or time.monotonic() - last >= seconds_between_lines:
            last = time.monotonic()
            print(f"{title}  {done}/{total}  {note}".rstrip(), file=sys.stderr, flush=True)

    yield line
