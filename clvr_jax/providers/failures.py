"""Failures of single requests: their kind, the meaning of a server's error, and the requested wait before a retry."""

from __future__ import annotations

import email.utils
import math
import re
from collections.abc import Mapping
from typing import Self

from clvr_jax.files.json_input import UncheckedJSON
from clvr_jax.interfaces import Fault, ProviderError, Usage
from clvr_jax.interfaces.answers import AnswerError

SHOWN = 300
"""Maximum characters of a failure's message in an error."""
KEPT = 2000
"""Characters that are kept before secrets are redacted; truncated to fewer, a part of a secret could remain."""
MAX_SECONDS = 1e9
"""Longest wait that a server can request; longer ones are read as this."""

_POLICY = ("content_filter", "content_policy", "moderation", "policyviolation", "sensitivecontent", "safety")
_OUT_OF_MONEY = ("insufficient_quota", "billing")
_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)s")


class Failure(Exception):  # noqa: N818 - becomes a ProviderError when no retry is left
    """One failed request.

    Attributes:
      message: what happened.
      fault: kind of failure, see `ProviderError`.
      can_retry: whether the same request may succeed later.
      wait: seconds that the server requests before a retry; None if it does not.
      usage: cost of the request.
      is_no_reply: whether the model responded, but without a reply.
    """

    def __init__(
        self,
        message: str,
        fault: Fault,
        can_retry: bool = False,
        wait: float | None = None,
        usage: Usage | None = None,
        is_no_reply: bool = False,
    ):
        super().__init__(message)
        self.message, self.fault, self.can_retry, self.wait = message, fault, can_retry, wait
        self.usage, self.is_no_reply = usage or Usage(), is_no_reply

    def without_frames(self) -> Self:
        """Returns itself without its traceback and causes, whose frames would hold the body of a response in memory."""
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self


class NoReplyError(ProviderError, AnswerError):
    """A response without a reply: empty, truncated at max_tokens, or an unfinished thought.

    It is an `AnswerError`, because the model may be asked again, and a `ProviderError` with fault "down", because it
    means neither that an image is rejected nor that a reply cannot be parsed.
    """


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Returns the seconds that a response's headers request before a retry, in any of three forms; None without them.

    Args:
      headers: of the response.
      now: seconds since 1970, for headers that name a date.
    Source: RFC 9110, 10.2.3; retry-after-ms is OpenAI's.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = lower.get(name, "").strip()
        try:
            seconds = float(text) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - now
            except (ValueError, TypeError, OverflowError, OSError):  # no date, or one far beyond the calendar
                continue
        if math.isfinite(seconds):
            return min(max(0.0, seconds), MAX_SECONDS)
    return None


def retry_delay(details: object) -> float | None:
    """Returns the seconds that the details of a Google error request before a retry; None without them.

    Source: google.rpc.RetryInfo in its JSON form, a duration such as "34.07s".
    """
    for entry in details if isinstance(details, list) else []:
        if not isinstance(entry, dict) or not str(entry.get("@type", "")).endswith("google.rpc.RetryInfo"):
            continue
        found = _DURATION.fullmatch(str(entry.get("retryDelay", ""))[:40])
        if found:
            return min(float(found[1]), MAX_SECONDS)
    return None


def status_failure(status: int, body: object, wait: float | None = None) -> Failure:
    """Returns the failure that an HTTP status and the body of an error mean.

    Args:
      status: 400 .. 599.
      body: the error object, or the body as text.
      wait: seconds that the headers request before a retry; the longest of this and the body's is used.
    """
    if isinstance(body, list) and body:  # Gemini's
        body = body[0].get("error", body[0]) if isinstance(body[0], dict) else body[0]
    details: UncheckedJSON = body if isinstance(body, dict) else {}
    inner = details.get("innererror")
    code = " ".join(str(part or "")[:KEPT] for part in (details.get("code"), details.get("type"), inner)).lower()
    message = f"HTTP {status}: {str(details.get('message') or body or 'no reason given')[:KEPT]}"
    field = details.get("param")
    if isinstance(field, str) and field and field not in message:
        message += f" (field {field[:40]})"
    waits = [each for each in (wait, retry_delay(details.get("details"))) if each is not None]
    wait = max(waits, default=None)
    if status < 500 and any(mark in code for mark in _POLICY):
        return Failure(message, "refused")
    if status == 402 or (status in (403, 429) and any(mark in code for mark in _OUT_OF_MONEY)):
        return Failure(message, "limited")
    if status == 429:
        return Failure(message, "limited", can_retry=True, wait=wait)
    if status >= 500 or status in (408, 409, 425):
        return Failure(message, "down", can_retry=True, wait=wait)
    return Failure(message, "rejected")
