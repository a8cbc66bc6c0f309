"""The HTTP client under the openai package: every response is read within bounds, redirects stay on their host."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import openai

from clvr_jax.providers.bounded import MAX_REDIRECTS, HeldBytes, read_content
from clvr_jax.providers.failures import Failure

_MAX_ERROR_BYTES = 1 << 20
"""Most bytes of the body of an error, which the openai package reads as JSON of any number of values."""


class BoundedClient(openai.DefaultHttpxClient):
    """A client for one request at a time that reads whole responses.

    Args:
      limit: most bytes of a response after decompression.
      seconds: for a whole request, from its first byte to the last one of the response.
      settings: of `httpx2.Client`.

    Attributes:
      is_usable: whether another request may be sent; not after one that ran out of time, for it is closed then.
      held: the bytes of the last response, which count until they are released.
      check_redirect: raises Failure for a redirect that must not be followed, given the addresses before and after.
      check_peer: raises Failure for a response that must not be read, given its address and the peer's IP address.
    """

    check_redirect: Callable[[httpx2.URL, httpx2.URL], None]
    check_peer: Callable[[httpx2.URL, str], None]

    def __init__(self, limit: int, seconds: float, **settings: Any):
        super().__init__(follow_redirects=False, **settings)
        self.headers["accept-encoding"] = "gzip, deflate"  # what `read_content` decompresses within bounds
        self.is_usable = True
        self.held = HeldBytes()
        self.check_redirect = same_host
        self.check_peer = any_peer
        self._limit, self._seconds = limit, seconds

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Sends a request and reads its response.

        Raises: Failure for a response that breaks a bound; httpx2's own errors.
        """
        self.held.release()
        deadline = time.monotonic() + self._seconds
        # The time between two bytes is bounded by httpx2. A server that sends one now and then, in the headers too, is
        # ended from outside: its next byte meets a closed connection.
        timer = threading.Timer(self._seconds, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            return self._send(request, deadline, options)
        except Exception:
            if self.is_usable:
                raise
            raise Failure(f"no complete response within {self._seconds:g} s", "down", can_retry=True) from None
        finally:
            timer.cancel()
            timer.join()

    def _give_up(self) -> None:
        self.is_usable = False
        self.close()

    def _send(self, request: httpx2.Request, deadline: float, options: dict[str, Any]) -> httpx2.Response:
        options |= {"stream": True, "follow_redirects": False}
        for _ in range(MAX_REDIRECTS + 1):
            response = super().send(request, **options)
            try:
                if stream := response.extensions.get("network_stream"):
                    peer = stream.get_extra_info("server_addr")
                    self.check_peer(request.url, str(peer[0]) if peer else "")
                target = response.next_request
                if target is None:
                    encoding = response.headers.get("content-encoding", "")
                    limit = min(self._limit, _MAX_ERROR_BYTES) if response.is_error else self._limit
                    content = read_content(response.iter_raw(), encoding, limit, deadline, self._seconds, self.held)
                    return _whole(response, content, request)
                self.check_redirect(request.url, target.url)
                request = target
            finally:
                response.close()
        raise Failure(f"more than {MAX_REDIRECTS} redirects", "down")


def same_host(origin: httpx2.URL, target: httpx2.URL) -> None:
    """Raises Failure for a redirect to another host, or from https to http: prompts go where the user sends them."""
    if target.host != origin.host:
        raise Failure(f"redirects to another host, {target.host}; if it is right, give its address as base_url", "down")
    if origin.scheme == "https" != target.scheme:
        raise Failure("redirects from https to http, which is not followed", "down")


def any_peer(url: httpx2.URL, address: str) -> None:
    """Accepts every response."""


class _WholeResponse(httpx2.Response):
    """A response whose text is decoded without a second copy of it."""

    @property
    def text(self) -> str:
        """The content as UTF-8."""
        return self.content.decode("utf-8", "replace")


def _whole(response: httpx2.Response, content: bytes, request: httpx2.Request) -> httpx2.Response:
    """The response with its content, which is decompressed already; JSON is UTF-8, whatever the headers say."""
    hidden = ("content-encoding", "content-length", "transfer-encoding")
    headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in hidden]
    headers = [(name, value.partition(";")[0] if name == "content-type" else value) for name, value in headers]
    return _WholeResponse(
        response.status_code, headers=headers, content=content, request=request, extensions=response.extensions
    )
