"""Responses of servers, read within bounds: bytes, seconds, numbers, and where a redirect may lead."""

from __future__ import annotations

import io
import json
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from clvr_jax.providers.failures import KEPT, Failure, status_failure

MAX_COUNT = 10**12
"""Largest number of tokens that is believed."""
MAX_REDIRECTS = 5
MAX_VALUES = 100_000
"""Most values in the JSON of a response, unless its request asks for more: each takes up to 100 bytes of memory."""

_SHARED_BYTES = 32 << 20
_PIECE = 1 << 16
_FREE_EXPANSION, _MOST_EXPANSION = 4 << 20, 100
_MOST_DIGITS = 25


def count(value: Any) -> int:
    """Returns a number of tokens as servers report it; 0 for anything that is no such number."""
    return value if type(value) is int and 0 < value <= MAX_COUNT else 0


class SharedBytes:
    """Bytes that all responses which are being read may hold together.

    A response that finds none left waits until it is the only one of its kind, and then takes what it needs: large
    responses are read one after the other, and the memory is bounded by `total` and one response.

    Args:
      total: number of bytes.
    """

    def __init__(self, total: int):
        self._free = total
        self._lock = threading.Lock()
        self._beyond = threading.Lock()

    def take(self, count: int) -> bool:
        """Takes bytes if there are as many; returns whether there were."""
        with self._lock:
            if count > self._free:
                return False
            self._free -= count
            return True

    def give_back(self, count: int) -> None:
        """Gives bytes back."""
        with self._lock:
            self._free += count

    def wait_to_go_beyond(self, seconds: float) -> bool:
        """Waits until no other response takes more than there is; returns whether that came about in time."""
        return self._beyond.acquire(timeout=max(0.0, seconds))

    def end_beyond(self) -> None:
        """Lets the next response take more than there is."""
        self._beyond.release()


SHARED_BYTES = SharedBytes(_SHARED_BYTES)
"""Of all connections of this process."""


class HeldBytes:
    """The bytes that one response holds until it has become an answer.

    Args:
      shared: what they are taken from.
    """

    def __init__(self, shared: SharedBytes = SHARED_BYTES):
        self._shared = shared
        self._count = 0
        self._is_beyond = False

    def add(self, count: int, deadline: float) -> None:
        """Takes bytes. Raises: Failure "down" if that is not possible until the deadline of `time.monotonic()`."""
        if self._is_beyond:
            return
        if self._shared.take(count):
            self._count += count
            return
        if not self._shared.wait_to_go_beyond(deadline - time.monotonic()):
            raise Failure("other large responses were read until its time was over", "down", can_retry=True)
        self._is_beyond = True

    def release(self) -> None:
        """Gives all bytes back."""
        self._shared.give_back(self._count)
        self._count = 0
        if self._is_beyond:
            self._is_beyond = False
            self._shared.end_beyond()


def read_object(text: str, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """Reads the JSON object of a successful response; a byte-order mark before it is skipped.

    Integers of more digits than any field has are read as None.

    Args:
      text: the body.
      max_values: most values in it.
    Raises: Failure "down" for anything else, for it is no reply; what an error under a status of 200 says.
    """
    text = text.removeprefix("\ufeff").strip()
    if not text:
        raise Failure("the body is empty", "down", can_retry=True)
    # Commas and brackets in texts count as well: no reply has so many of them.
    if len(text) > max_values and text.count(",") + text.count("[") + text.count("{") > max_values:
        raise Failure(f"the body has more than {max_values:,} values", "down")
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


def read_content(
    chunks: Iterable[bytes], encoding: str, limit: int, deadline: float, seconds: float, held: HeldBytes | None = None
) -> bytes:
    """Reads the content of a response, decompressed.

    Args:
      chunks: of the response as it is sent.
      encoding: its Content-Encoding; "" for none.
      limit: most bytes after decompression.
      deadline: of `time.monotonic()`; `seconds` is what it is called in the error.
      held: counts the bytes that are kept.
    Raises: Failure "down".
    """
    found = io.BytesIO()  # its content becomes bytes without a copy
    for piece in _decoded(chunks, encoding.strip().lower()):
        if found.tell() + len(piece) > limit:
            raise Failure(f"the response has more than {limit:,} bytes", "down")
        if held is not None:
            held.add(len(piece), deadline)
        found.write(piece)
        if time.monotonic() > deadline:
            raise Failure(f"no complete response within {seconds:g} s", "down", can_retry=True)
    return found.getvalue()


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
