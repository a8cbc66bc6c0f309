"""Requests that tests of endpoints send, and the errors that they expect."""

import pytest

from clvr_jax.interfaces import ChatRequest, ImageRequest, ProviderError
from clvr_jax.providers.openai_chat import OpenAIChatModel
from tests.providers.server import picture

QUESTION = ChatRequest([{"role": "user", "content": "How many circles?"}], max_tokens=55)


TASK = ImageRequest("a red circle")


IMAGE = picture(24, 32)


def ask(endpoint, **fields):
    return OpenAIChatModel(endpoint(**fields)).chat(QUESTION)


def error_of(call, *arguments, **fields):
    with pytest.raises(ProviderError) as caught:
        call(*arguments, **fields)
    assert "\n" not in str(caught.value)
    return caught.value
