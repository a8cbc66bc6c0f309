"""What the loop reports while it runs, for progress displays. `index` is the prompt's place in the batch."""

from __future__ import annotations

from dataclasses import dataclass

from clvr_jax.reasoning.trajectory import Step, Trajectory
from clvr_jax.reasoning.verification import Verification


@dataclass(frozen=True)
class Replied:
    """The controller replied. `text` is raw; `error` says why it could not be parsed, None if it could."""

    index: int
    attempt: int
    text: str
    error: str | None


@dataclass(frozen=True)
class Generated:
    """A picture was drawn: step number `number` with its picture, price and time."""

    index: int
    number: int
    step: Step


@dataclass(frozen=True)
class RolledBack:
    """Step `number` was worse than step `to`; the history goes back there, to draw again if the budget allows."""

    index: int
    number: int
    to: int


@dataclass(frozen=True)
class Selected:
    """Of the pictures `among`, drawn after the same reply, that of step `number` goes on."""

    index: int
    number: int
    among: tuple[int, ...]


@dataclass(frozen=True)
class Verified:
    """The image of step `number` was verified."""

    index: int
    number: int
    verification: Verification


@dataclass(frozen=True)
class PlanVerified:
    """The plan of reply `attempt` was verified; one that meets all requirements, or the best one, is carried out."""

    index: int
    attempt: int
    verification: Verification


@dataclass(frozen=True)
class Finished:
    """A prompt has left the batch."""

    index: int
    trajectory: Trajectory


Event = Replied | Generated | Verified | PlanVerified | Selected | RolledBack | Finished
