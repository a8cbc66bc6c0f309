import base64
import io
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from clvr_jax.errors import UsageError
from clvr_jax.interfaces import ChatRequest, ProviderError
from clvr_jax.providers.endpoint import Endpoint, Prices
from clvr_jax.providers.failures import NoReplyError
from clvr_jax.providers.openai_chat import OpenAIChatModel
from tests.providers.server import KEY, Reply, completion, failure, picture

QUESTION = ChatRequest([{"role": "user", "content": "How many circles?"}], temperature=0.7, seed=123, max_tokens=55)
JSON_QUESTION = ChatRequest([{"role": "user", "content": "As JSON."}], is_json=True)


def error_of(model, question=QUESTION):
    with pytest.raises(ProviderError) as caught:
        model.chat(question)
    assert "\n" not in str(caught.value)
    return caught.value


def test_an_answer_with_what_it_cost(server, endpoint):
    server.script = [completion("Two.", (1000, 500))]
    answer = OpenAIChatModel(endpoint(prices=Prices(input_tokens=2.0, output_tokens=8.0))).chat(QUESTION)
    assert answer.text == "Two."
    assert (answer.usage.calls, answer.usage.retries) == (1, 0)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (1000, 500)
    assert answer.usage.dollars == pytest.approx(0.002 + 0.004)
    assert answer.usage.seconds > 0


def test_the_request_says_what_the_question_says(server, endpoint):
    server.script = [completion("Two.")]
    OpenAIChatModel(endpoint(), extra={"top_k": 5}).chat(QUESTION)
    (seen,) = server.seen
    assert seen.path == "/v1/chat/completions"
    assert seen.headers["authorization"] == f"Bearer {KEY}"
    assert seen.json == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "How many circles?"}],
        "max_tokens": 55,
        "temperature": 0.7,
        "seed": 123,
        "top_k": 5,
    }


def test_what_a_server_does_not_take_is_left_out(server, endpoint):
    server.script = [completion("Two.")]
    model = OpenAIChatModel(endpoint(), token_limit="max_completion_tokens", omit=("temperature", "seed"))
    model.chat(QUESTION)
    assert set(server.seen[0].json) == {"model", "messages", "max_completion_tokens"}
    with pytest.raises(UsageError, match="top_p"):
        OpenAIChatModel(endpoint(), omit=("top_p",))


def test_models_that_think_may_be_given_more_tokens(server, endpoint):
    server.script = [completion("Two."), completion("Tw", finish="length")]
    model = OpenAIChatModel(endpoint(), thought_tokens=1000)
    model.chat(QUESTION)
    assert server.seen[0].json["max_tokens"] == 1055
    assert "max_tokens=1055" in str(error_of(model))


def test_pictures_arrive_in_order_and_unchanged(server, endpoint):
    server.script = [completion("Yes.")]
    images = [picture(5, 9, seed=1), Image.fromarray(picture(12, 4, seed=2))]
    messages = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}]},
        {"role": "user", "content": [{"type": "image"}]},
    ]
    OpenAIChatModel(endpoint()).chat(ChatRequest(messages, images))
    sent = server.seen[0].json["messages"]
    assert sent[1]["content"][1] == {"type": "text", "text": "and"}
    for part, image in zip([sent[1]["content"][0], sent[2]["content"][0]], images, strict=True):
        head, data = part["image_url"]["url"].split(",")
        assert (part["type"], head) == ("image_url", "data:image/png;base64")
        assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(data))), np.asarray(image))


def test_another_number_of_pictures_is_an_error_before_any_request(server, endpoint):
    question = ChatRequest([{"role": "user", "content": [{"type": "image"}]}], [])
    with pytest.raises(UsageError, match="1 image parts in the messages but 0 images"):
        OpenAIChatModel(endpoint()).chat(question)
    assert server.seen == []


@pytest.mark.parametrize("text", ["赤い円が二つ 🔴🔴 دائرتان", "x" * 50_000, "円" * 50_000])
def test_other_scripts_and_long_prompts_pass(server, endpoint, text):
    server.script = [completion(text)]
    answer = OpenAIChatModel(endpoint()).chat(ChatRequest([{"role": "user", "content": text}]))
    assert server.seen[0].json["messages"][0]["content"] == text
    assert answer.text == text


