"""The HTTP client of the openai package, with limits on every response, and redirects to the same host only."""

from __future__ import annotations

import functools
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import openai

from clvr_jax.providers.bounded import MAX_REDIRECTS, HeldBytes, read_content
from clvr_jax.providers.failures import Failure

_MAX_ERROR_BYTES = 1 << 20
"""Maximum bytes of an error's body, which the openai package parses as JSON with any number of values."""


class BoundedClient(openai.DefaultHttpxClient):
    """A client for one request at a time that reads complete responses.

    Args:
      limit: maximum number of bytes of a response after decompression; may be changed between requests.
      seconds: time limit of a request, from its first byte to the last byte of the response.
      settings: of `httpx2.Client`.

    Attributes:
      is_usable: whether another request may be sent; a client that timed out is closed.
      held: accounts for the bytes of the last response until they are released.
      check_redirect: raises Failure for a redirect that must not be followed, given the addresses before and after.
      check_peer: raises Failure for a response that must not be read, given its address and the peer's IP address.
    """

    check_redirect: Callable[[httpx2.URL, httpx2.URL], None]
    check_peer: Callable[[httpx2.URL, str], None]

    def __init__(self, limit: int, seconds: float, **settings: Any):
        super().__init__(follow_redirects=False, **settings)
        self.headers["accept-encoding"] = "gzip, deflate"  # the encodings that `read_content` decompresses
        self.is_usable = True
        self.held = HeldBytes()
        self.check_redirect = same_host
        self.check_peer = any_peer
        self.limit, self._seconds = limit, seconds

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Sends a request and reads its response.

        Raises: Failure for a response that exceeds a limit; httpx2's own errors.
        """
        self.held.release()
        deadline = time.monotonic() + self._seconds
        # httpx2 limits only the time between two bytes. The timer closes the connection to a server that sends single
        # bytes, in the headers or in the body, for too long.
        timer = threading.Timer(self._seconds, self._time_out)
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

    def _time_out(self) -> None:
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
                    limit = min(self.limit, _MAX_ERROR_BYTES) if response.is_error else self.limit
                    content = read_content(response.iter_raw(), encoding, limit, deadline, self._seconds, self.held)
                    return _with_content(response, content, request)
                self.check_redirect(request.url, target.url)
                request = target
            finally:
                response.close()
        raise Failure(f"more than {MAX_REDIRECTS} redirects", "down")


@functools.cache
def certificates() -> ssl.SSLContext:
    """Returns the certificates that all clients of the process trust; loading them takes 30 ms."""
    return httpx2.create_ssl_context()


def same_host(origin: httpx2.URL, target: httpx2.URL) -> None:
    """Raises Failure for a redirect to another host or from https to http, where prompts must not be sent."""
    if target.host != origin.host:
        raise Failure(f"redirects to another host, {target.host}; if it is right, give its address as base_url", "down")
    if origin.scheme == "https" != target.scheme:
        raise Failure("redirects from https to http, which is not followed", "down")


def any_peer(url: httpx2.URL, address: str) -> None:
    """Accepts every response."""


class _CompleteResponse(httpx2.Response):
    """A response whose text is decoded without a second copy."""

    @property
    def text(self) -> str:
        """The content as UTF-8."""
        return self.content.decode("utf-8", "replace")


def _with_content(response: httpx2.Response, content: bytes, request: httpx2.Request) -> httpx2.Response:
    """Returns the response with its decompressed content; JSON is read as UTF-8 whatever its Content-Type."""
    hidden = ("content-encoding", "content-length", "transfer-encoding")
    headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in hidden]
    headers = [(name, value.partition(";")[0] if name == "content-type" else value) for name, value in headers]
    return _CompleteResponse(
        response.status_code, headers=headers, content=content, request=request, extensions=response.extensions
    )
