"""Limits on the cost of one prompt, and the account of what has been spent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from clvr_jax.errors import UsageError

StopWhen = Literal["controller", "verified", "drawn"]


@dataclass(frozen=True)
class Budget:
    """Limits for one prompt. When one is reached, the last image is still verified, and the best image is returned.

    The first image is always generated, since its cost is not known before.

    Attributes:
      max_steps: generated images, including candidates and images that are rolled back.
      max_nfe: network evaluations (NFE); None: no limit. A generation does not start if it would exceed the limit at
        the highest cost of an image so far.
      max_seconds: wall-clock seconds since the loop began, for the whole batch; None: no limit. No generation starts
        after that.
      max_parse_retries: further replies requested for each reply that cannot be parsed.
      max_rollbacks: how often the loop returns to the same image after a worse one before it continues from the
        latest; 0 never rolls back.
      max_plan_retries: further plans requested while the verifier finds that the plan misses a requirement, those that
        cannot be parsed included; the best plan is carried out. 0 takes the first plan. No effect without a separate
        verifier.
      candidates: images generated from each reply, within the limits. The best verified one is kept.
      stop_when: "controller" stops when the controller says so; "verified" also as soon as the controller finds nothing
        unmet; "drawn" after the first image, without verification.
    """

    max_steps: int = 8
    max_nfe: int | None = None
    max_seconds: float | None = None
    max_parse_retries: int = 2
    max_rollbacks: int = 2
    max_plan_retries: int = 16
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
            raise UsageError(
                f"budget: stop_when drawn verifies nothing, so it cannot choose among {self.candidates} candidates"
            )


@dataclass
class Account:
    """The steps and NFE that have been spent of a budget."""

    budget: Budget
    steps: int = 0
    nfe: int = 0
    highest_nfe: int = 0

    def charge(self, nfe: int) -> None:
        """Adds the cost of one image."""
        self.steps += 1
        self.nfe += nfe
        self.highest_nfe = max(self.highest_nfe, nfe)

    def affordable(self, count: int) -> int:
        """Returns how many of `count` images may be generated now.

        Under a limit on NFE only one as long as the cost of an image is unknown.
        """
        budget = self.budget
        count = min(count, budget.max_steps - self.steps)
        if budget.max_nfe is None:
            return count
        if not self.steps:
            return min(count, 1)
        return min(count, max(0, budget.max_nfe - self.nfe) // self.highest_nfe) if self.highest_nfe else count

    def spent(self, seconds: float) -> str | None:
        """Returns the limit that forbids another image: "step limit", "nfe limit", "time limit", or None.

        Args:
          seconds: wall-clock time since the run began.
        """
        budget = self.budget
        if self.steps >= budget.max_steps:
            return "step limit"
        if budget.max_nfe is not None and self.steps and self.nfe + self.highest_nfe > budget.max_nfe:
            return "nfe limit"
        if budget.max_seconds is not None and self.steps and seconds >= budget.max_seconds:
            return "time limit"
        return None
