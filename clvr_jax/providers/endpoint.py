"""A connection to one OpenAI-compatible server: limits, retries, prices and errors."""

from __future__ import annotations

import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.json_input import UncheckedJSON
from clvr_jax.files.redaction import Secrets, redact_url
from clvr_jax.interfaces import Fault, ProviderError, Usage
from clvr_jax.providers.bounded import MAX_VALUES, count, read_object, return_large_blocks
from clvr_jax.providers.failures import SHOWN, Failure, NoReplyError, retry_after, status_failure

if TYPE_CHECKING:
    import openai

__all__ = ["Connection", "Endpoint", "Failure", "Prices", "count", "retry_after", "status_failure"]

T = TypeVar("T")

_MAX_IN_FLIGHT = 1000  # connections that the openai package opens at most


@dataclass(frozen=True)
class Prices:
    """Prices in dollars. input_tokens, output_tokens: of a million tokens. picture: of each returned image."""

    input_tokens: float = 0.0
    output_tokens: float = 0.0
    picture: float = 0.0

    def __post_init__(self) -> None:
        prices = (self.input_tokens, self.output_tokens, self.picture)
        if not all(math.isfinite(price) and price >= 0 for price in prices):
            raise UsageError(f"prices must be finite and at least 0, got {self}")

    def usage(self, input_tokens: int = 0, output_tokens: int = 0, images: int = 0) -> Usage:
        """Returns numbers of tokens and images with their cost."""
        dollars = (input_tokens * self.input_tokens + output_tokens * self.output_tokens) / 1e6 + images * self.picture
        return Usage(input_tokens=input_tokens, output_tokens=output_tokens, pictures=images, dollars=dollars)


@dataclass(frozen=True)
class Endpoint:
    """Address of a served model, and limits for calls to it.

    Attributes:
      model: the server's name for the model.
      base_url: up to and including the version, e.g. http://localhost:8000/v1 for vLLM,
        https://generativelanguage.googleapis.com/v1beta/openai for Gemini.
      key_variable: environment variable with the key; None for servers without keys.
      max_in_flight: maximum number of concurrent requests; further callers wait.
      timeout: maximum seconds without a byte from the server.
      max_seconds: maximum seconds for a complete response.
      max_bytes: maximum size of a complete response, decompressed.
      image_hosts: hosts besides that of base_url that images may be downloaded from although they are in the local
        network, and that URLs of images may redirect to.
      max_retries: maximum number of requests after the first, for temporary faults: no connection, timeouts, server
        errors, rate limits, empty or broken bodies.
      backoff: seconds before the first retry, doubled for each further one, with a random factor from 0.5 to 1.
      max_wait: maximum seconds before a retry; there is no retry if the server requests more (Retry-After).
      prices: of the server.
    """

    model: str
    base_url: str = "https://api.openai.com/v1"
    key_variable: str | None = "OPENAI_API_KEY"
    max_in_flight: int = 16
    timeout: float = 120.0
    max_seconds: float = 1200.0
    max_bytes: int = 64 * 2**20
    image_hosts: tuple[str, ...] = ()
    max_retries: int = 5
    backoff: float = 0.5
    max_wait: float = 60.0
    prices: Prices = Prices()

    def __post_init__(self) -> None:
        if not self.model:
            raise UsageError("endpoint: model is empty; give the server's name for the model")
        if not _is_http_url(self.base_url):
            raise UsageError(
                f"endpoint: base_url must be an http:// or https:// URL, got {redact_url(self.base_url)!r}"
            )
        if not 1 <= self.max_in_flight <= _MAX_IN_FLIGHT:
            raise UsageError(f"endpoint: max_in_flight must be in 1 .. {_MAX_IN_FLIGHT}, got {self.max_in_flight}")
        if not self.max_seconds > 0 or self.max_bytes < 1:
            raise UsageError(
                f"endpoint: max_seconds and max_bytes must be above 0, got {self.max_seconds} and {self.max_bytes}"
            )
        if not self.timeout > 0 or self.max_retries < 0 or self.backoff < 0 or self.max_wait < 0:
            raise UsageError(
                "endpoint: timeout must be above 0, and max_retries, backoff and max_wait at least 0; got "
                f"{self.timeout}, {self.max_retries}, {self.backoff} and {self.max_wait}"
            )

    @property
    def host(self) -> str:
        """Host and port, without a login in the URL."""
        return urlsplit(self.base_url).netloc.rpartition("@")[2]

    @property
    def name(self) -> str:
        """Model and host."""
        return f"{self.model} ({self.host})"


