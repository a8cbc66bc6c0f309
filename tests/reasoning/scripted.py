"""Controllers and drawers without models, for tests of the loop."""

from collections.abc import Mapping, Sequence

import numpy as np

from clvr_jax.reasoning import Conversation, GeneratedImage, GenerationRequest

SIZE = 8


def picture(value: int) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), value, np.uint8)


def value_of(image) -> int:
    return int(np.asarray(image)[0, 0, 0])


def generate(text: str = "Draw it.") -> str:
    return f"{text}<|image_gen|>"


def again(unmet: int, text: str = "Mend it.") -> str:
    return f"I see it. Unmet: {'; '.join(f'item {n}' for n in range(unmet)) or 'nothing'}. {text}<|image_gen|>"


def stop(unmet: int = 0) -> str:
    return f"I see it. Unmet: {'; '.join(f'item {n}' for n in range(unmet)) or 'nothing'}.<|terminate|>"


class ScriptedController:
    """Says the given replies of each prompt one after the other and keeps the conversations."""

    def __init__(self, script: Mapping[str, Sequence[str]]):
        self.script = {prompt: list(replies) for prompt, replies in script.items()}
        self.calls: list[list[Conversation]] = []

    def reply(self, conversations: Sequence[Conversation]) -> list[str]:
        self.calls.append(list(conversations))
        return [self.script[conversation.prompt].pop(0) for conversation in conversations]


class CountingDrawer:
    """Draws pictures of value 1, 2, 3 ... and keeps the requests."""

    def __init__(self, nfe: int = 4):
        self.nfe = nfe
        self.calls: list[list[GenerationRequest]] = []

    @property
    def requests(self) -> list[GenerationRequest]:
        return [request for call in self.calls for request in call]

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GeneratedImage]:
        self.calls.append(list(requests))
        first = len(self.requests) - len(requests)
        return [GeneratedImage(picture(first + number + 1), self.nfe) for number in range(len(requests))]


class NoisyController:
    """Reads the number of unmet items off the picture; which replies are unreadable follows from the seed."""

    def reply(self, conversations: Sequence[Conversation]) -> list[str]:
        return [self._one(conversation) for conversation in conversations]

    def _one(self, conversation: Conversation) -> str:
        if np.random.default_rng(conversation.seed).random() < 0.3:
            return "hm"
        if not conversation.images:
            return generate(f"Plan for {conversation.prompt}.")
        unmet = value_of(conversation.images[-1]) % 5
        return again(unmet) if unmet else stop()


class NoisyDrawer:
    """Draws a random number of unmet items that depends on the request."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GeneratedImage]:
        return [self._one(request) for request in requests]

    def _one(self, request: GenerationRequest) -> GeneratedImage:
        rng = np.random.default_rng([request.seed, len(request.text), *(value_of(image) for image in request.images)])
        return GeneratedImage(picture(int(rng.integers(250))), int(rng.integers(1, 5)))
