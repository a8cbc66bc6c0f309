"""Fields that a server refuses are left out of its requests, once, and this is told."""

import numpy as np
import pytest

from clvr_jax.providers.openai_chat import OpenAIChatModel
from clvr_jax.providers.openai_images import OpenAIImageModel
from tests.providers.asking import IMAGE, QUESTION, TASK, ask, error_of
from tests.providers.server import Reply, completion, failure, pictures, png


def gpt5(seen):
    """A server that refuses one field after another, as OpenAI's reasoning models do."""
    for name, why in (
        ("max_tokens", "is not supported with this model. Use 'max_completion_tokens' instead."),
        ("temperature", "does not support 0 with this model. Only the default (1) value is supported."),
        ("seed", "is unknown."),
    ):
        if name in seen.json:
            return failure(400, f"Unsupported parameter: '{name}' {why}", code="unsupported_parameter", param=name)
    return completion("Two.")


def test_fields_that_a_server_refuses_by_name_are_adapted_once_and_told(server, endpoint, capsys):
    server.script = [gpt5]
    model = OpenAIChatModel(endpoint())
    answer = model.chat(QUESTION)
    assert (answer.text, answer.usage.calls, answer.usage.retries, len(server.seen)) == ("Two.", 1, 3, 4)
    assert model.chat(QUESTION).text == "Two."
    assert set(server.seen[-1].json) == {"model", "messages", "max_completion_tokens"}
    assert len(server.seen) == 5
    assert [note.split(";")[0] for note in model.adapted] == [
        "max_tokens is sent as max_completion_tokens",
        "temperature left out",
        "seed left out",
    ]
    assert capsys.readouterr().err.count("the server rejects a field") == 3


@pytest.mark.parametrize(
    "refusal",
    [
        Reply({"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "not permitted"}]}, 422),
        Reply([{"error": {"code": 400, "message": 'Unknown name "seed": Cannot find field.'}}], 400),
        failure(400, "Unrecognized request argument supplied: seed"),
    ],
)
def test_other_servers_refuse_in_other_words(server, endpoint, refusal):
    server.script = [lambda seen: refusal if "seed" in seen.json else completion("Two.")]
    assert ask(endpoint).text == "Two."
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    "message",
    [
        "max_tokens is too large: 5000. This model supports at most 4096 completion tokens",
        "This model's maximum context length is 8192 tokens; you asked for more in max_tokens",
        "no such model",
    ],
)
def test_other_complaints_are_passed_on(server, endpoint, message):
    server.script = [failure(400, message)]
    assert message[:20] in str(error_of(ask, endpoint))
    assert len(server.seen) == 1


def test_a_server_that_takes_neither_name_of_the_limit_is_asked_twice(server, endpoint):
    server.script = [lambda seen: failure(400, f"unknown field {next(name for name in seen.json if 'max_' in name)}")]
    assert error_of(ask, endpoint).fault == "rejected"
    assert len(server.seen) == 2


def test_an_image_server_that_refuses_a_field_is_asked_without_it(server, endpoint):
    refusal = failure(400, "Unknown parameter: 'response_format'.", param="response_format")
    server.script = [lambda seen: refusal if "response_format" in seen.json else pictures(png(IMAGE))]
    tool = OpenAIImageModel(endpoint(), response_format="b64_json", sends_seed=True)
    made = tool.generate(TASK)
    assert np.array_equal(made.image, IMAGE)
    assert (made.usage.calls, made.usage.retries) == (1, 1)
    assert tool.adapted == ("response_format left out",)
