"""One OpenAI-compatible server: how hard it may be pressed, what it costs, and what its failures mean."""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.reasoning.tools import Fault, ProviderError, Usage

if TYPE_CHECKING:
    import openai

T = TypeVar("T")

MAX_DOWNLOAD_BYTES = 64 * 2**20
_MAX_IN_FLIGHT = 1000  # connections that the openai package opens at most
_SHOWN = 300  # characters of a failure's words in an error
_KEPT = 2000  # and as many before the key is taken out: cut first, a piece of it could stay
_POLICY = ("content_filter", "content_policy", "moderation", "policyviolation", "sensitivecontent", "safety")
_OUT_OF_MONEY = ("insufficient_quota", "billing")


@dataclass(frozen=True)
class Prices:
    """A price list in dollars. input_tokens, output_tokens: of a million. picture: of each picture returned."""

    input_tokens: float = 0.0
    output_tokens: float = 0.0
    picture: float = 0.0

    def __post_init__(self) -> None:
        if not all(
            math.isfinite(price) and price >= 0 for price in (self.input_tokens, self.output_tokens, self.picture)
        ):
            raise UsageError(f"prices must be finite and at least 0, got {self}")

    def usage(self, input_tokens: int = 0, output_tokens: int = 0, pictures: int = 0) -> Usage:
        """Tokens and pictures with what they cost."""
        dollars = (
            input_tokens * self.input_tokens + output_tokens * self.output_tokens
        ) / 1e6 + pictures * self.picture
        return Usage(input_tokens=input_tokens, output_tokens=output_tokens, pictures=pictures, dollars=dollars)


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served, and how it may be called.

    Attributes:
      model: as the server names it.
      base_url: up to and including the version, e.g. http://localhost:8000/v1 for vLLM,
        https://generativelanguage.googleapis.com/v1beta/openai for Gemini.
      key_variable: environment variable that holds the key; None for servers without keys.
      max_in_flight: requests at once; further callers wait for their turn.
      timeout: seconds without a byte from the server.
      max_retries: requests after the first, for faults that may pass: no connection, timeouts, server errors, rate
        limits, empty or broken bodies.
      backoff: seconds before the first retry, doubled for each further one and cut at random to a half at most.
      max_wait: seconds before any retry at most. A server that asks for more patience (Retry-After) is not retried.
      prices: what the server charges.
    """

    model: str
    base_url: str = "https://api.openai.com/v1"
    key_variable: str | None = "OPENAI_API_KEY"
    max_in_flight: int = 16
    timeout: float = 120.0
    max_retries: int = 5
    backoff: float = 0.5
    max_wait: float = 60.0
    prices: Prices = Prices()

    def __post_init__(self) -> None:
        if not self.model:
            raise UsageError("endpoint: model is empty; give the name that the server knows the model by")
        if not _is_address(self.base_url):
            raise UsageError(f"endpoint: base_url must be an http:// or https:// address, got {self.base_url!r}")
        if not 1 <= self.max_in_flight <= _MAX_IN_FLIGHT:
            raise UsageError(f"endpoint: max_in_flight must be in 1 .. {_MAX_IN_FLIGHT}, got {self.max_in_flight}")
        if self.timeout <= 0 or self.max_retries < 0 or self.backoff < 0 or self.max_wait < 0:
            raise UsageError(
                "endpoint: timeout must be above 0, and max_retries, backoff and max_wait at least 0; got "
                f"{self.timeout}, {self.max_retries}, {self.backoff} and {self.max_wait}"
            )

    @property
    def host(self) -> str:
        """Server and port, without a password that may stand in the address."""
        return urlsplit(self.base_url).netloc.rpartition("@")[2]

    @property
    def name(self) -> str:
        """The model and who serves it."""
        return f"{self.model} ({self.host})"


class Failure(Exception):  # noqa: N818 - becomes a ProviderError when no retry is left
    """One request that came to nothing.

    can_retry: the same request may succeed later. wait: seconds the server asks for. usage: what it cost.
    """

    def __init__(
        self,
        message: str,
        fault: Fault,
        can_retry: bool = False,
        wait: float | None = None,
        usage: Usage | None = None,
    ):
        super().__init__(message)
        self.message, self.fault, self.can_retry, self.wait = message, fault, can_retry, wait
        self.usage = usage or Usage()


class Connection:
    """Calls one endpoint from many threads: takes turns, retries, counts, and says what went wrong.

    Raises: ClvrError when made, if the openai package or the key is missing.
    """

    def __init__(self, endpoint: Endpoint):
        try:
            import httpx2
            import openai
        except ImportError:
            raise ClvrError(
                f"{endpoint.name}: the openai package is not installed; pip install 'clvr-jax[endpoints]'"
            ) from None
        self.endpoint = endpoint
        self._key = _read_key(endpoint)
        # To read all certificates takes a while, so it is done once.
        self._new_http_client = partial(openai.DefaultHttpxClient, verify=httpx2.create_ssl_context())
        self._turns = threading.BoundedSemaphore(endpoint.max_in_flight)
        # One client for each request in flight, the last used first. One that is shared looks through all of its
        # connections at every request, under a lock: with 64 of them that is felt.
        self._clients: list[openai.OpenAI] = []
        self._idle: list[openai.OpenAI] = []
        self._not_before = 0.0

    def call(
        self, send: Callable[[openai.OpenAI], str], read: Callable[[dict[str, Any]], tuple[T, Usage]]
    ) -> tuple[T, Usage]:
        """One answer.

        Args:
          send: makes one request and returns the body of the response; may be called several times.
          read: a response's JSON -> the answer and its price; raises Failure for what is no answer.
        Returns: the answer, and the price of everything that was tried, as one call.
        Raises: ProviderError.
        """
        return self._retry(lambda: self._request(send, read), Usage(calls=1))

    def download(self, url: str, spent: Usage) -> tuple[bytes, Usage]:
        """What is found at an http(s) or data URL that the server gave. spent: what the call has cost before.

        The key is not sent, nor is the URL shown: it may be a password to what it points at.
        """
        return self._retry(lambda: (_download(url, self.endpoint.timeout), Usage()), spent)

    def error(self, message: str, fault: Fault, usage: Usage | None = None) -> ProviderError:
        """The error that says so, on one line and without the key."""
        return ProviderError(self._one_line(f"{self.endpoint.name}: {message}"), fault, usage)

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
            http_client=self._new_http_client(),
        )
        if not (urlsplit(endpoint.base_url).hostname or "").endswith("openai.com"):
            # The package takes these from the environment; they are nobody else's business.
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
                failure = error
            spent += failure.usage
            wait = min(self.endpoint.backoff * 2**attempt, self.endpoint.max_wait) * random.uniform(0.5, 1)
            if failure.wait is not None:
                wait = max(wait, failure.wait)
            if not failure.can_retry or attempt == self.endpoint.max_retries or wait > self.endpoint.max_wait:
                break
            if failure.wait is not None:
                # One caller's rate limit is everyone's: the others need not find out one by one.
                self._not_before = max(self._not_before, time.monotonic() + failure.wait)
            time.sleep(wait)
            attempt += 1
        # Raised here, not above: the causes, which a traceback would show, may hold the request and with it the key.
        message = self._one_line(failure.message)
        message = message if len(message) <= _SHOWN else message[:_SHOWN] + " ..."
        if failure.can_retry and wait > self.endpoint.max_wait:
            message += f"; it asks to wait {wait:.0f} s, more than max_wait={self.endpoint.max_wait:g}"
        elif attempt:
            message += f" (after {attempt} {'retries' if attempt > 1 else 'retry'})"
        raise self.error(message, failure.fault, spent + Usage(retries=attempt, seconds=time.monotonic() - began))

    def _request(
        self, send: Callable[[openai.OpenAI], str], read: Callable[[dict[str, Any]], tuple[T, Usage]]
    ) -> tuple[T, Usage]:
        import openai

        try:
            with self._turn() as client:
                text = send(client)
        except openai.APIStatusError as error:
            wait = retry_after(error.response.headers, time.time())
            raise status_failure(error.status_code, error.body, wait) from None
        except openai.APITimeoutError:
            raise Failure(f"no answer within {self.endpoint.timeout:g} s", "down", can_retry=True) from None
        except openai.APIConnectionError as error:
            reason = str(error.__cause__ or error)
            raise Failure(f"cannot be reached ({reason})", "down", can_retry=True) from None
        except openai.OpenAIError as error:
            raise Failure(f"the openai package says {error}", "rejected") from None
        except UnicodeEncodeError as error:
            raise Failure(f"the text is no valid Unicode ({error.reason}); clean it", "rejected") from None
        return read(_body(text))

    @contextmanager
    def _turn(self) -> Iterator[openai.OpenAI]:
        """A client that nobody else uses meanwhile."""
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
                self._idle.append(client)
        finally:
            self._turns.release()

    def _wait_for_turn(self) -> None:
        while True:
            if (wait := self._not_before - time.monotonic()) > 0:  # even to sleep for no time costs
                time.sleep(wait)
            self._turns.acquire()
            if time.monotonic() >= self._not_before:
                return
            self._turns.release()

    def _one_line(self, text: str) -> str:
        text = " ".join(text.split())
        return text.replace(self._key, "***") if self._key else text


def count(value: Any) -> int:
    """A number of tokens as servers report it; 0 for what is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a response asks to wait, in any of the three ways that are in use; None if it does not.

    Args:
      headers: of the response.
      now: seconds since 1970, for answers that name a date.
    Source: RFC 9110, 10.2.3; retry-after-ms is OpenAI's.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = lower.get(name)
        if text is None:
            continue
        try:
            seconds = float(text) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - now
            except ValueError:
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def status_failure(status: int, body: object, wait: float | None = None) -> Failure:
    """What an HTTP status and an error's body mean.

    Args:
      status: 400 .. 599.
      body: the error object, or the body as text.
      wait: seconds that the server asks for.
    """
    if isinstance(body, list) and body:  # Gemini's
        body = body[0].get("error", body[0]) if isinstance(body[0], dict) else body[0]
    details: Mapping[str, Any] = body if isinstance(body, dict) else {}
    inner = details.get("innererror")
    code = " ".join(str(part or "") for part in (details.get("code"), details.get("type"), inner)).lower()
    message = f"HTTP {status}: {str(details.get('message') or body or 'no reason given')[:_KEPT]}"
    if status < 500 and any(mark in code for mark in _POLICY):
        return Failure(message, "refused")
    if status == 429:
        return Failure(message, "limited", can_retry=not any(mark in code for mark in _OUT_OF_MONEY), wait=wait)
    if status >= 500 or status in (408, 409, 425):
        return Failure(message, "down", can_retry=True, wait=wait)
    return Failure(message, "rejected")


