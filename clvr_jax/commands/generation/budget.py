"""Options for the limits of the closed loop, for every command that runs it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from clvr_jax.arguments import at_least_one
from clvr_jax.commands.common import Count
from clvr_jax.errors import UsageError

if TYPE_CHECKING:
    from clvr_jax.reasoning.loop.budget import Budget


@dataclass(frozen=True)
class BudgetOptions:
    """Limits for one prompt. When one is reached, the last image is still verified, and the best image is returned."""

    max_steps: int = 8
    """Generate at most this many images, including candidates and images that are rolled back."""
    max_nfe: Count = None
    """Spend at most this many network evaluations (NFE); unlimited if not given. The first image is always generated.
    """
    max_seconds: Annotated[float | None, tyro.conf.arg(metavar="S")] = None
    """Start no further image after this many seconds; unlimited if not given. Several prompts in a batch share the
    limit."""
    stop_when: Literal["controller", "verified", "drawn"] = "controller"
    """When the loop stops. controller: when the controller stops. verified: also as soon as the controller finds
    nothing unmet, with --verification controller. drawn: after one image, without verification. A separate verifier
    that accepts the image always stops the loop."""
    candidates: int = 1
    """Generate this many images at each step and keep the best verified one; each of them counts as a step."""
    max_plan_retries: int = 16
    """Ask for this many further plans while the verifier finds that the plan misses a requirement; the best plan is
    carried out. 0 takes the first plan."""

    def __post_init__(self) -> None:
        at_least_one("--max-steps", self.max_steps)
        at_least_one("--max-nfe", self.max_nfe)
        at_least_one("--candidates", self.candidates)
        if self.max_plan_retries < 0:
            raise UsageError(f"--max-plan-retries must be 0 or more, got {self.max_plan_retries}")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise UsageError(f"--max-seconds must be above 0, got {self.max_seconds}")
        if self.stop_when == "drawn" and self.candidates > 1:
            raise UsageError("--stop-when drawn verifies nothing; leave --candidates out")

    def budget(self) -> "Budget":
        """Returns the limits as the loop takes them."""
        from clvr_jax.reasoning.loop.budget import Budget

        return Budget(
            max_steps=self.max_steps,
            max_nfe=self.max_nfe,
            max_seconds=self.max_seconds,
            stop_when=self.stop_when,
            candidates=self.candidates,
            max_plan_retries=self.max_plan_retries,
        )


Limits = Annotated[BudgetOptions, tyro.conf.arg(name="")]
