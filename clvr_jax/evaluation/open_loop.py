"""Planning without looking: the prompt is rewritten once, as a plan for the whole picture, and drawn."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from clvr_jax.errors import ClvrError
from clvr_jax.reasoning.protocols import Controller, Conversation
from clvr_jax.worlds.shapes.oracle import DRAW_TOKEN, first_reply, parse_plan


class WholePlan(Controller):
    """A controller whose plan is drawn at once.

    Controllers of the shapes world plan the whole picture and then ask for a thing or two; here they ask for everything
    in their plan. What others say is left as it is. Later replies are the controller's own.
    """

    def __init__(self, controller: Controller):
        self._controller = controller

    @override
    def reply(self, conversations: Sequence[Conversation]) -> list[str]:
        replies = self._controller.reply(conversations)
        return [
            reply if each.replies else whole_plan(reply) for each, reply in zip(conversations, replies, strict=True)
        ]


def whole_plan(reply: str) -> str:
    """A first reply that draws all of its plan, if that is of the shapes world; else the reply itself."""
    try:
        plan = parse_plan(reply)
    except ClvrError:
        return reply
    return first_reply(plan, limit=len(plan)) if DRAW_TOKEN in reply else reply