def test_a_broken_half_of_a_character_is_rejected(server, endpoint):
    error = error_of(OpenAIChatModel(endpoint()), ChatRequest([{"role": "user", "content": "a \ud83d b"}]))
    assert error.fault == "rejected"
    assert "Unicode" in str(error)


# --- faults that may pass ---------------------------------------------------------------------------------------------


def test_a_closed_port_is_down(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    endpoint = Endpoint("tiny", f"http://127.0.0.1:{port}/v1", None, max_retries=3, backoff=0.001)
    error = error_of(OpenAIChatModel(endpoint))
    assert error.fault == "down"
    assert (error.usage.calls, error.usage.retries) == (1, 3)
    assert f"tiny (127.0.0.1:{port})" in str(error)
    assert "after 3 retries" in str(error)


def test_a_slow_server_is_down_after_bounded_retries(server, endpoint):
    server.script = [Reply(completion("late").content, delay=1.5)]
    model = OpenAIChatModel(endpoint(timeout=0.2, max_retries=1))
    began = time.monotonic()
    error = error_of(model)
    assert time.monotonic() - began < 1.5
    assert error.fault == "down"
    assert "0.2 s" in str(error)
    assert len(server.seen) == 2


@pytest.mark.parametrize("status", [408, 500, 502, 503])
def test_a_server_error_passes(server, endpoint, status):
    server.script = [failure(status), failure(status), completion("Two.", (10, 5))]
    answer = OpenAIChatModel(endpoint(prices=Prices(1e6, 1e6))).chat(QUESTION)
    assert len(server.seen) == 3
    assert answer.usage.retries == 2
    # Counted once, though it was asked three times.
    assert (answer.usage.calls, answer.usage.input_tokens, answer.usage.dollars) == (1, 10, 15.0)


def test_retries_are_bounded(server, endpoint):
    server.script = [failure(500, "CUDA out of memory")]
    error = error_of(OpenAIChatModel(endpoint(max_retries=4)))
    assert len(server.seen) == 5
    assert error.fault == "down"
    assert "CUDA out of memory" in str(error)


def test_no_retry_if_none_is_wanted(server, endpoint):
    server.script = [failure(500)]
    error_of(OpenAIChatModel(endpoint(max_retries=0)))
    assert len(server.seen) == 1


def test_retry_after_is_honoured(server, endpoint):
    server.script = [failure(429, headers={"Retry-After": "1"}), completion("Two.")]
    answer = OpenAIChatModel(endpoint()).chat(QUESTION)
    first, second = server.seen
    assert 1.0 <= second.time - first.time < 5
    assert answer.usage.retries == 1
    assert answer.usage.seconds >= 1


def test_one_callers_rate_limit_holds_the_others_back(server, endpoint):
    server.script = [failure(429, headers={"retry-after-ms": "600"}), completion("Two.")]
    model = OpenAIChatModel(endpoint())
    with ThreadPoolExecutor(1) as pool:
        limited = pool.submit(model.chat, QUESTION)
        while model._connection._not_before == 0:
            time.sleep(0.01)
        model.chat(QUESTION)
        limited.result()
    assert len(server.seen) == 3
    assert min(seen.time for seen in server.seen[1:]) - server.seen[0].time >= 0.6


def test_too_long_a_retry_after_gives_up_at_once(server, endpoint):
    server.script = [failure(429, headers={"Retry-After": "3600"})]
    error = error_of(OpenAIChatModel(endpoint(max_wait=10)))
    assert error.fault == "limited"
    assert "3600 s" in str(error)
    assert len(server.seen) == 1


def test_rate_limits_without_end_are_limited(server, endpoint):
    server.script = [failure(429)]
    assert error_of(OpenAIChatModel(endpoint())).fault == "limited"
    assert len(server.seen) == 3


def test_no_money_left_is_not_retried(server, endpoint):
    server.script = [failure(429, code="insufficient_quota")]
    assert error_of(OpenAIChatModel(endpoint())).fault == "limited"
    assert len(server.seen) == 1


@pytest.mark.parametrize("content", [b"", b"  \n", b'{"choices": [', b"<html>Bad gateway</html>", b"[1, 2]"])
def test_a_body_that_is_none_is_retried_and_is_no_reply(server, endpoint, content):
    server.script = [Reply(content)]
    assert error_of(OpenAIChatModel(endpoint())).fault == "down"
    assert len(server.seen) == 3
    server.script = [Reply(content)] * 4 + [completion("Two.")]
    assert OpenAIChatModel(endpoint()).chat(QUESTION).text == "Two."


@pytest.mark.parametrize("choices", [None, [], [None], [{}], "no"])
def test_no_choices_are_retried_and_are_no_reply(server, endpoint, choices):
    server.script = [Reply({"choices": choices, "usage": {"prompt_tokens": 9, "completion_tokens": None}})]
    error = error_of(OpenAIChatModel(endpoint()))
    assert error.fault == "down"
    assert len(server.seen) == 3
    assert error.usage.input_tokens == 27


def test_an_error_under_status_200_is_an_error(server, endpoint):
    server.script = [Reply({"error": {"code": 429, "message": "upstream is busy"}})]
    assert error_of(OpenAIChatModel(endpoint())).fault == "limited"


# --- faults that do not pass ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_rejected_requests_are_not_retried(server, endpoint, status):
    server.script = [failure(status, "no such model")]
    error = error_of(OpenAIChatModel(endpoint()))
    assert error.fault == "rejected"
    assert f"HTTP {status}" in str(error)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "reply",
    [
        completion(None, refusal="I cannot help with that."),
        completion("par", finish="content_filter"),
        failure(400, code="content_filter"),
        failure(400, code="moderation_blocked"),
    ],
)
def test_refusals_are_told_apart(server, endpoint, reply):
    server.script = [reply]
    assert error_of(OpenAIChatModel(endpoint())).fault == "refused"
    assert len(server.seen) == 1


