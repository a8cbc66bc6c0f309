"""How long a server asks to wait, in a header or in the body of an error."""

import pytest

from clvr_jax.providers.failures import retry_after, retry_delay
from tests.providers.asking import ask, error_of
from tests.providers.server import Reply, completion


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
