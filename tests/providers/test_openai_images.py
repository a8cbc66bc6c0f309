import base64
import email
import email.policy

import numpy as np
import pytest

from clvr_jax.errors import UsageError
from clvr_jax.interfaces import ImageRequest, ProviderError
from clvr_jax.providers.endpoint import Prices
from clvr_jax.providers.openai_images import OpenAIImageModel, max_encoded_bytes
from tests.providers.server import KEY, Reply, failure, picture, pictures, png

IMAGE = picture(24, 32)


def error_of(tool, task=None):
    with pytest.raises(ProviderError) as caught:
        tool.generate(task or ImageRequest("a red circle"))
    assert "\n" not in str(caught.value)
    assert caught.value.__context__ is None
    return caught.value


def fields_of(seen):
    """The parts of a multipart request: (name, file name, content)."""
    head = f"Content-Type: {seen.headers['content-type']}\r\n\r\n".encode()
    parts = email.message_from_bytes(head + seen.body, policy=email.policy.HTTP).iter_parts()
    return [
        (part.get_param("name", header="content-disposition"), part.get_filename(), part.get_payload(decode=True))
        for part in parts
    ]


def test_a_picture_from_words(server, endpoint):
    told = {"input_tokens": 40, "output_tokens": 1000, "total_tokens": 1040}
    server.script = [pictures(png(IMAGE), usage=told)]
    tool = OpenAIImageModel(endpoint(prices=Prices(1.0, 2.0, picture=0.04)), extra={"quality": "high"})
    made = tool.generate(ImageRequest("a red circle", size=(24, 32)))
    assert np.array_equal(made.image, IMAGE)
    (seen,) = server.seen
    assert seen.path == "/v1/images/generations"
    # Width comes first on this wire.
    assert seen.json == {"model": "tiny", "prompt": "a red circle", "n": 1, "size": "32x24", "quality": "high"}
    usage = made.usage
    assert (usage.calls, usage.pictures, usage.input_tokens, usage.output_tokens) == (1, 1, 40, 1000)
    assert usage.dollars == pytest.approx(0.04 + (40 * 1.0 + 1000 * 2.0) / 1e6)


def test_the_seed_is_sent_where_it_is_known(server, endpoint):
    server.script = [pictures(png(IMAGE))]
    OpenAIImageModel(endpoint(), sends_seed=True, response_format="b64_json").generate(
        ImageRequest("a circle", seed=77)
    )
    assert server.seen[0].json["seed"] == 77
    assert server.seen[0].json["response_format"] == "b64_json"


def test_the_tools_own_size_holds_where_the_task_has_none(server, endpoint):
    server.script = [pictures(png(IMAGE))]
    OpenAIImageModel(endpoint(), size=(24, 32)).generate(ImageRequest("a circle"))
    OpenAIImageModel(endpoint()).generate(ImageRequest("a circle"))
    assert [seen.json.get("size") for seen in server.seen] == ["32x24", None]


def test_several_references_are_uploaded_in_order(server, endpoint):
    references = [picture(8, 8, 1), picture(9, 7, 2), picture(10, 10, 3)]
    server.script = [pictures(png(IMAGE))]
    OpenAIImageModel(endpoint(), sends_seed=True).generate(ImageRequest("make it 青い", references, seed=5))
    (seen,) = server.seen
    assert seen.path == "/v1/images/edits"
    sent = fields_of(seen)
    assert [part for part in sent if part[1]] == [
        ("image[]", f"reference_{number}.png", png(image)) for number, image in enumerate(references, start=1)
    ]
    values = {name: content.decode() for name, file, content in sent if not file}
    assert values == {"model": "tiny", "prompt": "make it 青い", "n": "1", "seed": "5"}


def test_one_reference_is_no_list(server, endpoint):
    server.script = [pictures(png(IMAGE))]
    OpenAIImageModel(endpoint()).generate(ImageRequest("make it blue", [IMAGE]))
    assert [name for name, file, _ in fields_of(server.seen[0]) if file] == ["image"]


def test_an_upload_is_whole_again_after_a_failure(server, endpoint):
    server.script = [failure(500), pictures(png(IMAGE))]
    made = OpenAIImageModel(endpoint()).generate(ImageRequest("make it blue", [IMAGE, IMAGE]))
    first, second = map(fields_of, server.seen)
    assert first == second
    assert made.usage.retries == 1


def test_references_as_seedream_takes_them(server, endpoint):
    server.script = [pictures(png(IMAGE))]
    tool = OpenAIImageModel(endpoint(), references="generations")
    tool.generate(ImageRequest("make it blue", [IMAGE, picture(4, 4)]))
    (seen,) = server.seen
    assert seen.path == "/v1/images/generations"
    sent = [url.removeprefix("data:image/png;base64,") for url in seen.json["image"]]
    assert [base64.b64decode(each) for each in sent] == [png(IMAGE), png(picture(4, 4))]


# --- pictures behind a URL --------------------------------------------------------------------------------------------


def test_a_picture_behind_a_url(server, endpoint):
    server.script = [pictures(server.url + "/made/1.png?signature=abc"), Reply(png(IMAGE))]
    made = OpenAIImageModel(endpoint(prices=Prices(picture=0.04))).generate(ImageRequest("a circle"))
    assert np.array_equal(made.image, IMAGE)
    assert (made.usage.calls, made.usage.pictures, made.usage.dollars) == (1, 1, 0.04)
    assert server.seen[1].path == "/made/1.png?signature=abc"
    assert KEY not in str(server.seen[1].headers)


