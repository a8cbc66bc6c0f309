"""What one prompt may cost, and the account that says when it is spent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from clvr_jax.errors import UsageError

StopWhen = Literal["controller", "verified", "drawn"]


@dataclass(frozen=True)
class Budget:
    """Hard limits for one prompt. When one is reached the last picture is still judged, then the best one is returned.

    The first drawing is always made: nobody knows its price before.

    Attributes:
      max_steps: drawings, rolled-back ones and other candidates included.
      max_nfe: network evaluations. A drawing is not begun if it would exceed the limit at the price of the dearest
        drawing so far. None: no limit.
      max_seconds: wall-clock seconds since the run began, of the whole batch; no further drawing begins after that.
        None: no limit.
      max_parse_retries: how often a reply that cannot be parsed is asked for again, per reply.
      max_rollbacks: how often the loop returns to the same picture after a worse one before it continues from the
        latest; 0 never rolls back.
      max_plan_retries: how often a plan that the verifier finds to miss a requirement is made again before the best of
        the plans is carried out; 0 takes every plan as it is. Without effect where no verifier checks plans.
      candidates: images generated for each reply, as many of them as the limits allow. Each is verified, the best one
        goes on.
      stop_when: "controller" stops when the controller says so; "verified" also as soon as it finds nothing unmet,
        though it would draw on; "drawn" after the first picture, which nobody looks at.
    """

    max_steps: int = 8
    max_nfe: int | None = None
    max_seconds: float | None = None
    max_parse_retries: int = 2
    max_rollbacks: int = 2
    max_plan_retries: int = 4
    candidates: int = 1
    stop_when: StopWhen = "controller"

    def __post_init__(self) -> None:
        for name, least in (
            ("max_steps", 1),
            ("max_parse_retries", 0),
            ("max_rollbacks", 0),
            ("max_plan_retries", 0),
            ("candidates", 1),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"budget: {name} must be at least {least}, got {getattr(self, name)}")
        for name in ("max_nfe", "max_seconds"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise UsageError(f"budget: {name} must be positive or None, got {limit}")
        if self.stop_when not in get_args(StopWhen):
            raise UsageError(
                f"budget: stop_when must be one of {', '.join(get_args(StopWhen))}, got {self.stop_when!r}"
            )
        if self.stop_when == "drawn" and self.candidates > 1:
            raise UsageError(f"budget: stop_when drawn never judges, so {self.candidates} candidates make no sense")


@dataclass
class Account:
    """What has been spent of a budget."""

    budget: Budget
    steps: int = 0
    nfe: int = 0
    _dearest: int = 0

    def charge(self, nfe: int) -> None:
        """Books one drawing."""
        self.steps += 1
        self.nfe += nfe
        self._dearest = max(self._dearest, nfe)

    def affordable(self, generated: int) -> int:
        """How many of so many drawings of one reply may be begun now; the price of the first ever shows what it is."""
        budget = self.budget
        generated = min(generated, budget.max_steps - self.steps)
        if budget.max_nfe is None:
            return generated
        if not self.steps:
            return min(generated, 1)
        return min(generated, max(0, budget.max_nfe - self.nfe) // self._dearest) if self._dearest else generated

    def spent(self, seconds: float) -> str | None:
        """Which limit forbids another drawing: "step limit", "nfe limit", "time limit", or None if none does.

        Args:
          seconds: wall-clock time since the run began.
        """
        budget = self.budget
        if self.steps >= budget.max_steps:
            return "step limit"
        if budget.max_nfe is not None and self.steps and self.nfe + self._dearest > budget.max_nfe:
            return "nfe limit"
        if budget.max_seconds is not None and self.steps and seconds >= budget.max_seconds:
            return "time limit"
        return None
