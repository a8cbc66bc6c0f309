"""What holds for every call of an endpoint: turns, keys, prices, errors."""

import email.utils
import pickle
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.interfaces import ChatRequest, ProviderError, Usage
from clvr_jax.providers.endpoint import Endpoint, Prices, retry_after, status_failure
from clvr_jax.providers.openai_chat import OpenAIChatModel
from tests.providers.server import KEY, Reply, completion, failure

QUESTION = ChatRequest([{"role": "user", "content": "How many circles?"}])


def error_of(model):
    with pytest.raises(ProviderError) as caught:
        model.chat(QUESTION)
    return caught.value


# --- many at once -----------------------------------------------------------------------------------------------------


def test_at_most_and_at_least_fifty_in_flight(server, endpoint):
    server.hold_until(50)
    server.script = [lambda seen: completion(seen.json["messages"][0]["content"], (3, 2))]
    model = OpenAIChatModel(endpoint(max_in_flight=50))
    texts = [f"question {number}" for number in range(128)]
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda text: model.chat(ChatRequest([{"role": "user", "content": text}])), texts))
    assert [answer.text for answer in answers] == texts
    assert server.peak == 50
    total = sum((answer.usage for answer in answers), start=Usage())
    assert (total.calls, total.input_tokens, total.output_tokens) == (128, 384, 256)
    assert len(server.seen) == 128


def test_a_place_is_free_again_after_a_failure(server, endpoint):
    server.script = [failure(401)] * 3 + [completion("Two.")]
    model = OpenAIChatModel(endpoint(max_in_flight=1))
    for _ in range(3):
        error_of(model)
    assert model.chat(QUESTION).text == "Two."


# --- the key ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        failure(401, f"Incorrect API key provided: {KEY}."),
        failure(400, "x" * 280 + KEY),
        failure(500, f"{KEY} {KEY}"),
        Reply(f"<pre>Authorization: Bearer {KEY}</pre>".encode()),
        completion(KEY, refusal=KEY),
    ],
)
def test_the_key_is_in_no_error(server, endpoint, reply):
    server.script = [reply]
    error = error_of(OpenAIChatModel(endpoint()))
    shown = "".join(traceback.format_exception(error)) + repr(error)
    assert KEY[:12] not in shown
    assert error.__cause__ is None
    assert error.__context__ is None


@pytest.mark.parametrize("value", [None, "", "  "])
def test_an_absent_key_is_one_clear_line(server, endpoint, monkeypatch, value):
    if value is None:
        monkeypatch.delenv("LOOPBACK_KEY")
    else:
        monkeypatch.setenv("LOOPBACK_KEY", value)
    with pytest.raises(ClvrError, match="LOOPBACK_KEY is not set") as caught:
        OpenAIChatModel(endpoint())
    assert "\n" not in str(caught.value)


def test_a_key_that_is_none_is_not_shown(server, endpoint, monkeypatch):
    monkeypatch.setenv("LOOPBACK_KEY", "sk-a\nsk-b")
    with pytest.raises(ClvrError, match="LOOPBACK_KEY is not a key") as caught:
        OpenAIChatModel(endpoint())
    assert "sk-" not in str(caught.value)


def test_other_servers_do_not_learn_the_organization(server, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-secret")
    server.script = [completion("Two.")]
    OpenAIChatModel(endpoint()).chat(QUESTION)
    assert "secret" not in str(server.seen[0].headers)


def test_without_the_openai_package_the_extra_is_named(endpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ClvrError, match=r"pip install 'clvr-jax\[endpoints\]'"):
        OpenAIChatModel(endpoint())


# --- small things -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "file:///etc/passwd"},
        {"base_url": "http://[::1"},
        {"base_url": "http://localhost:many/v1"},
        {"max_in_flight": 0},
        {"timeout": 0},
        {"max_retries": -1},
    ],
)
def test_an_endpoint_that_makes_no_sense_is_a_usage_error(fields):
    with pytest.raises(UsageError):
        Endpoint("tiny", **fields)
    with pytest.raises(UsageError):
        Prices(input_tokens=-1)


def test_the_name_holds_no_password():
    assert Endpoint("tiny", "http://me:secret@localhost:8000/v1").name == "tiny (localhost:8000)"


def test_an_error_survives_a_trip_between_processes():
    error = pickle.loads(pickle.dumps(ProviderError("no", "limited", Usage(calls=1, dollars=0.5))))
    assert (str(error), error.fault, error.usage) == ("no", "limited", Usage(calls=1, dollars=0.5))


def test_no_thread_is_left_behind(server, endpoint):
    server.script = [completion("Two.")]
    before = {thread for thread in threading.enumerate() if "process_request" not in thread.name}
    OpenAIChatModel(endpoint()).chat(QUESTION)
    assert {thread for thread in threading.enumerate() if "process_request" not in thread.name} == before


NOW = 1_000_000_000.0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"Retry-After-Ms": "250", "Retry-After": "7"}, 0.25),
        ({"Retry-After": email.utils.formatdate(NOW + 90, usegmt=True)}, 90),
        ({"Retry-After": email.utils.formatdate(NOW - 90, usegmt=True)}, 0),
        ({"Retry-After": "-3"}, 0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "inf"}, None),
    ],
)
def test_all_ways_to_ask_for_patience(headers, seconds):
    assert retry_after(headers, NOW) == seconds


def test_geminis_list_of_errors_is_read():
    found = status_failure(400, [{"error": {"code": 400, "message": "API key not valid", "status": "INVALID"}}])
    assert (found.fault, found.message) == ("rejected", "HTTP 400: API key not valid")


def test_usage_adds_up():
    total = Usage(1, 2, 3, 4, 5, 6.0, 7.0, 8) + Usage(10, 20, 30, 40, 50, 60.0, 70.0, 80)
    assert total == Usage(11, 22, 33, 44, 55, 66.0, 77.0, 88)
