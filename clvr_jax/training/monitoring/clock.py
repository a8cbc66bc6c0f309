"""The clock of a run, which charges every second of a process to one category.

The time is that of the main thread, which at any moment is in one phase: what it does, or waits for. XLA's devices
compute asynchronously: a call of a train step returns when the work is handed to them, and the thread waits for the
result later, when it reads metrics. Both count as "step", since the devices compute meanwhile. While the thread waits
for a batch, the devices may still compute earlier steps; that time is "step" too (`input_wait.py`). So "input", "save"
and the other categories hold the time in which the devices have nothing to do, up to what was queued before.

Tracing and compiling happens inside of any phase. JAX reports it, and it is taken out of the phase.
"""

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

import jax

from clvr_jax.display.console import console
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import open_lines
from clvr_jax.files.json_input import JSON, JsonObject
from clvr_jax.training.monitoring import ledger
from clvr_jax.training.monitoring.ledger import FILE, Ledger, read_ledger

_COMPILING = ("/jax/core/compile/", "/clvr_jax/programs/")
"""Beginnings of the names of events that report a duration of tracing, compiling or loading a program."""

_SECONDS_BETWEEN_LINES = 10.0

_active: ContextVar["Goodput | None"] = ContextVar("goodput", default=None)


def active_goodput() -> "Goodput | None":
    """Returns the clock of the run of this thread; None outside of a run, and in threads that a run starts."""
    return _active.get()


def phase(name: str) -> contextlib.AbstractContextManager[None]:
    """Returns a context whose time is charged to a category, or to a phase of one such as "step/sampling".

    Outside of a run, and in threads that a run starts, it does nothing.
    """
    clock = _active.get()
    return contextlib.nullcontext() if clock is None else clock.phase(name)


class Listener(Protocol):
    """Receives what a clock measures; all times are in seconds since 1970."""

    def begin_step(self, iteration: int, time: float) -> None:
        """An iteration begins, the first one with the number 0."""
        ...

    def end_phase(self, name: str, begin: float, end: float) -> None:
        """A phase has ended."""
        ...

    def end(self, reason: str, time: float) -> None:
        """A start of the run has ended."""
        ...


