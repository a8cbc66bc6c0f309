"""The official client of OpenAI's API against the running server."""

import base64
import io

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from tests.serving.conftest import KEY, PROMPT

ONE_SHOT = {"mode": "one-shot", "seed": 5}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=300)


def opened(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["shapes-tiny", "shapes-tiny-controller"]
    assert client.models.retrieve("shapes-tiny").owned_by == "clvr"


@pytest.mark.slow
def test_one_shot_images_are_those_of_the_pipeline(client, server):
    made = client.images.generate(model="shapes-tiny", prompt=PROMPT, n=2, extra_body=ONE_SHOT)
    assert [entry.seed for entry in made.data] == [5, 6]
    for entry in made.data:
        expected = server.pipeline.flux(PROMPT, seed=entry.seed).images[0]
        np.testing.assert_array_equal(np.asarray(opened(entry.b64_json)), np.asarray(expected))
    assert (made.size, made.quality, made.output_format, made.background) == ("64x64", "low", "png", "opaque")
    assert made.usage.output_tokens == 2 * (64 // server.service.models.token_pixels) ** 2
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens


def test_the_loop_gives_the_trajectory_of_the_command_line(client, server):
    (entry,) = client.images.generate(prompt=PROMPT, extra_body={"seed": 1, "max_steps": 2}).data
    stored = server.service.store.trajectory(entry.loop_id)
    expected = server.pipeline(PROMPT, seed=1, max_steps=2).trajectory
    assert stored.outcome == expected.outcome == entry.outcome
    assert [step.reasoning for step in stored.steps] == [step.reasoning for step in expected.steps]
    assert [step.verification for step in stored.steps] == [step.verification for step in expected.steps]
    np.testing.assert_array_equal(np.asarray(opened(entry.b64_json)), np.asarray(expected.image))
    assert entry.revised_prompt.startswith(PROMPT)


def test_a_stream_has_partial_images_and_the_result(client):
    events = list(
        client.images.generate(prompt=PROMPT, stream=True, partial_images=1, extra_body={"seed": 1, "max_steps": 2})
    )
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert events[0].partial_image_index == 0
    assert opened(events[0].b64_json).size == (64, 64)
    assert events[1].usage.output_tokens > 0
    (alone,) = client.images.generate(prompt=PROMPT, stream=True, partial_images=0, extra_body=ONE_SHOT)
    assert alone.type == "image_generation.completed"


def test_edits_use_the_image(client, server):
    red = Image.new("RGB", (64, 64), (255, 0, 0))
    buffer = io.BytesIO()
    red.save(buffer, "PNG")
    files = ("red.png", buffer.getvalue())
    made = client.images.edit(image=files, prompt=PROMPT, output_format="webp", extra_body=ONE_SHOT)
    assert opened(made.data[0].b64_json).format == "WEBP"
    assert made.usage.input_tokens_details.image_tokens > 0
    made = client.images.edit(image=[files], prompt=PROMPT, stream=True, extra_body=ONE_SHOT)
    (event,) = made
    assert event.type == "image_edit.completed"
    expected = server.pipeline.flux(PROMPT, [red], seed=5).images[0]
    np.testing.assert_array_equal(np.asarray(opened(event.b64_json)), np.asarray(expected))


def test_a_url_leads_to_the_image(client):
    (entry,) = client.images.generate(
        prompt=PROMPT, response_format="url", output_format="jpeg", extra_body=ONE_SHOT
    ).data
    response = httpx2.get(entry.url, headers={"Authorization": f"Bearer {KEY}"})
    assert response.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(response.content)).size == (64, 64)
    assert httpx2.get(entry.url).status_code == 401


@pytest.mark.slow
def test_chat_is_the_controllers_reply(client, server):
    messages = [{"role": "user", "content": f"Required of: {PROMPT}"}]
    expected = server.service.models.vlm.answer_all([messages], [[]], 32, top_logprobs=2)[0]
    reply = client.chat.completions.create(
        model="shapes-tiny-controller", messages=messages, max_tokens=32, logprobs=True, top_logprobs=2
    )
    (choice,) = reply.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == "stop"
    assert [entry.logprob for entry in choice.logprobs.content] == [token.logprob for token in expected.tokens]
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    assert reply.usage.completion_tokens == expected.output_tokens
    chunks = client.chat.completions.create(
        model="shapes-tiny-controller",
        messages=messages,
        max_tokens=32,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected.text
    assert chunks[-1].usage == reply.usage
    cut = client.chat.completions.create(
        model="shapes-tiny-controller", messages=messages, max_tokens=3, logprobs=True, top_logprobs=2
    )
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)
    assert expected.text.startswith(cut.choices[0].message.content)


def test_errors_are_those_of_the_client_library(client, server):
    with pytest.raises(openai.UnprocessableEntityError, match="negative_prompt is not supported") as refused:
        client.images.generate(prompt=PROMPT, extra_body={"negative_prompt": "blue"})
    assert (refused.value.param, refused.value.code) == ("negative_prompt", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError, match="shapes-tiny"):
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
