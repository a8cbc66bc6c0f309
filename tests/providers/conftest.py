from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clvr_jax.providers.endpoint import Endpoint
from tests.providers.server import KEY, LoopbackServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackServer]:
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = LoopbackServer()
    yield running
    running.close()


@pytest.fixture
def endpoint(server: LoopbackServer) -> Callable[..., Endpoint]:
    def make(**fields: Any) -> Endpoint:
        values = {"base_url": server.url + "/v1", "key_variable": "LOOPBACK_KEY", "backoff": 0.001, "max_retries": 2}
        return Endpoint("tiny", **{**values, **fields})

    return make
