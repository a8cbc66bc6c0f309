"""What a slow process costs the others: all of them gather where their time went."""

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float

from clvr_jax.training.monitoring.clock import Goodput
from clvr_jax.training.monitoring.ledger import CATEGORIES, category

_NAMES = tuple(CATEGORIES)
_STEP = _NAMES.index("step")
_WAITING = (_STEP, _NAMES.index("slow_host"))
_NAME_BYTES = 64


@dataclass(frozen=True)
class Delay:
    """A process that held the others up.

    process: its number. host: its name. seconds: for which it did something else while another process was in a step,
    or waited for it. category: of most of them. interval: seconds that were compared.
    """

    process: int
    host: str
    seconds: float
    category: str
    interval: float

    @property
    def is_notable(self) -> bool:
        """Whether it is more than a second and a tenth of the time."""
        return self.seconds > max(1.0, 0.1 * self.interval)

    def report(self, name: str, where: str) -> str:
        """Returns a line for the log, for a task of some name."""
        return (
            f"{name}: {where}: process {self.process} ({self.host}) held the others up for {self.seconds:.1f} of the "
            f"last {self.interval:.1f} s, most of it in {self.category!r}"
        )


class Hosts:
    """Compares the processes of a run from now on; with one process it does nothing.

    All of them end a step together, because their devices exchange data in it: whatever a process does outside of a
    step while the others are in one, they wait for. A process that computes more slowly than the others is not
    found in this way: they wait for it inside of the step, which takes all of them equally long.
    """

    def __init__(self, clock: Goodput) -> None:
        self._clock, self._counted = clock, _by_category(clock)
        self._hosts: list[str] = []

    def compare(self) -> Delay | None:
        """Gathers the seconds of all processes since the last call, and charges what another one cost to "slow_host".

        Every process must call it equally often. Returns: who held the others up, None if there is one process.
        """
        if jax.process_count() == 1:
            return None
        now = _by_category(self._clock)
        own, self._counted = now - self._counted, now
        with self._clock.phase("slow_host"):  # the first ones wait here for the last one
            rows_pc = np.asarray(multihost_utils.process_allgather(own))
            if not self._hosts:
                self._hosts = _gather_names()
        steps_p = rows_pc[:, _STEP]
        self._clock.move(float(steps_p[jax.process_index()] - steps_p.min()), "step", "slow_host")
        return delay(rows_pc, self._hosts)


def delay(rows_pc: Float[np.ndarray, "p c"], hosts: Sequence[str]) -> Delay:
    """Returns the process that spent the longest time outside of steps.

    Args:
      rows_pc: seconds of each process in each category since they last waited for one another.
      hosts: name of each process's host.
    """
    busy_pc = rows_pc.copy()
    busy_pc[:, _WAITING] = 0
    busy_p = busy_pc.sum(1)
    slowest = int(busy_p.argmax())
    excess_c = busy_pc[slowest] - busy_pc.min(0)
    return Delay(
        slowest,
        hosts[slowest],
        float(busy_p[slowest] - busy_p.min()),
        _NAMES[int(excess_c.argmax())],
        float(rows_pc[slowest].sum()),
    )


def _by_category(clock: Goodput) -> Float[np.ndarray, " c"]:
    total = clock.total()
    return np.array([sum(each for name, each in total.items() if category(name) == one) for one in _NAMES], np.float64)


def _gather_names() -> list[str]:
    own = np.zeros(_NAME_BYTES, np.uint8)
    name = socket.gethostname().encode()[:_NAME_BYTES]
    own[: len(name)] = np.frombuffer(name, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(own))
    return [bytes(row[row > 0]).decode(errors="replace") for row in rows]


class Reports:
    """Limits lines of the log: one for each key in so many seconds."""

    def __init__(self, seconds: float = 300.0):
        self._seconds = seconds
        self._printed: dict[str, float] = {}

    def is_new(self, key: str) -> bool:
        """Returns whether a line with this key may be printed now, and notes that it is."""
        now = time.monotonic()
        if now - self._printed.get(key, -self._seconds) < self._seconds:
            return False
        self._printed[key] = now
        return True
