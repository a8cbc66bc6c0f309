"""Malformed, unsupported and excessive requests: one shape of error, never a 500."""

import asyncio
import base64
import io
import json

import pytest
from PIL import Image

from clvr_jax.serving.api.bodies import bounded_receive
from clvr_jax.serving.errors import ApiError
from tests.serving.conftest import PROMPT

GENERATE, EDIT, CHAT, LOOPS = "/v1/images/generations", "/v1/images/edits", "/v1/chat/completions", "/v1/loops"


def png(width=64, height=64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def chat(**fields):
    return {"model": "shapes-tiny-controller", "messages": [{"role": "user", "content": "hello"}], **fields}


def url_message(url):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


REFUSED = [
    (GENERATE, {}, 422, "prompt"),
    (GENERATE, {"prompt": ""}, 422, "prompt"),
    (GENERATE, {"prompt": " \n "}, 422, "prompt"),
    (GENERATE, {"prompt": "x" * 32_001}, 422, "prompt"),
    (GENERATE, {"prompt": "red " * 7_000}, 422, "prompt"),  # more tokens than the model reads
    (GENERATE, {"prompt": "\ud800"}, 422, "prompt"),
    (GENERATE, {"prompt": ["a", "b"]}, 422, "prompt"),
    (GENERATE, {"prompt": PROMPT, "n": 0}, 422, "n"),
    (GENERATE, {"prompt": PROMPT, "n": 11}, 422, "n"),
    (GENERATE, {"prompt": PROMPT, "size": "big"}, 422, "size"),
    (GENERATE, {"prompt": PROMPT, "size": "65x64"}, 422, "size"),
    (GENERATE, {"prompt": PROMPT, "size": "1024x1024"}, 422, "size"),
    (GENERATE, {"prompt": PROMPT, "style": "vivid"}, 422, "style"),
    (GENERATE, {"prompt": PROMPT, "background": "transparent"}, 422, "background"),
    (GENERATE, {"prompt": PROMPT, "shade": 3}, 422, "shade"),
    (GENERATE, {"prompt": PROMPT, "seed": -1}, 422, "seed"),
    (GENERATE, {"prompt": PROMPT, "seed": 1e300}, 422, "seed"),
    (GENERATE, {"prompt": PROMPT, "guidance_scale": 3.0}, 422, "guidance_scale"),  # of a distilled model
    (GENERATE, {"prompt": PROMPT, "num_inference_steps": 101}, 422, "num_inference_steps"),
    (GENERATE, {"prompt": PROMPT, "max_steps": 17}, 422, "max_steps"),
    *((GENERATE, {"prompt": PROMPT, name: 10**400}, 422, name) for name in ("max_steps", "max_nfe", "seed", "n")),
    (GENERATE, {"prompt": PROMPT, "num_inference_steps": 10**400}, 422, "num_inference_steps"),
    (GENERATE, {"prompt": PROMPT, "max_seconds": 10**400}, 422, "max_seconds"),
    (GENERATE, {"prompt": PROMPT, "partial_images": 2}, 422, None),
    (GENERATE, {"prompt": PROMPT, "stream": True, "n": 2}, 422, None),
    (GENERATE, {"prompt": PROMPT, "mode": "one-shot", "max_steps": 2}, 422, None),
    (GENERATE, {"prompt": PROMPT, "mode": "one-shot", "quality": "high"}, 422, None),
    (GENERATE, {"prompt": PROMPT, "model": "gpt-image-1"}, 404, "model"),
    (LOOPS, {"prompt": PROMPT, "n": 2}, 422, "n"),
    (LOOPS, {"prompt": PROMPT, "images": ["http://127.0.0.1/a.png"]}, 400, "images"),
    (LOOPS, {"prompt": PROMPT, "images": ["%%%"]}, 400, "images"),
    (LOOPS, {"prompt": PROMPT, "images": [base64.b64encode(b"no image").decode()]}, 400, "images"),
    (CHAT, chat(tools=[]), 422, "tools"),
    (CHAT, chat(top_p=0.5), 422, "top_p"),
    (CHAT, chat(max_tokens=2000), 422, "max_tokens"),
    (CHAT, chat(max_completion_tokens=10**400), 422, "max_completion_tokens"),
    (CHAT, chat(temperature=3), 422, "temperature"),
    (CHAT, chat(messages=[]), 422, "messages"),
    (CHAT, chat(messages=[{}] * 100_000), 400, None),  # more values than are read
    (CHAT, chat(messages=[{"role": "tool", "content": "x"}]), 422, "messages.0.role"),
    (CHAT, chat(model="gpt-5"), 404, "model"),
    (CHAT, chat(messages=url_message("https://example.com/a.png")), 400, "image_url"),
    (CHAT, chat(messages=url_message("file:///etc/passwd")), 400, "image_url"),
]


def error_of(response, status):
    assert response.status_code == status, response.text
    (name,) = response.json()
    error = response.json()["error"]
    assert name == "error"
    assert sorted(error) == ["code", "message", "param", "type"]
    assert isinstance(error["message"], str)
    assert response.headers["x-request-id"]
    return error


@pytest.mark.parametrize(("path", "body", "status", "param"), REFUSED, ids=range(len(REFUSED)))
def test_a_request_that_cannot_be_met_is_refused_by_name(http, path, body, status, param):
    content = json.dumps(body)
    response = http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert error_of(response, status)["param"] == param


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"text"', b'{"prompt": NaN}', b"[" * 5000]
)
@pytest.mark.parametrize("path", [GENERATE, CHAT, LOOPS])
def test_a_body_that_is_no_object_is_refused(http, path, content):
    response = http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    error_of(response, response.status_code)


