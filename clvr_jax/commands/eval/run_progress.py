"""Progress of a run, which may begin long after the models have been loaded."""

import contextlib
from collections.abc import Callable, Iterator

from clvr_jax.display.console import Advance, progress


@contextlib.contextmanager
def progress_on_first_report(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function that reports progress; the display begins with the first report."""
    with contextlib.ExitStack() as stack:
        advance: Advance | None = None

        def on_progress(done: int, total: int) -> None:
            nonlocal advance
            if advance is None:
                advance = stack.enter_context(progress(title, total, done))
            advance(done)

        yield on_progress
