"""The interface of chat models: requests, responses, and the protocol that pipelines and endpoints implement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from clvr_jax.files.image_io import ImageLike
from clvr_jax.interfaces.usage import Usage

Message = dict[str, Any]
"""{"role": ..., "content": text or parts}; a part is {"type": "text", "text": ...} or {"type": "image"}."""


@dataclass(frozen=True)
class Token:
    """One token of a response.

    Attributes:
      text: the characters that the token adds to the response.
      logprob: natural logarithm of its probability.
      top: text -> logprob of the most probable tokens at this position; may include the chosen token.
    """

    text: str
    logprob: float
    top: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatRequest:
    """A conversation that the model continues by one turn.

    Attributes:
      messages: the conversation, oldest message first.
      images: one for each {"type": "image"} part, in order.
      max_tokens: maximum length of the response.
      temperature: 0 decodes greedily.
      seed: 31-bit seed of the sampling.
      is_json: whether one JSON object is requested. Providers that can enforce it do. Callers still check the response
        with `answers.read_json_object`.
      top_logprobs: number of most probable tokens returned per position; 0 returns no tokens. A provider without
        probabilities returns none.
    """

    messages: Sequence[Message]
    images: Sequence[ImageLike] = field(default=(), repr=False)
    max_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0
    is_json: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True)
class ChatResponse:
    """One turn of the model.

    Attributes:
      text: the reply.
      usage: its cost.
      tokens: the tokens of `text`; None if they were not requested or the provider has none.
    """

    text: str
    usage: Usage = Usage()
    tokens: tuple[Token, ...] | None = None


class ChatModel(Protocol):
    """A vision-language model.

    A call blocks until the response is complete. Calls may come from many threads at once; a model that is faster with
    batches collects them with `providers.batching.DynamicBatcher`.
    """

    @property
    def name(self) -> str:
        """Model and revision, recorded with its responses."""
        ...

    def chat(self, request: ChatRequest) -> ChatResponse:
        """Returns the response to one request. Raises: ProviderError."""
        ...

    def chat_all(self, requests: Sequence[ChatRequest]) -> list[ChatResponse]:
        """Returns the responses in the order of the requests. Raises: ProviderError."""
        return [self.chat(request) for request in requests]
