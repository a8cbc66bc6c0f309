"""Servers that lie: what is no reply, what has no end, what leads elsewhere, and what must not be written down."""

import base64
import contextlib
import gc
import gzip
import io
import json
import time
import types
import zlib
from itertools import repeat

import numpy as np
import pytest
from PIL import ExifTags, Image

from clvr_jax.interfaces import ChatRequest, ImageRequest, ProviderError
from clvr_jax.providers import base64_text
from clvr_jax.providers.bounded import HeldBytes, SharedBytes, count, read_object
from clvr_jax.providers.download import _is_public
from clvr_jax.providers.endpoint import Endpoint
from clvr_jax.providers.failures import Failure, NoReplyError, retry_after, retry_delay
from clvr_jax.providers.openai_chat import OpenAIChatModel
from clvr_jax.providers.openai_images import OpenAIImageModel
from clvr_jax.reasoning.answers import AnswerError
from clvr_jax.reasoning.thoughts import strip_thoughts
from clvr_jax.redaction import redact_url, redact_urls
from tests.providers.server import KEY, LoopbackServer, Reply, completion, dripping, failure, picture, pictures, png
from tests.robustness.corpus import png_head

QUESTION = ChatRequest([{"role": "user", "content": "How many circles?"}], max_tokens=55)
TASK = ImageRequest("a red circle")
IMAGE = picture(24, 32)


def ask(endpoint, **fields):
    return OpenAIChatModel(endpoint(**fields)).chat(QUESTION)


def error_of(call, *arguments, **fields):
    with pytest.raises(ProviderError) as caught:
        call(*arguments, **fields)
    assert "\n" not in str(caught.value)
    return caught.value


# --- what is no reply -------------------------------------------------------------------------------------------------


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


# --- what has no end --------------------------------------------------------------------------------------------------


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


# --- numbers ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("Sat, 28 Nov 100000000000000000000 20:00:00 GMT", None),
        ("Fri, 31 Dec 9999 23:59:59 -2359", None),
        ("1e400", None),
        ("nan", None),
        ("9" * 5000, None),
        ("1e30", 1e9),
        ("", None),
    ],
)
def test_a_time_that_makes_no_sense_is_no_wait(value, seconds):
    found = retry_after({"Retry-After": value}, 0.0)
    assert found == seconds or (seconds is None and found is not None and found > 1e9 / 4)


def google_429(delay):
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}]
    return {"error": {"code": 429, "message": "quota", "status": "RESOURCE_EXHAUSTED", "details": details}}


@pytest.mark.parametrize("wrap", [lambda body: body, lambda body: [body]])
def test_the_delay_that_gemini_names_in_the_body_is_waited_for(server, endpoint, wrap):
    server.script = [Reply(wrap(google_429("0.6s")), 429), completion("Two.")]
    assert ask(endpoint).text == "Two."
    first, second = server.seen
    assert second.time - first.time >= 0.6


def test_a_longer_delay_than_the_user_allows_ends_the_call(server, endpoint):
    server.script = [Reply(google_429("51342.5s"), 429)]
    error = error_of(ask, endpoint)
    assert (error.fault, len(server.seen)) == ("limited", 1)
    assert "51342 s" in str(error)


@pytest.mark.parametrize(
    "details", [None, "34s", [None], [{"@type": 7}], google_429("9" * 99 + "s")["error"]["details"]]
)
def test_details_that_name_no_delay(details):
    assert retry_delay(details) is None


# --- where it leads ---------------------------------------------------------------------------------------------------


def test_a_redirect_on_the_same_host_is_followed(server, endpoint):
    server.script = [Reply(status=307, headers={"Location": server.url + "/other"}), completion("Two.")]
    assert ask(endpoint).text == "Two."
    assert [seen.path for seen in server.seen] == ["/v1/chat/completions", "/other"]
    assert server.seen[1].json["messages"] == list(QUESTION.messages)


