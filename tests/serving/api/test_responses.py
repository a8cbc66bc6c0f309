"""The Responses API, and chats with the image model, by the official client against the running server."""

import base64
import io

import numpy as np
import openai
import pytest
from PIL import Image

from tests.serving.conftest import KEY, PROMPT, wait_until

ONE_SHOT = {"mode": "one-shot", "seed": 5}
LOOP = {"seed": 1, "max_steps": 2}
TOOL = {"type": "image_generation"}
UNKNOWN = "0" * 24


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=300)


def opened(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def response(client):
    return client.responses.create(model="shapes-tiny", input=PROMPT, tools=[TOOL], extra_body=LOOP)


def test_a_response_has_an_item_for_each_image_and_each_look(response, server):
    stored = server.service.store.trajectory(response.loop_id)
    assert (response.status, response.object, response.outcome) == ("completed", "response", stored.outcome)
    calls = [item for item in response.output if item.type == "image_generation_call"]
    assert len(calls) == len(stored.generated)
    for call, step in zip(calls, stored.generated, strict=True):
        np.testing.assert_array_equal(opened(call.result), step.image)
        assert (call.status, call.action, call.output_format) == ("completed", "generate", "png")
        assert step.reasoning in call.revised_prompt
    looks = [item for item in response.output if item.type == "reasoning"]
    assert [look.summary[0].text for look in looks] == [step.verification.report for step in stored.generated]
    assert response.best == calls[stored.best].id
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.output_text == ""


def test_a_response_can_be_retrieved(client, response):
    assert client.responses.retrieve(response.id).output == response.output
    for unknown in (f"resp_{UNKNOWN}", "resp_1"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(unknown)


def test_a_stream_is_numbered_and_ends_with_the_response(client, response):
    tool = {**TOOL, "partial_images": 1, "output_format": "webp"}
    events = list(client.responses.create(input=PROMPT, tools=[tool], stream=True, extra_body=LOOP))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"]
    first = [f"image_generation_call.{kind}" for kind in ("in_progress", "generating", "partial_image", "completed")]
    assert kinds[2:8] == ["output_item.added", *first, "output_item.done"]
    assert kinds.count("image_generation_call.partial_image") == 1
    assert kinds[-1] == "completed"
    done = [event for event in events if event.type == "response.output_item.done"]
    assert [event.output_index for event in done] == list(range(len(done)))
    final = events[-1].response
    assert [event.item.id for event in done] == [item.id for item in final.output]
    assert [item.type for item in final.output] == [item.type for item in response.output]
    partial = next(event for event in events if event.type.endswith("partial_image"))
    assert partial.partial_image_b64 == done[0].item.result
    assert Image.open(io.BytesIO(base64.b64decode(partial.partial_image_b64))).format == "WEBP"
    assert final.usage.output_tokens == response.usage.output_tokens


def test_a_previous_response_is_edited(client, server, response):
    edit = client.responses.create(
        input="a blue star", previous_response_id=response.id, tools=[TOOL], extra_body=ONE_SHOT, metadata={"a": "b"}
    )
    previous = server.service.store.trajectory(response.loop_id).image
    expected = server.pipeline.flux("a blue star", [Image.fromarray(np.asarray(previous))], seed=5).images[0]
    (call,) = edit.output
    np.testing.assert_array_equal(opened(call.result), np.asarray(expected))
    assert (call.action, edit.previous_response_id, edit.metadata) == ("edit", response.id, {"a": "b"})
    # The same by the item of its image, and with the image itself.
    best = {"type": "image_generation_call", "id": response.best}
    url = data_url(Image.fromarray(np.asarray(previous)))
    message = [{"type": "input_text", "text": "a blue star"}, {"type": "input_image", "image_url": url}]
    for given in ([best, {"role": "user", "content": "a blue star"}], [{"role": "user", "content": message}]):
        same = client.responses.create(input=given, tools=[{**TOOL, "action": "edit"}], extra_body=ONE_SHOT)
        assert same.output[0].result == call.result
    new = client.responses.create(
        input="a blue star",
        previous_response_id=response.id,
        tools=[{**TOOL, "action": "generate"}],
        extra_body=ONE_SHOT,
    )
    np.testing.assert_array_equal(
        opened(new.output[0].result), np.asarray(server.pipeline.flux("a blue star", seed=5).images[0])
    )


@pytest.mark.slow
def test_a_canceled_loop_is_an_incomplete_response(client, gate, server):
    with client.responses.create(input=PROMPT, tools=[TOOL], stream=True, extra_body=LOOP) as stream:
        events = iter(stream)
        loop_id = next(events).response.loop_id
        job = server.service.jobs[loop_id]
        # An image that is accepted ends the loop before the cancel; this one will not be.
        required = ["one blue star", "nine green squares"]
        server.service.scheduler.change(job, lambda: job.state.edit_plan(required))
        while not job.state.steps:
            gate.let_one()
        server.service.scheduler.stop(job, "canceled")
        gate.is_open = True
        last = list(events)[-1]
    assert (last.type, last.response.incomplete_details.reason) == ("response.incomplete", "canceled")
    assert last.response.output[0].result
    wait_until(lambda: not server.service.jobs)


REFUSED = [
    ({"tools": []}, 422, "tools"),
    ({"tools": [{"type": "web_search"}]}, 422, "tools.0.type"),
    ({"tools": [{**TOOL, "partial_images": 1}]}, 422, None),
    ({"tools": [{**TOOL, "size": "big"}]}, 422, "size"),
    ({"tools": [{**TOOL, "quality": "max"}]}, 422, "quality"),
    ({"tools": [{**TOOL, "input_image_mask": {}}]}, 422, "tools.0.input_image_mask"),
    ({"tools": [{**TOOL, "action": "edit"}]}, 422, "tools"),
    ({"tools": [{**TOOL, "model": "gpt-image-1"}]}, 404, "model"),
    ({"instructions": "Be brief."}, 422, "instructions"),
    ({"input": " "}, 422, "prompt"),
    ({"input": []}, 422, None),
    ({"input": [{"role": "system", "content": "x"}]}, 422, None),
    ({"input": [{"type": "image_generation_call", "id": f"ig_{UNKNOWN}_0"}]}, 404, "input"),
    ({"previous_response_id": f"resp_{UNKNOWN}"}, 404, "previous_response_id"),
    ({"store": False}, 422, "store"),
    ({"max_output_tokens": 5}, 422, "max_output_tokens"),
    ({"tool_choice": "none"}, 422, None),
]


@pytest.mark.parametrize(("fields", "status", "param"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_supported_is_refused_by_name(http, fields, status, param):
    answer = http.post("/v1/responses", json={"input": PROMPT, "tools": [TOOL], **fields})
    assert answer.status_code == status, answer.text
    if param is not None:
        assert answer.json()["error"]["param"] == param


def test_a_chat_with_the_image_model_is_answered_with_an_image(client, server):
    messages = [{"role": "user", "content": PROMPT}]
    reply = client.chat.completions.create(model="shapes-tiny", messages=messages, extra_body=ONE_SHOT)
    (part,) = reply.choices[0].message.content
    assert part["type"] == "image_url"
    url = part["image_url"]["url"]
    expected = server.pipeline.flux(PROMPT, seed=5).images[0]
    np.testing.assert_array_equal(opened(url.removeprefix("data:image/png;base64,")), np.asarray(expected))
    assert reply.usage.total_tokens > 0

    messages += [{"role": "assistant", "content": [part]}, {"role": "user", "content": "a blue star"}]
    chunks = list(
        client.chat.completions.create(
            model="shapes-tiny",
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=ONE_SHOT,
        )
    )
    (edited,) = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    expected = server.pipeline.flux("a blue star", [expected], seed=5).images[0]
    shown = opened(edited[0]["image_url"]["url"].removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(shown, np.asarray(expected))
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 0


CHATS = [
    ({"max_tokens": 5}, "max_tokens"),
    ({"logprobs": True}, "logprobs"),
    ({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}, "messages"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ({"model": "shapes-tiny-controller", "max_steps": 2}, "max_steps"),
    ({"model": "shapes-tiny-controller", "size": "64x64"}, "size"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": " "}]}]}, "prompt"),
]


@pytest.mark.parametrize(("fields", "param"), CHATS, ids=range(len(CHATS)))
def test_fields_of_the_other_model_are_refused(http, fields, param):
    body = {"model": "shapes-tiny", "messages": [{"role": "user", "content": PROMPT}], **fields}
    answer = http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