def test_malformed_uploads_are_refused(http):
    fields, image = {"prompt": PROMPT, "mode": "one-shot"}, {"image": ("a.png", png())}
    assert error_of(http.post(EDIT, json=fields), 400)["code"] == "invalid_content_type"
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    error_of(http.post(EDIT, content=b"no multipart", headers=broken), 400)
    assert error_of(http.post(EDIT, data=fields, files={"other": ("a", b"1")}), 422)["param"] == "other"
    assert error_of(http.post(EDIT, data={**fields, "n": "two"}, files=image), 422)["param"] == "n"
    assert error_of(http.post(EDIT, data=fields, files={**image, "mask": ("m.png", png())}), 422)["param"] == "mask"
    assert error_of(http.post(EDIT, data=fields, files={"image": ("a.png", png()[:60])}), 400)["param"] == "image"
    assert error_of(http.post(EDIT, data=fields, files={"image": ("a.png", png(4, 4))}), 400)["param"] == "image"
    assert error_of(http.post(EDIT, data=fields, files=[("image[]", ("a.png", png()))] * 17), 422)["param"] == "image"
    large = {"image": ("a.png", png(200, 200))}  # whose edit would have its size
    assert error_of(http.post(EDIT, data=fields, files=large), 422)["param"] == "size"
    assert error_of(http.post(EDIT, data={**fields, "input_fidelity": "low"}, files=image), 422)


def test_a_body_above_the_limit_is_refused_whatever_its_header_says(http):
    body = b'{"prompt": "' + b"x" * (2 << 20) + b'"}'
    assert error_of(http.post(GENERATE, content=body), 413)["code"] == "body_too_large"
    parts = (body[start : start + 65536] for start in range(0, len(body), 65536))
    json_type = {"Content-Type": "application/json"}
    assert error_of(http.post(GENERATE, content=parts, headers=json_type), 413)["code"] == "body_too_large"


def test_a_body_that_drips_is_refused_after_the_deadline():
    async def drip():
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def read(receive, pieces):
        return [await receive() for _ in range(pieces)]

    with pytest.raises(ApiError) as caught:
        asyncio.run(read(bounded_receive(drip, 10**6, 0.3), 1000))
    assert (caught.value.status_code, caught.value.code) == (408, "body_too_slow")
    with pytest.raises(ApiError) as caught:
        asyncio.run(read(bounded_receive(drip, 5, 60), 6))
    assert caught.value.status_code == 413

    async def wait_for_images():
        bounded = bounded_receive(slow_second, 10**6, 0.05)
        return [(await bounded())["type"], (await bounded())["type"]]

    async def slow_second():
        if len(messages) == 1:
            await asyncio.sleep(0.2)
        return messages.pop()

    messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"x"}]
    assert asyncio.run(wait_for_images()) == ["http.request", "http.disconnect"]  # the deadline was that of the body


def test_everything_but_the_state_needs_the_key(server):
    with server.client(key=None) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").status_code == 200
        for path in ("/v1/models", "/metrics", "/version", "/v1/loops", "/openapi.json", "/nowhere"):
            assert error_of(client.get(path), 401)["code"] == "invalid_api_key"
    with server.client("sk-test-of-the-serveR") as client:
        error_of(client.get("/v1/models"), 401)


def test_unknown_paths_and_methods_have_the_same_form(http):
    error_of(http.get("/v1/nowhere"), 404)
    error_of(http.put(GENERATE), 405)
    for path in ("/v1/loops/loop_0", "/v1/images/loop_0_0/content", "/v1/images/..%2f..%2fetc/content"):
        error_of(http.get(path), 404)
    error_of(http.get(f"/v1/loops/loop_{'0' * 24}/events"), 404)
    error_of(http.post(f"/v1/loops/loop_{'0' * 24}/accept"), 404)
    error_of(http.delete(f"/v1/loops/loop_{'0' * 24}"), 404)
    error_of(http.get("/v1/loops?limit=0"), 422)
    assert "access-control-allow-origin" not in http.get("/health", headers={"Origin": "http://evil"}).headers


def test_the_request_id_of_a_client_is_repeated_if_it_is_harmless(http):
    assert http.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert http.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req_")


def test_methods_of_a_client_make_no_metrics_of_their_own(http):
    for number in range(3):
        error_of(http.request(f"BREW{number}", "/v1/nowhere"), 404)
    assert "BREW" not in http.get("/metrics").text


def test_metrics_and_schema_are_readable(http):
    text = http.get("/metrics").text
    names = ("running", "waiting", "queue_seconds", "batch_size", "stage_seconds", "nfe", "outcomes", "compilations")
    assert [name for name in names if f"# HELP clvr_{name}" not in text] == []
    assert http.get("/version").json()["version"]
    assert set(http.get("/openapi.json").json()["paths"]) >= {GENERATE, EDIT, CHAT, LOOPS}
