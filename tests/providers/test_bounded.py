"""Responses without end: limits on bytes, seconds, values, and on the numbers in them."""

import contextlib
import gzip
import json
import time
import zlib

import pytest

from clvr_jax.interfaces import ChatRequest, ProviderError
from clvr_jax.providers.bounded import HeldBytes, SharedBytes, count
from clvr_jax.providers.endpoint import Endpoint
from clvr_jax.providers.failures import Failure
from clvr_jax.providers.openai_chat import OpenAIChatModel
from clvr_jax.providers.openai_images import OpenAIImageModel
from tests.providers.asking import QUESTION, TASK, ask, error_of
from tests.providers.server import Reply, completion, dripping, failure, pictures


def packed(text, method="gzip"):
    content = gzip.compress(text) if method == "gzip" else zlib.compress(text)
    return Reply(content, headers={"Content-Encoding": method})


@pytest.mark.parametrize("method", ["gzip", "deflate"])
def test_a_compressed_response_is_read(server, endpoint, method):
    server.script = [packed(json.dumps(completion("Two. " * 90_000).content).encode(), method)]
    assert ask(endpoint).text == "Two. " * 90_000


@pytest.mark.parametrize("status", [200, 400])
def test_a_gzip_bomb_is_refused_before_it_expands(server, endpoint, status):
    server.script = [Reply(gzip.compress(bytes(64 << 20)), status, {"Content-Encoding": "gzip"})]
    error = error_of(ask, endpoint, max_bytes=1 << 20)
    assert "more than 1,048,576 bytes" in str(error)
    assert (error.fault, len(server.seen)) == ("down", 1)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_response_that_expands_like_no_text_is_refused_long_before_the_limit(server, endpoint, encoding):
    server.script = [packed(bytes(8 << 20), encoding)]
    assert "expands more than 100 times" in str(error_of(ask, endpoint))


@pytest.mark.parametrize("headers", [{"Content-Encoding": "br"}, {"Content-Encoding": "gzip"}])
def test_a_compression_that_is_none_is_down(server, endpoint, headers):
    server.script = [Reply(b"\x1b\x0f\x00", headers=headers)]
    assert error_of(ask, endpoint).fault == "down"


HEADS = [b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-Slow: "]


@pytest.mark.parametrize("head", HEADS)
def test_a_server_that_drips_is_left_after_the_deadline(monkeypatch, head):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with dripping(head) as url:
        model = OpenAIChatModel(Endpoint("tiny", url, None, max_seconds=0.3, max_retries=1, backoff=0.001))
        began = time.monotonic()
        error = error_of(model.chat, QUESTION)
    assert 0.6 <= time.monotonic() - began < 20
    assert error.fault == "down"
    assert "no complete response within 0.3 s" in str(error)


@pytest.mark.parametrize("head", HEADS)
def test_an_image_that_drips_is_left_after_the_deadline(server, endpoint, head):
    with dripping(head) as url:
        server.script = [pictures(url + "/1.png")]
        error = error_of(OpenAIImageModel(endpoint(max_seconds=0.3, max_retries=0)).generate, TASK)
    assert "no complete response within 0.3 s" in str(error)


@pytest.mark.parametrize("value", [10**400, -1, True, 2.5, float("inf"), "7", None, [1]])
def test_a_number_of_tokens_that_is_none_counts_nothing(value):
    assert count(value) == 0
    assert count(7) == 7


@pytest.mark.parametrize("digits", ["9" * 400, "9" * 5000, "-5", '"many"', "1e999", "NaN"])
def test_a_reply_is_kept_whatever_its_usage_says(server, endpoint, digits):
    content = json.dumps(completion("Two.").content).replace('"prompt_tokens": 11', f'"prompt_tokens": {digits}')
    server.script = [Reply(content.encode())]
    answer = ask(endpoint)
    assert (answer.text, answer.usage.input_tokens, answer.usage.output_tokens) == ("Two.", 0, 7)


def test_a_body_of_many_values_is_refused_before_it_is_read(server, endpoint):
    server.script = [Reply(b'{"choices": [' + b"{}," * 200_000 + b"0]}")]
    assert "more than 100,000 values" in str(error_of(ask, endpoint))


def test_as_many_values_are_read_as_tokens_and_probabilities_are_asked_for(server, endpoint):
    token = {"token": "a", "logprob": -0.5, "bytes": [97]}
    entries = [{**token, "top_logprobs": [token] * 20}] * 1000
    reply = completion("a" * 1000).content
    reply["choices"][0]["logprobs"] = {"content": entries}
    server.script = [Reply(reply)]
    model = OpenAIChatModel(endpoint())
    question = ChatRequest([{"role": "user", "content": "?"}], max_tokens=1000, top_logprobs=20)
    assert len(model.chat(question).tokens) == 1000


@pytest.mark.parametrize("status", [400, 500])
def test_the_body_of_an_error_is_bounded_too(server, endpoint, status):
    server.script = [Reply(b"[" + b"{}," * 500_000 + b"0]", status)]
    assert "more than 1,048,576 bytes" in str(error_of(ask, endpoint))


def test_large_responses_are_read_one_after_the_other(monkeypatch):
    shared = SharedBytes(100)
    first, second, third = (HeldBytes(shared) for _ in range(3))
    soon = time.monotonic() + 0.05
    first.add(80, soon)
    second.add(15, soon)
    second.add(15, soon)  # more than there is: the only one
    second.add(10**9, soon)
    third.add(5, soon)
    with pytest.raises(Failure, match="other large responses"):
        third.add(1, time.monotonic() + 0.05)
    second.release()
    third.add(1, soon)
    for each in (first, second, third, third):
        each.release()
    third.add(100, soon)


def test_the_bytes_of_a_response_count_until_it_is_an_answer(server, endpoint, monkeypatch):
    shared = SharedBytes(1 << 20)
    monkeypatch.setattr(HeldBytes.__init__, "__defaults__", (shared,))
    server.script = [completion("x" * 20_000), failure(400), Reply(b"{"), completion("y")]
    free = []
    monkeypatch.setattr(shared, "take", lambda count, take=shared.take: (take(count), free.append(shared._free))[0])
    model = OpenAIChatModel(endpoint(max_retries=0))
    for _ in range(4):
        with contextlib.suppress(ProviderError):
            model.chat(QUESTION)
    assert min(free) < (1 << 20) - 20_000
    assert shared._free == 1 << 20