def test_a_redirect_to_another_host_is_refused_and_nothing_is_sent_there(server, endpoint):
    port = server.url.rpartition(":")[2]
    server.script = [Reply(status=307, headers={"Location": f"http://localhost:{port}/v1"})]
    error = error_of(ask, endpoint)
    assert "redirects to another host, localhost" in str(error)
    assert len(server.seen) == 1


def test_redirects_without_end_are_refused(server, endpoint):
    server.script = [Reply(status=308, headers={"Location": server.url + "/again"})]
    assert "more than 5 redirects" in str(error_of(ask, endpoint))


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("::1", False),
        ("::ffff:10.0.0.1", False),
        ("fe80::1%eth0", False),
        ("0.0.0.0", False),
        ("localhost", False),
    ],
)
def test_addresses_of_the_own_network(address, is_public):
    assert _is_public(address) == is_public


def test_an_image_in_the_own_network_is_fetched_only_if_its_host_is_allowed(server, endpoint, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    other = LoopbackServer()  # another name of this machine than the endpoint's
    try:
        address = other.url.replace("127.0.0.1", "localhost") + "/1.png"
        server.script, other.script = [pictures(address)], [Reply(png(IMAGE))]
        error = error_of(OpenAIImageModel(endpoint()).generate, TASK)
        assert "local network" in str(error)
        assert "image_hosts" in str(error)
        assert other.seen == []
        made = OpenAIImageModel(endpoint(image_hosts=("localhost",))).generate(TASK)
        assert np.array_equal(made.image, IMAGE)
    finally:
        other.close()


def test_a_name_that_changes_its_address_after_the_check_is_refused(server, endpoint, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr("clvr_jax.providers.download._addresses", lambda host: ["93.184.216.34"])
    there = server.url.replace("127.0.0.1", "localhost") + "/1.png"
    server.script = [lambda seen: Reply(png(IMAGE)) if seen.path == "/1.png" else pictures(there)]
    error = error_of(OpenAIImageModel(endpoint()).generate, TASK)
    assert "is in the local network" in str(error)
    assert error.fault == "malformed"


def test_an_image_that_moves_to_another_host_is_refused(server, endpoint):
    port = server.url.rpartition(":")[2]
    server.script = [
        pictures(server.url + "/1.png"),
        Reply(status=302, headers={"Location": f"http://localhost:{port}/2.png"}),
    ]
    assert "redirects to another host, localhost" in str(error_of(OpenAIImageModel(endpoint()).generate, TASK))
    assert len(server.seen) == 2


# --- what must not be written down ------------------------------------------------------------------------------------


def test_a_key_that_a_reply_repeats_is_taken_out(server, endpoint):
    server.script = [completion(f"My key is {KEY}.")]
    assert ask(endpoint).text == "My key is ***."


def test_a_password_in_the_address_is_in_no_error_and_no_reply(server, endpoint):
    url = server.url.replace("://", "://me:pass%2Fword1@") + "/v1"
    server.script = [completion("pass%2Fword1 is pass/word1")]
    assert ask(endpoint, base_url=url).text == "*** is ***"
    server.script = [failure(401, "no pass/word1 of yours")] * 2
    assert "pass" not in str(error_of(ask, endpoint, base_url=url))


def test_addresses_are_redacted():
    assert redact_url("https://me:secret@host:8000/v1?api-version=1&key=abc") == (
        "https://***@host:8000/v1?api-version=***&key=***"
    )
    assert redact_url("http://localhost:8000/v1") == "http://localhost:8000/v1"
    assert redact_urls({"a": ["http://me:x@h/v1", 3, "me@home.org"]}) == {"a": ["http://***@h/v1", 3, "me@home.org"]}


# --- servers as they are ----------------------------------------------------------------------------------------------


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


def test_an_answer_with_a_path_says_which_option_helps(server, endpoint):
    server.script = [pictures("/home/user/.xinference/image/1.png")]
    assert "response format to b64_json" in str(error_of(OpenAIImageModel(endpoint()).generate, TASK))


def test_a_byte_order_mark_is_skipped(server, endpoint):
    server.script = [Reply(b"\xef\xbb\xbf" + json.dumps(completion("Zwölf.").content).encode())]
    assert ask(endpoint).text == "Zwölf."


def test_base64_of_the_other_alphabet_is_read(server, endpoint):
    text = base64.urlsafe_b64encode(png(IMAGE)).decode().rstrip("=")
    assert "-" in text
    assert "_" in text
    server.script = [Reply({"data": [{"b64_json": text}]})]
    assert np.array_equal(OpenAIImageModel(endpoint()).generate(TASK).image, IMAGE)


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


@pytest.mark.parametrize(
    ("size", "shape", "message"),
    [
        (None, (8000, 8000), "no size was requested"),
        ((64, 64), (4000, 4000), "requested an image of 64 x 64"),
        ((64, 64), (64, 65), "requested an image of 64 x 64"),
    ],
)
def test_an_image_of_another_size_is_refused_before_it_is_decoded(server, endpoint, monkeypatch, size, shape, message):
    def decoded(*_):
        raise AssertionError

    monkeypatch.setattr("clvr_jax.providers.openai_images.decode_image", decoded)
    server.script = [pictures(png_head(*shape))]
    error = error_of(OpenAIImageModel(endpoint(), size=size).generate, TASK)
    assert message in str(error)
    assert error.fault == "malformed"


def test_what_an_image_that_fails_consists_of_is_not_kept(server, endpoint):
    """Frames of an error that is in a cycle would hold all of it until the garbage collector runs."""
    content = b"x" * 1_000_000
    server.script = [pictures(content), pictures(f"{server.url}/1.png"), Reply(content)]
    tool = OpenAIImageModel(endpoint())
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            assert error_of(tool.generate, TASK).fault == "malformed"
        frames = [each for each in gc.get_objects() if isinstance(each, types.FrameType)]
        held = [
            each.f_code.co_name for each in frames if "clvr_jax" in each.f_code.co_filename and content in local(each)
        ]
    finally:
        gc.enable()
    assert held == []


def local(frame):
    return [value for value in frame.f_locals.values() if isinstance(value, bytes)]


@pytest.mark.parametrize(
    "text", ["QUJD", "QUI=", "QUI", " Q U\nJD", "-_-_", "data:image/png;base64,QUJD", "QUJD" * 9 + "QQ = =\n"]
)
def test_base64_is_decoded_alike_in_pieces_of_any_size(text, monkeypatch):
    standard = "".join(text.partition(",")[2] or text).translate(str.maketrans("-_", "+/", " \n="))
    expected = base64.b64decode(standard + "=" * (-len(standard) % 4))
    for piece in (1, 3, 4, 1 << 20):
        monkeypatch.setattr(base64_text, "_PIECE", piece)
        assert base64_text.decode_base64(text) == expected


@pytest.mark.parametrize("text", ["Q", "QUJDR", "QUI=QUJD", "QU=I", "QUJ?", "QUJ\u00e9", "data:QUJD"])
def test_what_is_no_base64_is_malformed_in_pieces_of_any_size(text, monkeypatch):
    for piece in (1, 3, 4, 1 << 20):
        monkeypatch.setattr(base64_text, "_PIECE", piece)
        with pytest.raises(Failure) as caught:
            base64_text.decode_base64(text)
        assert caught.value.fault == "malformed"


def test_an_image_on_its_side_has_the_size_that_was_asked_for(server, endpoint):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32)).save(buffer, "JPEG", exif=exif)
    server.script = [pictures(buffer.getvalue())]
    assert OpenAIImageModel(endpoint(), size=(48, 32)).generate(TASK).image.shape == (48, 32, 3)
    assert "got 48 x 32" in str(error_of(OpenAIImageModel(endpoint(), size=(32, 48)).generate, TASK))


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


def test_a_reply_far_longer_than_its_tokens_is_no_reply(server, endpoint):
    server.script = [completion("x" * 2_000_000)]
    error = error_of(ask, endpoint)
    assert "characters, far more than max_tokens" in str(error)
    assert isinstance(error, NoReplyError)


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
