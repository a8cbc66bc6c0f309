"""Redaction of secrets in texts that are stored or printed: logins and keys in URLs, and keys that a server repeats."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import quote, unquote, urlsplit

from clvr_jax.files.json_input import JSON

HIDDEN = "***"
"""The replacement of a secret."""

_LOGIN = re.compile(r"(?<=://)[^/?#\s@]*@")
_QUERY_VALUE = re.compile(r"(?<==)[^&#\s]+")
_MIN_REPLY_SECRET = 8
"""Minimum length of a secret that is redacted in replies; a shorter one may be an ordinary word or number."""


def redact_url(url: str) -> str:
    """Returns a URL without its login and without the values of its query, which may contain keys."""
    address, separator, query = _LOGIN.sub(f"{HIDDEN}@", url).partition("?")
    return address + separator + _QUERY_VALUE.sub(HIDDEN, query)


def redact_urls(value: JSON) -> JSON:
    """Returns JSON content with `redact_url` applied to every text that is a URL."""
    if isinstance(value, dict):
        return {key: redact_urls(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [redact_urls(each) for each in value]
    return redact_url(value) if isinstance(value, str) and re.match(r"[a-z]+://", value) else value


class Secrets:
    """The secrets of one server.

    Args:
      key: of the requests, if there is one.
      url: of the server, which may contain a login or a key.
    """

    def __init__(self, key: str | None, url: str):
        parts = urlsplit(url)
        found = [key, parts.password, *(pair.partition("=")[2] for pair in parts.query.split("&"))]
        spellings = {form for each in found if each for form in (each, unquote(each), quote(each, safe=""))}
        self._all = sorted(spellings, key=len, reverse=True)  # the longest first: one may be a part of another

    def redact(self, text: str) -> str:
        """Returns a message without the secrets."""
        return _without(text, self._all)

    def redact_reply(self, text: str) -> str:
        """Returns a server's reply without the secrets that are too long to be ordinary words."""
        return _without(text, [each for each in self._all if len(each) >= _MIN_REPLY_SECRET])


def _without(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text
