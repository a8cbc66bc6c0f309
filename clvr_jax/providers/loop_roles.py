"""Chat models as controllers of the loop, and image models as its image generators."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from clvr_jax.interfaces import ChatModel, ChatRequest, ImageModel, ImageRequest, ProviderError, Usage
from clvr_jax.reasoning.conversation.actions import IMAGE_GEN, SYSTEM_PROMPT, strip_action
from clvr_jax.reasoning.conversation.protocols import (
    Controller,
    Conversation,
    GeneratedImage,
    GenerationRequest,
    ImageGenerator,
)
from clvr_jax.reasoning.retries import temperature_of

MAX_REPLY_TOKENS = 1024

REWRITE_PROMPT = """\
You write for a painter who draws a picture once, from your words alone, and never asks back. Rewrite the request so \
that nothing is left to guess: every thing with its number, color, material and place, every relation, every text \
letter by letter, then style and light. What needs knowledge or reasoning, work out and say as what is to be seen. \
Keep everything the request asks for and add nothing that contradicts it. Answer with the description alone, in one \
paragraph.
"""


class ChatModelController(Controller):
    """A general-purpose model as controller, with the system prompt of the loop. Retries have rising temperatures.

    Args:
      model: called for all conversations of a batch concurrently.
      plan_prompt: system prompt of the first reply; that of the loop if None. With `REWRITE_PROMPT` the model describes
        the complete image at once, for one generation.
      max_tokens: maximum length of a reply.

    Attributes:
      usage: cost of all replies so far.
    """

    def __init__(self, model: ChatModel, plan_prompt: str | None = None, max_tokens: int = MAX_REPLY_TOKENS):
        self._model, self._plan_prompt, self._max_tokens = model, plan_prompt, max_tokens
        self._lock = threading.Lock()
        self.usage = Usage()

    @property
    def adapted(self) -> tuple[str, ...]:
        """Descriptions of the changes to requests that the model's server required, for results."""
        return tuple(getattr(self._model, "adapted", ()))

    def reply(self, conversations: Sequence[Conversation]) -> list[str]:
        """Returns the replies to all conversations. Raises: ProviderError."""
        if len(conversations) == 1:
            return [self._reply(conversations[0])]
        with ThreadPoolExecutor(len(conversations)) as threads:
            return list(threads.map(self._reply, conversations))

    def _reply(self, conversation: Conversation) -> str:
        is_plan = not conversation.replies and self._plan_prompt is not None
        request = ChatRequest(
            conversation.messages(self._plan_prompt if is_plan else SYSTEM_PROMPT),
            conversation.images,
            self._max_tokens,
            temperature=temperature_of(conversation.attempt),
            seed=conversation.seed,
        )
        try:
            response = self._model.chat(request)
        except ProviderError as error:
            self._add_usage(error.usage)
            raise
        self._add_usage(response.usage)
        return strip_action(response.text) + IMAGE_GEN if is_plan else response.text

    def _add_usage(self, usage: Usage) -> None:
        with self._lock:
            self.usage += usage


class ImageModelGenerator(ImageGenerator):
    """An image model as image generator: the prompt is the text of the history, the references are its images.

    Attributes:
      usage: cost of all generated images so far.
    """

    def __init__(self, model: ImageModel):
        self._model = model
        self.usage = Usage()

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GeneratedImage]:
        """Returns an image for each request. Raises: ProviderError."""
        return [self._generate(request) for request in requests]

    def _generate(self, request: GenerationRequest) -> GeneratedImage:
        try:
            response = self._model.generate(ImageRequest(request.text, request.images, seed=request.seed))
        except ProviderError as error:
            self.usage += error.usage
            raise
        self.usage += response.usage
        return GeneratedImage(response.image, response.usage.nfe)
