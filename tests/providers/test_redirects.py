"""Where a response leads: redirects, and addresses in the own network."""

import numpy as np
import pytest

from clvr_jax.providers.download import _is_public
from clvr_jax.providers.openai_images import OpenAIImageModel
from tests.providers.asking import IMAGE, QUESTION, TASK, ask, error_of
from tests.providers.server import LoopbackServer, Reply, completion, pictures, png


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
