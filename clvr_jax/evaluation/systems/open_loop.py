"""Open-loop planning: the prompt is rewritten once, as a plan for the whole image, and generated in one step."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from clvr_jax.errors import ClvrError
from clvr_jax.reasoning.conversation.protocols import Controller, Conversation
from clvr_jax.worlds.shapes.oracle import IMAGE_GEN, first_reply, parse_plan


class OpenLoopController(Controller):
    """A controller whose first reply requests its whole plan at once.

    Controllers of the shapes world plan the whole image and then request one or two objects; with this wrapper they
    request every object of their plan. First replies of other controllers, and all later replies, are not changed.
    """

    def __init__(self, controller: Controller):
        self._controller = controller

    @override
    def reply(self, conversations: Sequence[Conversation]) -> list[str]:
        replies = self._controller.reply(conversations)
        return [
            reply if each.replies else request_whole_plan(reply)
            for each, reply in zip(conversations, replies, strict=True)
        ]


def request_whole_plan(reply: str) -> str:
    """Returns a first reply that requests all objects of its plan; the reply itself if it has no shapes-world plan."""
    try:
        plan = parse_plan(reply)
    except ClvrError:
        return reply
    return first_reply(plan, limit=len(plan)) if IMAGE_GEN in reply else reply