def _body(text: str) -> dict[str, Any]:
    """A successful response's JSON object; Failure for anything else, and for errors under a status of 200."""
    if not text.strip():
        raise Failure("the body is empty", "malformed", can_retry=True)
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise Failure(f"the body is no JSON ({text[:_KEPT]!r})", "malformed", can_retry=True) from None
    if not isinstance(body, dict):
        raise Failure(f"the body is no JSON object ({text[:_KEPT]!r})", "malformed", can_retry=True)
    error = body.get("error")
    if error and not body.get("choices") and not body.get("data"):
        code = error.get("code") if isinstance(error, dict) else None
        raise status_failure(code if isinstance(code, int) and 400 <= code < 600 else 500, error)
    return body


def _is_address(url: str) -> bool:
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
        raise ClvrError(f"{endpoint.name}: the environment variable {variable} holds no key (spaces or odd characters)")
    return key


def _download(url: str, timeout: float) -> bytes:
    try:
        host = urlsplit(url).hostname or "a data URL"
    except ValueError:
        raise Failure("the picture's address makes no sense", "malformed") from None
    if not url.startswith(("http://", "https://", "data:")):  # urllib would open files of this machine too
        raise Failure("the picture's address is neither http(s) nor data", "malformed")
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            content: bytes = response.read(MAX_DOWNLOAD_BYTES + 1)
    except urllib.error.HTTPError as error:
        wait = retry_after(dict(error.headers.items()), time.time())
        message = f"the picture at {host} cannot be fetched (HTTP {error.code})"
        if error.code == 429 or error.code >= 500:
            raise Failure(message, "down", can_retry=True, wait=wait) from None
        raise Failure(message, "malformed") from None
    except (OSError, http.client.HTTPException) as error:
        raise Failure(f"the picture at {host} cannot be fetched ({error})", "down", can_retry=True) from None
    except ValueError:
        raise Failure("the picture's address makes no sense", "malformed") from None
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise Failure(f"the picture at {host} has more than {MAX_DOWNLOAD_BYTES} bytes", "malformed")
    return content
