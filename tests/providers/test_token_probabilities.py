"""Probabilities of the tokens of a reply: requested, read, and left out where a server has none."""

import pytest

from clvr_jax.interfaces import ChatRequest, Token
from clvr_jax.providers.openai_chat import OpenAIChatModel, read_tokens
from tests.providers.server import completion, failure
from tests.providers.test_openai_chat import JSON_QUESTION, QUESTION, error_of

SURE_QUESTION = ChatRequest([{"role": "user", "content": "Is it red?"}], top_logprobs=5)


def entry(token, logprob=-0.5, top=(), **more):
    alternatives = [{"token": text, "logprob": value} for text, value in top]
    return {"token": token, "logprob": logprob, "top_logprobs": alternatives, **more}


def with_logprobs(text, entries, finish="stop"):
    reply = completion(text, finish=finish)
    reply.content["choices"][0]["logprobs"] = {"content": entries}
    return reply


RED = [entry("It"), entry(" is red", -0.25), entry(".", -0.125), entry(" yes", -0.1, [(" yes", -0.1), (" no", -2.5)])]


def test_probabilities_of_tokens_are_asked_for_and_read(server, endpoint):
    server.script = [with_logprobs("It is red. yes", RED)]
    answer = OpenAIChatModel(endpoint()).chat(SURE_QUESTION)
    assert (server.seen[0].json["logprobs"], server.seen[0].json["top_logprobs"]) == (True, 5)
    assert answer.text == "It is red. yes"
    assert answer.tokens == (
        Token("It", -0.5),
        Token(" is red", -0.25),
        Token(".", -0.125),
        Token(" yes", -0.1, {" yes": -0.1, " no": -2.5}),
    )
    assert answer.usage.calls == 1


def test_probabilities_of_a_thought_are_left_out(server, endpoint):
    thought = [entry("<think>"), entry("no"), entry("</think>"), entry("\n\n")]
    server.script = [with_logprobs("<think>no</think>\n\nIt is red. yes", [*thought, *RED])]
    answer = OpenAIChatModel(endpoint()).chat(SURE_QUESTION)
    assert answer.text == "It is red. yes"
    assert "".join(token.text for token in answer.tokens) == answer.text


def test_no_more_alternatives_are_asked_for_than_the_api_allows_and_none_without_need(server, endpoint):
    server.script = [with_logprobs("It is red. yes", RED)]
    model = OpenAIChatModel(endpoint())
    model.chat(ChatRequest([{"role": "user", "content": "Is it red?"}], top_logprobs=500))
    assert server.seen[0].json["top_logprobs"] == 20
    assert model.chat(QUESTION).tokens is None
    assert not {"logprobs", "top_logprobs"} & set(server.seen[1].json)


def test_a_server_that_rejects_probabilities_is_asked_without_them_from_then_on(server, endpoint):
    server.script = [failure(400, "Unrecognized request argument supplied: top_logprobs"), completion("It is red. yes")]
    model = OpenAIChatModel(endpoint())
    answer = model.chat(SURE_QUESTION)
    assert (answer.text, answer.tokens) == ("It is red. yes", None)
    assert (answer.usage.calls, answer.usage.retries, answer.usage.input_tokens) == (1, 1, 11)
    model.chat(SURE_QUESTION)
    assert ["logprobs" in seen.json for seen in server.seen] == [True, False, False]


def test_json_mode_and_probabilities_can_be_rejected_one_after_the_other(server, endpoint):
    server.script = [failure(400, "no response_format"), failure(422, "no logprobs here"), completion("{}")]
    model = OpenAIChatModel(endpoint())
    answer = model.chat(ChatRequest(JSON_QUESTION.messages, is_json=True, top_logprobs=5))
    assert (answer.text, answer.usage.calls, answer.usage.retries) == ("{}", 1, 2)
    sent = [("response_format" in seen.json, "logprobs" in seen.json) for seen in server.seen]
    assert sent == [(True, True), (False, True), (False, False)]


def test_other_rejections_are_not_taken_for_that(server, endpoint):
    passing = with_logprobs("It is red. yes", RED)
    server.script = [failure(400, "no such model"), failure(500, "logprobs failed"), passing]
    assert error_of(OpenAIChatModel(endpoint()), SURE_QUESTION).fault == "rejected"
    assert OpenAIChatModel(endpoint()).chat(SURE_QUESTION).tokens is not None
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    "entries",
    [
        None,
        "no",
        [],
        ["It"],
        [{"token": "It is red. yes"}],
        [entry("It is red. yes", "-0.5")],
        [entry("It is red. yes", True)],
        [entry("It is red. yes", 0.5)],
        [entry("It is red. yes", float("nan"))],
        [entry("It is red. yes", float("-inf"))],
        [entry("It is red. yes", -(10**400))],
        [entry(None)],
        [entry("It is red. yes", top=[("no", 3.0)])],
        [entry("It is red. yes", top=[(7, -3.0)])],
        [{**entry("It is red. yes"), "top_logprobs": {"yes": -1}}],
        [entry("It is blue. yes")],  # another text
    ],
)
def test_malformed_probabilities_are_none(entries, server, endpoint):
    server.script = [with_logprobs("It is red. yes", entries)]
    answer = OpenAIChatModel(endpoint()).chat(SURE_QUESTION)
    assert (answer.text, answer.tokens) == ("It is red. yes", None)
    assert len(server.seen) == 1


@pytest.mark.parametrize("logprobs", [None, {}, [], "no", {"content": None}, {"tokens": ["a"], "token_logprobs": [-1]}])
def test_absent_probabilities_are_none(logprobs):
    assert read_tokens(logprobs, "yes") is None


def test_tokens_before_and_after_the_text_are_left_out():
    entries = [entry("<think>yes"), entry("</think>\n\n"), entry(" yes", -0.25), entry("<|im_end|>")]
    assert read_tokens({"content": entries}, "yes") == (Token("yes", -0.25),)


def test_characters_that_are_spread_over_tokens():
    content = [list("円".encode()[:2]), list("円".encode()[2:]), list(b". no")]
    entries = [entry("\\xe5\\x86", -0.5, bytes=part) for part in content]
    tokens = read_tokens({"content": entries}, "円. no")
    assert "".join(token.text for token in tokens) == "円. no"
    assert tokens[-1].text == ". no"


def test_probabilities_a_little_above_one_are_one():
    assert read_tokens({"content": [entry("yes", 1e-6)]}, "yes") == (Token("yes", 0.0),)
