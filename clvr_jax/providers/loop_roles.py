"""Any vision-language model as the loop's controller, any image tool as its drawer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from clvr_jax.interfaces import ChatModel, ChatRequest, ImageModel, ImageRequest, ProviderError, Usage
from clvr_jax.reasoning.actions import IMAGE_GEN, SYSTEM_PROMPT, strip_action
from clvr_jax.reasoning.protocols import Controller, Conversation, GeneratedImage, GenerationRequest, ImageGenerator

RETRY_TEMPERATURE = 0.7
MAX_REPLY_TOKENS = 1024

REWRITE_PROMPT = """\
You write for a painter who draws a picture once, from your words alone, and never asks back. Rewrite the request so \
that nothing is left to guess: every thing with its number, color, material and place, every relation, every text \
letter by letter, then style and light. What needs knowledge or reasoning, work out and say as what is to be seen. \
Keep everything the request asks for and add nothing that contradicts it. Answer with the description alone, in one \
paragraph.
"""


class ChatModelController(Controller):
    """A general-purpose model, told the loop's contract; greedy at first, sampling when it has to try again.

    Args:
      model: asked for each conversation of a batch at the same time.
      plan_prompt: system prompt of the first reply, the contract's own if None. With `REWRITE_PROMPT` the whole picture
        is described at once, for one drawing.
      max_tokens: of a reply.

    usage: what all replies have cost so far.
    """

    def __init__(self, model: ChatModel, plan_prompt: str | None = None, max_tokens: int = MAX_REPLY_TOKENS):
        self._model, self._plan_prompt, self._max_tokens = model, plan_prompt, max_tokens
        self._lock = threading.Lock()
        self.usage = Usage()

    @property
    def adapted(self) -> tuple[str, ...]:
        """What the requests to the model lacked because its server refuses it, in words; for results."""
        return tuple(getattr(self._model, "adapted", ()))

    def reply(self, conversations: Sequence[Conversation]) -> list[str]:
        """See `Controller`. Raises: ProviderError."""
        if len(conversations) == 1:
            return [self._reply(conversations[0])]
        with ThreadPoolExecutor(len(conversations)) as threads:
            return list(threads.map(self._reply, conversations))

    def _reply(self, conversation: Conversation) -> str:
        plans = not conversation.replies and self._plan_prompt is not None
        question = ChatRequest(
            conversation.messages(self._plan_prompt if plans else SYSTEM_PROMPT),
            conversation.images,
            self._max_tokens,
            temperature=RETRY_TEMPERATURE if conversation.attempt else 0.0,
            seed=conversation.seed,
        )
        try:
            answer = self._model.chat(question)
        except ProviderError as error:
            self._pay(error.usage)
            raise
        self._pay(answer.usage)
        return strip_action(answer.text) + IMAGE_GEN if plans else answer.text

    def _pay(self, usage: Usage) -> None:
        with self._lock:
            self.usage += usage


class ImageModelGenerator(ImageGenerator):
    """An image tool that is given the whole history: its words, and its pictures as references.

    usage: what all drawings have cost so far.
    """

    def __init__(self, tool: ImageModel):
        self._tool = tool
        self.usage = Usage()

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GeneratedImage]:
        """See `ImageGenerator`. Raises: ProviderError."""
        return [self._draw(request) for request in requests]

    def _draw(self, request: GenerationRequest) -> GeneratedImage:
        try:
            made = self._tool.generate(ImageRequest(request.text, request.images, seed=request.seed))
        except ProviderError as error:
            self.usage += error.usage
            raise
        self.usage += made.usage
        return GeneratedImage(made.image, made.usage.nfe)
