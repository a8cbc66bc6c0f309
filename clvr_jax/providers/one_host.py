"""Endpoints in a program of several processes: process 0 makes each request, and all processes receive the reply."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from clvr_jax.interfaces import ChatModel, ChatRequest, ChatResponse, Token, Usage
from clvr_jax.processes import broadcast_from_host0
from clvr_jax.reasoning.conversation.protocols import Controller, Conversation


class Host0Controller(Controller):
    """A controller that only process 0 calls; all processes must call this in the same order.

    Replies of an endpoint differ from call to call, and processes that compute together must have the same ones.
    """

    def __init__(self, controller: Controller):
        self._controller = controller

    @property
    def adapted(self) -> tuple[str, ...]:
        """Descriptions of the changes to requests that the server required; complete in process 0."""
        return tuple(getattr(self._controller, "adapted", ()))

    def reply(self, conversations: Sequence[Conversation]) -> list[str]:
        """Returns the replies to all conversations. Raises: ClvrError on all processes if process 0 has one."""
        return list(broadcast_from_host0(lambda: self._controller.reply(conversations)))


class Host0ChatModel(ChatModel):
    """A chat model that only process 0 calls; all processes must call this in the same order, each in one thread."""

    def __init__(self, model: ChatModel):
        self._model = model

    @property
    def name(self) -> str:
        """The name of the model."""
        return self._model.name

    def chat(self, request: ChatRequest) -> ChatResponse:
        """Returns the response to one request. Raises: ClvrError on all processes if process 0 has one."""
        return self.chat_all([request])[0]

    def chat_all(self, requests: Sequence[ChatRequest]) -> list[ChatResponse]:
        """Returns the responses in the order of the requests. Raises: ClvrError on all processes."""
        found = broadcast_from_host0(lambda: [dataclasses.asdict(each) for each in self._model.chat_all(requests)])
        return [_response(fields) for fields in found]


def _response(fields: dict[str, Any]) -> ChatResponse:
    tokens = fields["tokens"]
    return ChatResponse(
        fields["text"],
        Usage(**fields["usage"]),
        None if tokens is None else tuple(Token(**token) for token in tokens),
    )
