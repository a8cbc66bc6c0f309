"""Checks the reply of a controller against the report that it answers, in the words of its own plan.

A controller that was trained on the contract lists as unmet exactly those items of its plan that the description lacks,
and denies what the plan does not have ("no blue cross left"). That is a comparison of two lists in fixed words, which a
program can check; what the reply asks for follows from it.
"""

from __future__ import annotations

from clvr_jax.errors import ClvrError
from clvr_jax.reasoning.conversation.actions import parse, plan_items
from clvr_jax.reasoning.conversation.protocols import Conversation
from clvr_jax.reasoning.verification.evidence import clauses_of
from clvr_jax.reasoning.verification.places import place_of
from clvr_jax.reasoning.verification.verification import UNCLEAR

_DENIALS = ("no ", "nothing ")


def agrees_with_report(conversation: Conversation, reply: str) -> bool:
    """Whether a reply lists as unmet what its plan and the verifier's description differ in.

    Returns: False for a reply that breaks the contract; True if there is nothing to hold the reply against: no plan, no
      description, a plan or a description in free words (as of an independent verifier), or an image that shows the
      whole plan and is yet unmet, since then the plan is at fault.
    """
    plan = next((items for each in conversation.replies if (items := plan_items(each))), ())
    description, found, _ = conversation.report.partition(" Unmet:")
    seen = clauses_of(description)
    if not (found and plan and description.startswith("I see ")):
        return True
    if not all(place_of(clause) for clause in (*plan, *seen) if clause != "nothing"):
        return True
    try:
        unmet = parse(reply, has_image=True).unmet or ()
    except ClvrError:
        return False
    missing = {item for item in plan if item not in seen}
    if not missing:
        return True
    denied = [item for item in unmet if item.startswith(_DENIALS)]
    planned_places = {place_of(item) for item in plan}
    extra = [clause for clause in seen if clause not in plan and place_of(clause) not in planned_places]
    allowed = {
        f"nothing {clause.removeprefix('something ')}" if clause.startswith(UNCLEAR) else f"no {clause}"
        for clause in extra
    }
    return {item for item in unmet if item not in denied} == missing and set(denied) <= allowed
