"""Secrets in texts that are written or shown: passwords and keys in addresses, and keys that a server repeats."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, unquote, urlsplit

HIDDEN = "***"
"""What takes the place of a secret."""

_LOGIN = re.compile(r"(?<=://)[^/?#\s@]*@")
_QUERY_VALUE = re.compile(r"(?<==)[^&#\s]+")
_SHORTEST_IN_TEXT = 8
"""A shorter secret is a word or a number that any reply may hold."""


def redact_url(url: str) -> str:
    """Returns an address without the login in it and without the values of its query, where servers take keys."""
    address, mark, query = _LOGIN.sub(f"{HIDDEN}@", url).partition("?")
    return address + mark + _QUERY_VALUE.sub(HIDDEN, query)


def redact_urls(value: Any) -> Any:
    """Returns JSON content in which every text that is an address went through `redact_url`."""
    if isinstance(value, dict):
        return {key: redact_urls(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [redact_urls(each) for each in value]
    return redact_url(value) if isinstance(value, str) and re.match(r"[a-z]+://", value) else value


class Secrets:
    """The secrets of one server.

    Args:
      key: that requests carry, if there is one.
      url: address of the server, which may hold a login or a key.
    """

    def __init__(self, key: str | None, url: str):
        parts = urlsplit(url)
        found = [key, parts.password, *(pair.partition("=")[2] for pair in parts.query.split("&"))]
        spellings = {form for each in found if each for form in (each, unquote(each), quote(each, safe=""))}
        self._all = sorted(spellings, key=len, reverse=True)  # one may be a part of another

    def redact(self, text: str) -> str:
        """Returns a message without the secrets."""
        return _without(text, self._all)

    def redact_reply(self, text: str) -> str:
        """Returns a server's reply without the secrets that are long enough to be no ordinary words."""
        return _without(text, [each for each in self._all if len(each) >= _SHORTEST_IN_TEXT])


def _without(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text
