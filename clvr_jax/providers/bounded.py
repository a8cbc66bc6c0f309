"""Responses of servers, read within bounds: bytes, seconds, numbers, and where a redirect may lead."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from clvr_jax.providers.failures import KEPT, Failure, status_failure

MAX_COUNT = 10**12
"""Largest number of tokens that is believed."""
MAX_REDIRECTS = 5

_PIECE = 1 << 16
_FREE_EXPANSION, _MOST_EXPANSION = 4 << 20, 100
_MOST_DIGITS = 25


def count(value: Any) -> int:
    """Returns a number of tokens as servers report it; 0 for anything that is no such number."""
    return value if type(value) is int and 0 < value <= MAX_COUNT else 0


def read_object(text: str) -> dict[str, Any]:
    """Reads the JSON object of a successful response; a byte-order mark before it is skipped.

    Integers of more digits than any field has are read as None.
    Raises: Failure "down" for anything else, for it is no reply; what an error under a status of 200 says.
    """
    text = text.removeprefix("\ufeff").strip()
    if not text:
        raise Failure("the body is empty", "down", can_retry=True)
    try:
        body = json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError):
        raise Failure(f"the body is no JSON ({text[:KEPT]!r})", "down", can_retry=True) from None
    if not isinstance(body, dict):
        raise Failure(f"the body is no JSON object ({text[:KEPT]!r})", "down", can_retry=True)
    error = body.get("error")
    if error and not body.get("choices") and not body.get("data"):
        code = error.get("code") if isinstance(error, dict) else None
        raise status_failure(code if isinstance(code, int) and 400 <= code < 600 else 500, error)
    return body


def read_content(chunks: Iterable[bytes], encoding: str, limit: int, deadline: float, seconds: float) -> bytes:
    """Reads the content of a response, decompressed.

    Args:
      chunks: of the response as it is sent.
      encoding: its Content-Encoding; "" for none.
      limit: most bytes after decompression.
      deadline: of `time.monotonic()`; `seconds` is what it is called in the error.
    Raises: Failure "down".
    """
    found = bytearray()
    for piece in _decoded(chunks, encoding.strip().lower()):
        found += piece
        if len(found) > limit:
            raise Failure(f"the response has more than {limit:,} bytes", "down")
        if time.monotonic() > deadline:
            raise Failure(f"no complete response within {seconds:g} s", "down", can_retry=True)
    return bytes(found)


def _decoded(chunks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """Yields the content in pieces of bounded size, however far it expands."""
    if encoding in ("", "identity"):
        yield from chunks
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise Failure(f"the response is compressed as {encoding[:40]!r}, which was not asked for", "down")
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, by their first bytes
    received = expanded = 0
    try:
        for chunk in chunks:
            received += len(chunk)
            while not decoder.eof:
                piece = decoder.decompress(chunk, _PIECE)
                chunk = decoder.unconsumed_tail
                expanded += len(piece)
                # Before the limit on bytes: with many requests in flight each would fill it.
                if expanded > max(_FREE_EXPANSION, _MOST_EXPANSION * received):
                    raise Failure(f"the response expands more than {_MOST_EXPANSION} times when decompressed", "down")
                yield piece
                if not chunk and len(piece) < _PIECE:  # a full piece may have left output behind
                    break
    except zlib.error:
        raise Failure("the response is compressed in a way that cannot be read", "down", can_retry=True) from None
    if not decoder.eof:
        raise Failure("the compressed response ends too early", "down", can_retry=True)


def _integer(digits: str) -> int | None:
    return int(digits) if len(digits) <= _MOST_DIGITS else None