class Connection:
    """Calls one endpoint from many threads, with a limit on concurrent requests, retries, usage and clear errors.

    Raises: ClvrError when created, if the openai package or the key is missing.
    """

    def __init__(self, endpoint: Endpoint):
        try:
            import openai  # noqa: F401

            from clvr_jax.providers.http_client import BoundedClient, certificates
        except ImportError:
            raise ClvrError(
                f"{endpoint.name}: the openai package is not installed; pip install 'clvr-jax[endpoints]'"
            ) from None
        return_large_blocks()
        self.endpoint = endpoint
        self._key = _read_key(endpoint)
        self._secrets = Secrets(self._key, endpoint.base_url)
        self._new_http_client = partial(
            BoundedClient, seconds=endpoint.max_seconds, verify=certificates(), timeout=endpoint.timeout
        )
        self._turns = threading.BoundedSemaphore(endpoint.max_in_flight)
        # One client for each concurrent request, the most recently used first. A shared client searches all of its
        # connections at every request under a lock, which is slow with 64 of them.
        self._clients: list[openai.OpenAI] = []
        self._idle: list[openai.OpenAI] = []
        self._not_before = 0.0

    def call(
        self,
        send: Callable[[openai.OpenAI], str],
        read: Callable[[UncheckedJSON], tuple[T, Usage]],
        max_values: int = MAX_VALUES,
        max_bytes: int | None = None,
    ) -> tuple[T, Usage]:
        """Makes one request, with retries.

        Args:
          send: makes one request and returns the body of the response; may be called several times.
          read: a response's JSON -> the result and its usage; raises Failure for a response without a result.
          max_values: maximum number of values in a response's JSON.
          max_bytes: maximum size of a response, decompressed; at most, and by default, that of the endpoint.
        Returns: the result, and the usage of all attempts, as one call.
        Raises: ProviderError.
        """
        limit = min(max_bytes or self.endpoint.max_bytes, self.endpoint.max_bytes)
        return self._retry(lambda: self._request(send, read, max_values, limit), Usage(calls=1))

    def download(self, url: str, decode: Callable[[bytes], T], max_bytes: int, spent: Usage) -> tuple[T, Usage]:
        """Downloads and decodes the content of an http(s) URL that the server returned, with retries.

        The key is not sent, and errors do not contain the URL, which may give access to the image.

        Args:
          url: of the content.
          decode: the content -> the result; raises Failure.
          max_bytes: maximum size of the content.
          spent: usage of the call so far.
        Returns: the decoded content, and the usage of the call.
        Raises: ProviderError.
        """
        from clvr_jax.providers.download import download

        hosts = {urlsplit(self.endpoint.base_url).hostname or "", *self.endpoint.image_hosts}
        new_client = partial(self._new_http_client, max_bytes)
        return self._retry(lambda: (download(url, hosts, new_client, decode), Usage()), spent)

    def error(self, message: str, fault: Fault, usage: Usage | None = None, is_no_reply: bool = False) -> ProviderError:
        """Returns an error with a message on one line, without the key."""
        kind = NoReplyError if is_no_reply else ProviderError
        return kind(self._one_line(f"{self.endpoint.name}: {message}"), fault, usage)

    def close(self) -> None:
        """Closes the connections to the server."""
        for client in self._clients:
            client.close()

    def _new_client(self) -> openai.OpenAI:
        import openai

        endpoint = self.endpoint
        client = openai.OpenAI(
            api_key=self._key or "none",
            base_url=endpoint.base_url,
            timeout=endpoint.timeout,
            max_retries=0,
            http_client=self._new_http_client(endpoint.max_bytes),
        )
        if not (urlsplit(endpoint.base_url).hostname or "").endswith("openai.com"):
            # The package reads these from the environment; they must not be sent to other servers.
            client.organization = client.project = None
        return client

    def _retry(self, once: Callable[[], tuple[T, Usage]], spent: Usage) -> tuple[T, Usage]:
        began = time.monotonic()
        attempt = 0
        while True:
            try:
                answer, usage = once()
                return answer, spent + usage + Usage(retries=attempt, seconds=time.monotonic() - began)
            except Failure as error:
                failure = error.without_frames()
            spent += failure.usage
            wait = min(self.endpoint.backoff * 2**attempt, self.endpoint.max_wait) * random.uniform(0.5, 1)
            if failure.wait is not None:
                wait = max(wait, failure.wait)
            if not failure.can_retry or attempt == self.endpoint.max_retries or wait > self.endpoint.max_wait:
                break
            if failure.wait is not None:
                # The rate limit applies to all callers, so that all of them wait.
                self._not_before = max(self._not_before, time.monotonic() + failure.wait)
            time.sleep(wait)
            attempt += 1
        # Raised outside of the handler: a traceback would show the causes, which may contain the request with the key.
        message = self._one_line(failure.message)
        message = message if len(message) <= SHOWN else message[:SHOWN] + " ..."
        if failure.can_retry and wait > self.endpoint.max_wait:
            message += f"; it requests a wait of {wait:.0f} s, more than max_wait={self.endpoint.max_wait:g}"
        elif attempt:
            message += f" (after {attempt} {'retries' if attempt > 1 else 'retry'})"
        spent += Usage(retries=attempt, seconds=time.monotonic() - began)
        raise self.error(message, failure.fault, spent, failure.is_no_reply)

    def _request(
        self,
        send: Callable[[openai.OpenAI], str],
        read: Callable[[UncheckedJSON], tuple[T, Usage]],
        max_values: int,
        max_bytes: int,
    ) -> tuple[T, Usage]:
        with self._turn() as client:
            http_client: Any = client._client
            http_client.limit = max_bytes
            # Parsed before the client is released: until then the response counts as held in memory.
            return read(read_object(self._secrets.redact_reply(self._send(send, client)), max_values))

    def _send(self, send: Callable[[openai.OpenAI], str], client: openai.OpenAI) -> str:
        """Returns the body of a successful response. Raises: Failure."""
        import openai

        try:
            return send(client)
        except openai.APIStatusError as error:
            wait = retry_after(error.response.headers, time.time())
            raise status_failure(error.status_code, error.body, wait) from None
        except openai.APITimeoutError:
            raise Failure(f"no response within {self.endpoint.timeout:g} s", "down", can_retry=True) from None
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, Failure):
                raise error.__cause__ from None
            reason = str(error.__cause__ or error)
            raise Failure(f"cannot be reached ({reason})", "down", can_retry=True) from None
        except openai.OpenAIError as error:
            raise Failure(f"the openai package reports {error}", "rejected") from None
        except UnicodeEncodeError as error:
            raise Failure(
                f"the text is not valid Unicode ({error.reason}); remove such characters", "rejected"
            ) from None

    @contextmanager
    def _turn(self) -> Iterator[openai.OpenAI]:
        """Yields a client that no other thread uses meanwhile."""
        self._wait_for_turn()
        try:
            try:
                client = self._idle.pop()
            except IndexError:
                client = self._new_client()
                self._clients.append(client)
            try:
                yield client
            finally:
                http_client: Any = client._client
                http_client.held.release()
                if http_client.is_usable:
                    self._idle.append(client)
                else:
                    self._clients.remove(client)
        finally:
            self._turns.release()

    def _wait_for_turn(self) -> None:
        while True:
            if (wait := self._not_before - time.monotonic()) > 0:  # even sleep(0) takes time
                time.sleep(wait)
            self._turns.acquire()
            if time.monotonic() >= self._not_before:
                return
            self._turns.release()

    def _one_line(self, text: str) -> str:
        return self._secrets.redact(" ".join(text.split()))


def _is_http_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, a port that is no number
        return False


def _read_key(endpoint: Endpoint) -> str | None:
    variable = endpoint.key_variable
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ClvrError(f"{endpoint.name}: the environment variable {variable} is not set; put the server's key there")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ClvrError(
            f"{endpoint.name}: the environment variable {variable} is not a key (spaces or unprintable characters)"
        )
    return key
