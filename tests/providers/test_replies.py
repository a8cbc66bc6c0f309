"""Responses that are no reply: thoughts alone, other JSON, replies far longer than they may be."""

import json
from itertools import repeat

import pytest

from clvr_jax.interfaces import ProviderError
from clvr_jax.interfaces.answers import AnswerError
from clvr_jax.interfaces.thoughts import strip_thoughts
from clvr_jax.providers.bounded import read_object
from clvr_jax.providers.failures import Failure, NoReplyError
from clvr_jax.providers.openai_chat import OpenAIChatModel
from tests.providers.asking import QUESTION, ask, error_of
from tests.providers.server import Reply, completion


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("Final Score: 5", "Final Score: 5"),
        ("<think>Final Score: 1</think>\n\nFinal Score: 5", "Final Score: 5"),
        ("Final Score: 1\n</think>\n\nFinal Score: 5", "Final Score: 5"),
        ("<thinking>no</thinking>yes", "yes"),
        ("<think>a</think>draft<think>b</think>yes", "yes"),
        ("<think>\n\n</think>\n\nyes", "yes"),
        ("I think <b>not</b>", "I think <b>not</b>"),
        ("<think>Final Score: 1", None),
        ("yes\n<think>or rather no", None),
        ("<think>a</think>\n<think>b", None),
    ],
)
def test_a_reply_begins_after_the_thought(text, reply):
    assert strip_thoughts(text) == reply


@pytest.mark.parametrize("text", ["<think>yes", "<think>yes</think>", "yes</think>  ", "", "  ", None])
def test_a_thought_without_a_reply_is_no_reply(server, endpoint, text):
    server.script = [completion(text)]
    error = error_of(ask, endpoint)
    assert isinstance(error, NoReplyError)
    assert isinstance(error, AnswerError)
    assert (error.fault, len(server.seen)) == ("down", 3)


def test_a_byte_order_mark_is_skipped(server, endpoint):
    server.script = [Reply(b"\xef\xbb\xbf" + json.dumps(completion("Zwölf.").content).encode())]
    assert ask(endpoint).text == "Zwölf."


@pytest.mark.parametrize("text", ["", "\ufeff", "[" * 100_000, "<html>", "[]", "7", '{"a": 1', "data: {}\n\n"])
def test_what_is_no_object_is_no_reply(text):
    with pytest.raises(Failure) as caught:
        read_object(text)
    assert caught.value.fault == "down"


def test_no_lie_escapes_as_another_error(server, endpoint):
    bodies = [
        {"choices": value} for value in (0, "a", {}, [[]], [{"message": 5}], [{"message": {"content": {"a": 1}}}])
    ]
    bodies += [{"error": value} for value in (1, [1], {"code": 10**30}, {"code": True}, {"message": {"a": [1]}})]
    bodies += [
        {"choices": [{"message": {"content": "x"}, "finish_reason": [1], "logprobs": 5}], "usage": value}
        for value in (1, [], {"prompt_tokens": {}})
    ]
    server.script = [
        Reply(body, status)
        for body, status in zip(bodies * 2, [*repeat(200, len(bodies)), *repeat(400, len(bodies))], strict=True)
    ]
    model = OpenAIChatModel(endpoint(max_retries=0))
    messages = []
    for _ in server.script:
        try:
            assert model.chat(QUESTION).text == "x"
        except ProviderError as error:
            messages.append(str(error))
    assert max(map(len, messages)) < 500


def test_a_reply_far_longer_than_its_tokens_is_no_reply(server, endpoint):
    server.script = [completion("x" * 2_000_000)]
    error = error_of(ask, endpoint)
    assert "characters, far more than max_tokens" in str(error)
    assert isinstance(error, NoReplyError)
