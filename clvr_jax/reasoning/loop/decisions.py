"""Decisions of the loop on one prompt: when it returns to an earlier image, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence

from clvr_jax.reasoning.conversation.actions import Reply
from clvr_jax.reasoning.trajectories.trajectory import ACCEPTED, GAVE_UP, UNVERIFIED, Step, best_step
from clvr_jax.reasoning.verification.verification import Verification, VerificationMode

ROLLBACK_MARGIN = 0.5
"""Least difference of scores at which the loop returns to an earlier, better image. Scores count requirements, so small
changes of probabilities do not cause a roll-back."""

PLAN_CERTAINTY = 0.9
"""Least probability of every requirement at which no further plan is requested. A further plan costs no generation, and
a wrong one all of them."""


def is_settled(plan: Verification) -> bool:
    """Whether a plan is carried out at once: all requirements are met, and surely so if probabilities are known."""
    return plan.accepted is True and (plan.probability is None or plan.probability >= PLAN_CERTAINTY)


def rollback_target(steps: Sequence[Step], history: Sequence[int]) -> int | None:
    """Returns the number of the best earlier step if the latest image is worse than it by the margin, else None.

    Args:
      steps: all steps so far.
      history: the numbers of the steps that form the current history, oldest first; the last one has the latest image.
    """
    if not history:
        return None
    *earlier, last = history
    dropped = set(range(last)).difference(earlier)  # after an edit a dropped image may be better than all others
    best, latest = best_step(steps[:last], dropped), steps[last].score
    if best is None or latest is None:
        return None
    best_score = steps[best].score
    return None if best_score is None or latest > best_score - ROLLBACK_MARGIN else best


def outcome_of_stop(reply: Reply, mode: VerificationMode, has_image: bool, required: Sequence[str]) -> str:
    """Returns the outcome of a loop that the controller ends.

    Args:
      reply: the controller's last one.
      mode: which component accepts an image.
      has_image: whether the history has an image.
      required: the requirements that a separate verifier checks; () without one.
    """
    if not has_image:
        return GAVE_UP
    if mode == "controller":
        return GAVE_UP if reply.unmet else ACCEPTED
    # If there was something to verify, the image was not accepted: the loop would have ended before.
    return GAVE_UP if required else UNVERIFIED
