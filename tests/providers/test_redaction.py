"""Keys and passwords are in nothing that is written down."""

from clvr_jax.files.redaction import redact_url, redact_urls
from tests.providers.asking import ask, error_of
from tests.providers.server import KEY, completion, failure


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
