import socket

import pytest

from clvr_jax.providers.endpoint import Failure
from clvr_jax.providers.plain_post import PlainPost
from tests.providers.server import Reply, failure


def post(url, **headers):
    return PlainPost(url, headers, 5.0)


def test_proxies_are_those_of_the_environment(server, monkeypatch):
    server.script = [Reply({"a": 1})]
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//me:secret@"))
    assert post("http://nowhere.invalid/v1")("/chat", {}) == '{"a": 1}'
    assert server.seen[0].path == "http://nowhere.invalid/v1/chat"
    assert server.seen[0].headers["proxy-authorization"].startswith("Basic ")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    post(server.url + "/v1")("/chat", {})
    assert server.seen[1].path == "/v1/chat"


def test_a_password_in_the_address_is_sent_unless_there_is_a_key(server):
    server.script = [Reply({})]
    address = server.url.replace("//", "//me:secret@") + "/v1/"
    post(address)("/chat", {"text": "\u00e4"})
    assert server.seen[0].headers["authorization"] == "Basic bWU6c2VjcmV0"
    assert (server.seen[0].path, server.seen[0].json) == ("/v1/chat", {"text": "\u00e4"})
    post(address, Authorization="Bearer key")("/chat", {})
    assert server.seen[1].headers["authorization"] == "Bearer key"


def test_a_connection_that_the_server_has_closed_is_made_again(server):
    server.script = [Reply({"a": 1})]
    asked = post(server.url)
    asked("/a", {})
    (kept,) = asked._idle
    kept.sock.shutdown(socket.SHUT_RDWR)
    assert asked("/a", {}) == '{"a": 1}'
    assert asked._idle != [kept]


def test_connections_stay_open_and_failures_say_what_they_are(server):
    server.script = [
        Reply({}),
        failure(429, "slow", {"retry-after": "3"}),
        Reply(b"<html>", status=502),
        Reply(b"", 308),
    ]
    asked = post(server.url)
    asked("/a", {})
    for fault, wait in (("limited", 3), ("down", None), ("rejected", None)):
        with pytest.raises(Failure) as caught:
            asked("/a", {})
        assert (caught.value.fault, caught.value.wait) == (fault, wait)
    asked.close()
    with pytest.raises(Failure, match="cannot be reached"):
        post("http://127.0.0.1:9")("/a", {})
