"""Events that the loop reports while it runs, for progress displays. `index` is the position of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

from clvr_jax.reasoning.trajectories.edits import Edit
from clvr_jax.reasoning.trajectories.trajectory import Step, Trajectory
from clvr_jax.reasoning.verification.verification import Verification


@dataclass(frozen=True)
class Replied:
    """The controller replied.

    Attributes:
      attempt: number of earlier replies at this step.
      text: the raw reply.
      error: why the reply could not be parsed; None if it could.
    """

    index: int
    attempt: int
    text: str
    error: str | None


@dataclass(frozen=True)
class Generated:
    """The image of step `number` was generated."""

    index: int
    number: int
    step: Step


@dataclass(frozen=True)
class RolledBack:
    """The loop returns to step `to`, because step `number` was worse or because the user asked for it."""

    index: int
    number: int
    to: int


@dataclass(frozen=True)
class Selected:
    """Step `number` was selected from the candidates `among`, which were generated from one reply."""

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
    """The plan in reply `attempt` was verified. The first accepted plan, or else the best one, is carried out."""

    index: int
    attempt: int
    verification: Verification


@dataclass(frozen=True)
class Edited:
    """The user changed the loop."""

    index: int
    edit: Edit


@dataclass(frozen=True)
class Finished:
    """The loop has ended for this prompt."""

    index: int
    trajectory: Trajectory


Event = Replied | Generated | Verified | PlanVerified | Selected | RolledBack | Edited | Finished