def test_a_refusal_costs_what_it_costs(server, endpoint):
    server.script = [completion(None, (100, 3), refusal="No.")]
    error = error_of(OpenAIChatModel(endpoint(prices=Prices(1e6, 1e6))))
    assert (error.usage.calls, error.usage.input_tokens, error.usage.dollars) == (1, 100, 103)


@pytest.mark.parametrize("text", ["", "Final Score: 3"])
def test_a_reply_that_is_cut_is_none_and_says_where_the_tokens_went(server, endpoint, text):
    server.script = [completion(text, finish="length")]
    error = error_of(OpenAIChatModel(endpoint()))
    assert isinstance(error, NoReplyError)
    assert error.fault == "down"
    assert "max_tokens=55" in str(error)
    assert len(server.seen) == 1


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ['{"ok": true}', "Sure! There are two circles."])
def test_json_is_asked_for_and_what_comes_is_for_the_caller_to_read(server, endpoint, text):
    server.script = [completion(text)]
    assert OpenAIChatModel(endpoint()).chat(JSON_QUESTION).text == text
    assert server.seen[0].json["response_format"] == {"type": "json_object"}


def test_a_server_without_json_mode_is_asked_without_it_from_then_on(server, endpoint):
    server.script = [failure(400, "response_format is not supported"), completion('{"ok": 1}')]
    model = OpenAIChatModel(endpoint())
    answer = model.chat(JSON_QUESTION)
    assert answer.text == '{"ok": 1}'
    assert (answer.usage.calls, answer.usage.retries, answer.usage.input_tokens) == (1, 1, 11)
    model.chat(JSON_QUESTION)
    assert ["response_format" in seen.json for seen in server.seen] == [True, False, False]


def test_json_mode_can_be_switched_off(server, endpoint):
    server.script = [completion('{"ok": 1}')]
    OpenAIChatModel(endpoint(), json_mode=False).chat(JSON_QUESTION)
    assert "response_format" not in server.seen[0].json


def test_many_questions_are_asked_side_by_side_and_answered_in_order(server, endpoint):
    server.script = [lambda seen: completion(seen.json["messages"][0]["content"])]
    server.hold_until(4)
    model = OpenAIChatModel(endpoint(max_in_flight=4))
    answers = model.chat_all([ChatRequest([{"role": "user", "content": str(number)}]) for number in range(12)])
    assert [answer.text for answer in answers] == [str(number) for number in range(12)]
    assert server.peak == 4
    assert model.chat_all([]) == []


def test_one_failure_among_many_questions_is_raised(server, endpoint):
    server.script = [lambda seen: failure(400, "no") if "3" in seen.body.decode() else completion("yes")]
    model = OpenAIChatModel(endpoint(max_in_flight=2))
    with pytest.raises(ProviderError):
        model.chat_all([ChatRequest([{"role": "user", "content": str(number)}], seed=1) for number in range(12)])
