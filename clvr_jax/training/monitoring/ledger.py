"""The account of a run's wall time, added up from the lines of `goodput.jsonl`.

The file has one JSON object per line, in the order of time. Every start of the run has a line

    {"event": "start", "time": ..., "iteration": ..., "processes": ..., "devices": ...}

whose time is that of the start of the program, in seconds since 1970, and whose iteration is the restored one. The
lines after it say what the seconds since the line before were used for:

    {"time": ..., "iteration": ..., "seconds": {"step": ..., "input": ...}}

The last line of a start that was not killed also has "end": why it ended. Nothing in the file is ever changed. What a
killed start lost is known when the next one begins: iterations after the restored one are computed again.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clvr_jax.errors import ClvrError
from clvr_jax.files.file_names import has_entry
from clvr_jax.files.json_input import JSON, JsonObject, parse_object, stream_lines

FILE = "goodput.jsonl"
"""The file of a run."""

_MAX_SECONDS, _LATEST = 1e9, 1e12

CATEGORIES = {
    "start": "the program starts: imports, the other processes, the model, the data",
    "restore": "a checkpoint is read",
    "compile": "programs are traced, and compiled or loaded",
    "input": "the devices wait for a batch of this process",
    "step": "the devices compute, or this process hands them work",
    "slow_host": "this process waits for another one",
    "save": "a checkpoint is copied, or waited for",
    "evaluation": "grids of sampled images, and what a runner calls so",
    "log": "metrics and profiles are written",
    "export": "the model is exported",
    "lost": "computed again after a restart, and from the end of a killed process to the next start",
    "other": "not named",
}
"""Every second is in one category. After a slash a name may have a phase, such as "step/sampling"."""

PAUSES = ("complete", "interrupted", "paused")
"""Reasons for an end after which the time until the next start is not counted: a person chose it."""


@dataclass
class Ledger:
    """Seconds of a run up to one line of its file.

    seconds: category, or category/phase -> seconds; they add up to `wall`. wall: seconds since the first start,
    without those in which the run was complete or paused by a person. starts: number of starts. iteration: of the last
    line.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    wall: float = 0.0
    starts: int = 0
    iteration: int = 0
    _time: float = 0.0
    _is_paused: bool = True
    _steps: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def add(self, row: JsonObject) -> None:
        """Adds a line. Raises: ClvrError for one that is not of this file."""
        time, iteration = row.number("time", low=0, high=_LATEST), row.integer("iteration", low=0)
        if row.content.get("event") == "start":
            self._begin(time, iteration)
        else:
            seconds = _seconds(row.nested("seconds"))
            self._spend(time, iteration, seconds)
            self._is_paused = row.text("end", "") in PAUSES
        self.iteration = iteration

    def _begin(self, time: float, iteration: int) -> None:
        if not self._is_paused:  # killed, failed or preempted: nobody chose the time without a process
            self._count({"lost/down": max(time - self._time, 0.0)})
        for number, seconds in self._steps:
            if number > iteration:
                self._count({name: -each for name, each in seconds.items()}, is_new=False)
                self._count({"lost/redone": sum(seconds.values())}, is_new=False)
        self._steps = [each for each in self._steps if each[0] <= iteration]
        self.starts += 1
        self._time, self._is_paused = time, False

    def _spend(self, time: float, iteration: int, seconds: Mapping[str, float]) -> None:
        self._count(seconds)
        self._steps.append((iteration, {name: each for name, each in seconds.items() if category(name) == "step"}))
        self._time = time

    def _count(self, seconds: Mapping[str, float], *, is_new: bool = True) -> None:
        for name, each in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + each
        if is_new:
            self.wall += sum(seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the wall time in which steps were computed that are part of the result."""
        return self.shares().get("step", 0.0)

    def shares(self) -> dict[str, float]:
        """Returns the share of each category, and of each phase, in the wall time; those above 0."""
        totals = dict(self.seconds)
        for name, each in self.seconds.items():
            if category(name) != name:
                totals[category(name)] = totals.get(category(name), 0.0) + each
        return {name: each / self.wall for name, each in sorted(totals.items()) if each > 0 and self.wall > 0}

    def scalars(self) -> dict[str, float]:
        """Returns the goodput and the shares by the names of metrics: "goodput", "goodput/input"."""
        return {"goodput": self.goodput, **{f"goodput/{name}": share for name, share in self.shares().items()}}

    def summary(self) -> str:
        """Returns one line, such as "goodput 0.93 of 2 h 10 min: compile 0.04, input 0.02, save 0.01"."""
        shares = self.shares()
        costs = sorted(
            (
                (share, name)
                for name, share in shares.items()
                if name in CATEGORIES and name != "step" and share >= 0.005
            ),
            reverse=True,
        )
        starts = f", {self.starts} starts" if self.starts > 1 else ""
        text = ", ".join(f"{name} {share:.2f}" for share, name in costs)
        return f"goodput {self.goodput:.2f} of {_duration(self.wall)}{starts}" + (f": {text}" if text else "")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def category(name: str) -> str:
    """Returns the category of a name that may have a phase."""
    return name.partition("/")[0]


def read_ledgers(path: Path) -> Iterator[Ledger]:
    """Yields the account of a run at each line of its file, always the same object; nothing if there is no file.

    Raises: ClvrError for a line that is not of this file, unless it is the last one, which a killed process may have
      left incomplete, or precedes a start for the same reason.
    """
    ledger, torn = Ledger(), None
    if not has_entry(path):
        return
    for where, line in stream_lines(path):
        try:
            row = parse_object(line, where)
        except ClvrError as error:
            torn = torn or error
            continue
        if torn is not None and row.content.get("event") != "start":
            raise torn
        torn = None
        ledger.add(row)
        yield ledger


def read_ledger(path: Path) -> Ledger:
    """Returns the account of a run up to now. Raises: as `read_ledgers`."""
    last = deque(read_ledgers(path), maxlen=1)
    return last[0] if last else Ledger()


def _seconds(row: JsonObject) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in row.content:
        found[name] = row.number(name, low=0, high=_MAX_SECONDS)
        if category(name) not in CATEGORIES:
            raise ClvrError(f"{row.where}: {name!r} is no category of wall time; there are {', '.join(CATEGORIES)}")
    return found


def line(time: float, iteration: int, seconds: Mapping[str, float]) -> dict[str, JSON]:
    """Returns the content of a line that says what seconds were used for."""
    rounded = {name: round(each, 4) for name, each in seconds.items() if each > 0 and math.isfinite(each)}
    return {"time": round(time, 3), "iteration": iteration, "seconds": {k: v for k, v in rounded.items() if v > 0}}