def test_a_download_is_retried_without_a_second_picture(server, endpoint):
    server.script = [pictures(server.url + "/1.png"), Reply(status=503), Reply(png(IMAGE))]
    made = OpenAIImageModel(endpoint(prices=Prices(picture=0.04))).generate(ImageRequest("a circle"))
    assert [seen.path for seen in server.seen] == ["/v1/images/generations", "/1.png", "/1.png"]
    assert (made.usage.calls, made.usage.retries, made.usage.dollars) == (1, 1, 0.04)


@pytest.mark.parametrize(("status", "fault", "requests"), [(500, "down", 4), (404, "malformed", 2)])
def test_a_picture_that_is_not_there(server, endpoint, status, fault, requests):
    server.script = [pictures(server.url + "/1.png?signature=abc"), Reply(status=status)]
    error = error_of(OpenAIImageModel(endpoint(prices=Prices(picture=0.04))))
    assert error.fault == fault
    assert error.usage.dollars == 0.04
    assert "signature" not in str(error)
    assert len(server.seen) == requests


def test_a_url_may_be_the_picture(server, endpoint):
    server.script = [pictures("data:image/png;base64," + base64.b64encode(png(IMAGE)).decode())]
    assert np.array_equal(OpenAIImageModel(endpoint()).generate(ImageRequest("a circle")).image, IMAGE)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "/etc/hostname", "ftp://127.0.0.1/a.png", "http://[::1"])
def test_no_other_address_is_opened(server, endpoint, url):
    server.script = [pictures(url)]
    assert error_of(OpenAIImageModel(endpoint())).fault == "malformed"


@pytest.mark.parametrize("is_url", [True, False])
def test_an_image_larger_than_its_size_allows_is_cut(server, endpoint, is_url):
    large = b"\x89PNG" + bytes(6 << 20)
    server.script = [pictures(server.url + "/1.png"), Reply(large)] if is_url else [pictures(large)]
    error = error_of(OpenAIImageModel(endpoint(max_retries=0), size=(64, 64)))
    assert f"more than {max_encoded_bytes((64, 64)) if is_url else 5_657_941:,} bytes" in str(error)


def test_the_limit_of_an_image_grows_with_its_size():
    assert max_encoded_bytes((64, 64)) == 4 << 20
    assert max_encoded_bytes((1024, 1024)) == 8 << 20
    assert max_encoded_bytes(None) == 64 << 20


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_wrong_size_is_malformed_and_names_both(server, endpoint):
    server.script = [pictures(png(IMAGE))]
    error = error_of(OpenAIImageModel(endpoint(prices=Prices(picture=0.04))), ImageRequest("a circle", size=(64, 48)))
    assert error.fault == "malformed"
    assert "64 x 48" in str(error)
    assert "24 x 32" in str(error)
    # Paid for, and not asked for again: the same request would bring the same size.
    assert error.usage.dollars == 0.04
    assert len(server.seen) == 1


@pytest.mark.parametrize("content", [b"not a picture", b"", png(IMAGE)[:60], png(IMAGE)[:-200]])
def test_what_does_not_decode_is_malformed(server, endpoint, content):
    server.script = [pictures(content or b"\0")]
    error = error_of(OpenAIImageModel(endpoint()))
    assert error.fault == "malformed"
    assert "not an image" in str(error)


def test_broken_base64_is_malformed(server, endpoint):
    server.script = [Reply({"data": [{"b64_json": "???not base64"}]})]
    assert error_of(OpenAIImageModel(endpoint())).fault == "malformed"


@pytest.mark.parametrize("body", [{}, {"data": []}, {"data": None}, {"data": [{"revised_prompt": "a"}]}])
def test_an_answer_without_a_picture_is_retried_and_is_none(server, endpoint, body):
    server.script = [Reply(body)]
    error = error_of(OpenAIImageModel(endpoint(prices=Prices(picture=0.04))))
    assert error.fault == "down"
    assert error.usage.dollars == 0
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    "code", ["moderation_blocked", "content_policy_violation", "InputTextSensitiveContentDetected"]
)
def test_refusals_are_told_apart(server, endpoint, code):
    server.script = [failure(400, code=code)]
    assert error_of(OpenAIImageModel(endpoint())).fault == "refused"
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (ImageRequest("x" * 50_000), "50000 characters"),
        (ImageRequest("  \n"), "empty"),
        (ImageRequest("a circle", [IMAGE] * 17), "17 references"),
    ],
)
def test_what_cannot_be_drawn_is_rejected_before_any_request(server, endpoint, task, words):
    error = error_of(OpenAIImageModel(endpoint()), task)
    assert error.fault == "rejected"
    assert words in str(error)
    assert server.seen == []


def test_a_server_may_allow_longer_prompts(server, endpoint):
    server.script = [pictures(png(IMAGE))]
    OpenAIImageModel(endpoint(), max_prompt=100_000).generate(ImageRequest("円" * 50_000))
    assert server.seen[0].json["prompt"] == "円" * 50_000


def test_a_server_that_finds_the_prompt_too_long_rejects(server, endpoint):
    server.script = [failure(400, "prompt is too long", code="string_above_max_length")]
    assert error_of(OpenAIImageModel(endpoint())).fault == "rejected"


def test_the_key_is_in_no_error(server, endpoint):
    server.script = [failure(401, f"Incorrect API key provided: {KEY}")]
    error = error_of(OpenAIImageModel(endpoint()))
    assert error.fault == "rejected"
    assert KEY not in str(error)


def test_unknown_ways_to_send_references_are_a_usage_error(endpoint):
    with pytest.raises(UsageError, match="edits or generations"):
        OpenAIImageModel(endpoint(), references="mail")