class Goodput:
    """Charges the wall time of this process to categories, and writes it to `goodput.jsonl` in process 0.

    Used as a context, it is the active clock, to which `phase` charges, and its end is recorded.

    Args:
      began: time of the start of the program, in seconds since 1970; now if not given.
    """

    def __init__(self, began: float | None = None):
        now, self._since = time.time(), time.monotonic()
        self.began = min(began or now, now)
        self._since -= now - self.began
        self._stack = ["start"]
        self._seconds: dict[str, float] = {}
        """Since the last line."""
        self._total: dict[str, float] = {}
        self._compiled: list[tuple[float, float]] = []
        self._thread = threading.get_ident()
        self._file: BinaryIO | None = None
        self.is_recording = False
        """Whether it records a run already."""
        self._recorded_at = 0.0
        self._iteration = 0
        self.ledger = Ledger()
        self.end: str = "complete"
        """Why the run ends, if it ends without an exception: "complete", "paused" or "preempted"."""
        self.listeners: list[Listener] = []

    def turn(self, name: str) -> None:
        """Charges the time outside of all phases to a category from now on."""
        self._charge()
        self._stack[0] = name

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charges the time of a block to a name, without the phases inside of it."""
        self._charge()
        self._stack.append(name)
        began = time.time()
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()
            for listener in self.listeners:
                listener.end_phase(name, began, time.time())

    def begin_step(self, iteration: int) -> None:
        """Tells the listeners that an iteration begins."""
        for listener in self.listeners:
            listener.begin_step(iteration, time.time())

    def move(self, seconds: float, source: str, target: str) -> None:
        """Charges seconds of a category, with its phases, to another one, as far as it has them."""
        self._charge()
        names = sorted((name for name in self._seconds if ledger.category(name) == source), key=len)
        for name in names:
            moved = min(seconds, self._seconds[name])
            self._seconds[name] -= moved
            self._seconds[target] = self._seconds.get(target, 0.0) + moved
            seconds -= moved

    def total(self) -> Mapping[str, float]:
        """Returns the seconds of each name since the program started, up to now, without what was moved."""
        self._charge()
        return dict(self._total)

    def open(self, directory: Path, iteration: int, *, resume: bool) -> Ledger:
        """Begins to record a start of the run in a directory, in process 0.

        Args:
          directory: of the run.
          iteration: that it begins or resumes at.
          resume: whether earlier starts belong to the same run.
        Returns: the account of the earlier starts, with what the last one has lost.
        Raises: ClvrError if the file cannot be written.
        """
        path, self._iteration, self.is_recording = directory / FILE, iteration, True
        if jax.process_index() == 0:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                if resume:
                    self.ledger = _earlier(path)
                else:
                    path.unlink(missing_ok=True)
                self._file = open_lines(path)
            except OSError as error:
                raise ClvrError(f"{path}: cannot be written ({error.strerror or error})") from error
        self._write(
            {
                "event": "start",
                "time": round(self.began, 3),
                "iteration": iteration,
                "processes": jax.process_count(),
                "devices": jax.device_count(),
            }
        )
        return self.ledger

    def is_due(self) -> bool:
        """Returns whether the last line is old enough for another one, so that the file stays small."""
        return time.monotonic() - self._recorded_at > _SECONDS_BETWEEN_LINES

    def record(self, iteration: int, end: str | None = None) -> Ledger:
        """Writes what the seconds since the last line were used for.

        Args:
          iteration: number of finished iterations.
          end: why the start ends here; None if it does not.
        Returns: the account up to now.
        Raises: ClvrError if the file cannot be written.
        """
        self._charge()
        seconds, self._seconds = self._seconds, {}
        self._iteration, self._recorded_at = iteration, time.monotonic()
        row = ledger.line(time.time(), iteration, seconds)
        if end is not None:
            row["end"] = end
        self._write(row)
        return self.ledger

    def _write(self, row: dict[str, JSON]) -> None:
        self.ledger.add(JsonObject(row, FILE))
        if self._file is None:
            return
        line = json.dumps(row).encode() + b"\n"
        try:
            # Unbuffered: what is written survives a process that is killed.
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._file.flush()
        except OSError as error:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                file.close()
            raise ClvrError(f"{file.name}: cannot be written ({error.strerror or error})") from error

    def _charge(self) -> None:
        """Charges the time since the last call to the current phase, and what was compiled in it to "compile"."""
        now = time.monotonic()
        compiled = sum(end - max(begin, self._since) for begin, end in self._compiled)
        self._compiled = []
        self._add(self._stack[-1], now - self._since - compiled)
        self._add("compile", compiled)
        self._since = now

    def _add(self, name: str, seconds: float) -> None:
        if seconds > 0:
            for found in (self._seconds, self._total):
                found[name] = found.get(name, 0.0) + seconds

    def _on_duration(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Notes an interval of tracing or compiling of the main thread, which may contain earlier ones."""
        if event.startswith(_COMPILING) and threading.get_ident() == self._thread:
            end = time.monotonic()
            begin = end - duration_secs
            self._compiled = [each for each in self._compiled if each[1] <= begin]
            self._compiled.append((begin, end))

    def __enter__(self) -> Self:
        self._token = _active.set(self)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.reset(self._token)
        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        if self._file is None:
            return
        end = self.end if kind is None else "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        try:
            self.record(self._iteration, end)
            for listener in self.listeners:
                listener.end(end, time.time())
        except ClvrError:
            if error is None:
                raise
        finally:
            if self._file is not None:
                self._file.close()


def _earlier(path: Path) -> Ledger:
    """Returns the account of the earlier starts; a damaged file is put aside, since a run does not depend on it."""
    try:
        return read_ledger(path)
    except ClvrError as error:
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        console.print(f"{error}; it is {aside.name} now, and the goodput is counted anew", markup=False)
        return Ledger()


def process_began() -> float:
    """Returns the time of the start of this process, in seconds since 1970, where Linux tells it; else now.

    A program that trains several times starts once: after the first call it is now.
    """
    global _is_counted
    if _is_counted:
        return time.time()
    _is_counted = True
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])  # field 22 of the line, counted from 1
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.time()
    return time.time() - age


_is_counted = False
