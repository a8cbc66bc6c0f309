"""Reading of server responses within limits of bytes, seconds and number of values."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import json
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from clvr_jax.providers.failures import KEPT, Failure, status_failure

MAX_COUNT = 10**12
"""Largest number of tokens that is accepted from a server."""
MAX_REDIRECTS = 5
MAX_VALUES = 100_000
"""Maximum number of values in a response's JSON, unless the request needs more; each takes up to 100 bytes."""

_SHARED_BYTES = 32 << 20
_M_MMAP_THRESHOLD = -3  # of malloc.h
_PIECE = 1 << 16
_FREE_EXPANSION, _MOST_EXPANSION = 4 << 20, 100
_MOST_DIGITS = 25


def count(value: object) -> int:
    """Returns a number of tokens that a server reports; 0 for anything that is not a plausible number."""
    return value if type(value) is int and 0 < value <= MAX_COUNT else 0


@functools.cache
def return_large_blocks() -> None:
    """Makes the C library return freed blocks of 1 MiB and more to the system at once, for all of this process.

    glibc would keep up to 64 MiB of freed memory for each thread that has read a large response. Other C libraries have
    no such setting and need none.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


class SharedBytes:
    """A budget of memory for all responses that are read at the same time.

    A response that exceeds the budget waits until no other one does, and then takes what it needs: large responses are
    read one after the other, and memory is bounded by `total` plus one response.

    Args:
      total: budget in bytes.
    """

    def __init__(self, total: int):
        self._free = total
        self._lock = threading.Lock()
        self._over_budget = threading.Lock()

    def take(self, count: int) -> bool:
        """Takes bytes if enough are free; returns whether they were taken."""
        with self._lock:
            if count > self._free:
                return False
            self._free -= count
            return True

    def give_back(self, count: int) -> None:
        """Returns bytes to the budget."""
        with self._lock:
            self._free += count

    def acquire_over_budget(self, seconds: float) -> bool:
        """Waits until no other response is over budget; returns whether this happened within `seconds`."""
        return self._over_budget.acquire(timeout=max(0.0, seconds))

    def release_over_budget(self) -> None:
        """Allows the next response to be over budget."""
        self._over_budget.release()


SHARED_BYTES = SharedBytes(_SHARED_BYTES)
"""The budget of all connections of this process."""


class HeldBytes:
    """The bytes that one response holds until it is parsed.

    Args:
      shared: the budget that they are taken from.
    """

    def __init__(self, shared: SharedBytes = SHARED_BYTES):
        self._shared = shared
        self._count = 0
        self._is_over_budget = False

    def add(self, count: int, deadline: float) -> None:
        """Takes bytes. Raises: Failure "down" if they are not free before `deadline`, a time of `time.monotonic()`."""
        if self._is_over_budget:
            return
        if self._shared.take(count):
            self._count += count
            return
        if not self._shared.acquire_over_budget(deadline - time.monotonic()):
            raise Failure("timed out while other large responses were read", "down", can_retry=True)
        self._is_over_budget = True

    def release(self) -> None:
        """Returns all bytes."""
        self._shared.give_back(self._count)
        self._count = 0
        if self._is_over_budget:
            self._is_over_budget = False
            self._shared.release_over_budget()


def read_object(text: str, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """Reads the JSON object of a successful response; a byte-order mark before it is skipped.

    Integers with more than 25 digits are read as None.

    Args:
      text: the body.
      max_values: maximum number of values in it.
    Raises: Failure "down" for a body that is not a JSON object; for an error object under status 200, its failure.
    """
    text = text.removeprefix("\ufeff").strip()
    if not text:
        raise Failure("the body is empty", "down", can_retry=True)
    # Commas and brackets inside texts are counted too; no reply has so many of them.
    if len(text) > max_values and text.count(",") + text.count("[") + text.count("{") > max_values:
        raise Failure(f"the body has more than {max_values:,} values", "down")
    try:
        body = json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError):
        raise Failure(f"the body is not JSON ({text[:KEPT]!r})", "down", can_retry=True) from None
    if not isinstance(body, dict):
        raise Failure(f"the body is not a JSON object ({text[:KEPT]!r})", "down", can_retry=True)
    error = body.get("error")
    if error and not body.get("choices") and not body.get("data"):
        code = error.get("code") if isinstance(error, dict) else None
        raise status_failure(code if isinstance(code, int) and 400 <= code < 600 else 500, error)
    return body


def read_content(
    chunks: Iterable[bytes], encoding: str, limit: int, deadline: float, seconds: float, held: HeldBytes | None = None
) -> bytes:
    """Reads and decompresses the content of a response.

    Args:
      chunks: of the response as it is sent.
      encoding: Content-Encoding; "" for none.
      limit: maximum number of bytes after decompression.
      deadline: a time of `time.monotonic()`.
      seconds: the time limit, for the error message.
      held: accounts for the bytes that are held.
    Raises: Failure "down".
    """
    content = io.BytesIO()  # returns its bytes without a copy
    for piece in _decoded(chunks, encoding.strip().lower()):
        if content.tell() + len(piece) > limit:
            raise Failure(f"the response has more than {limit:,} bytes", "down")
        if held is not None:
            held.add(len(piece), deadline)
        content.write(piece)
        if time.monotonic() > deadline:
            raise Failure(f"no complete response within {seconds:g} s", "down", can_retry=True)
    return content.getvalue()


def _decoded(chunks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """Yields the decompressed content in pieces of bounded size."""
    if encoding in ("", "identity"):
        yield from chunks
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise Failure(f"the response is compressed as {encoding[:40]!r}, which was not requested", "down")
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, by their first bytes
    received = expanded = 0
    try:
        for chunk in chunks:
            received += len(chunk)
            while not decoder.eof:
                piece = decoder.decompress(chunk, _PIECE)
                chunk = decoder.unconsumed_tail
                expanded += len(piece)
                # Checked before the limit on bytes, which each of many concurrent requests would reach.
                if expanded > max(_FREE_EXPANSION, _MOST_EXPANSION * received):
                    raise Failure(f"the response expands more than {_MOST_EXPANSION} times when decompressed", "down")
                yield piece
                if not chunk and len(piece) < _PIECE:  # a full piece may have left output behind
                    break
    except zlib.error:
        raise Failure("the compressed response cannot be decompressed", "down", can_retry=True) from None
    if not decoder.eof:
        raise Failure("the compressed response ends too early", "down", can_retry=True)


def _integer(digits: str) -> int | None:
    return int(digits) if len(digits) <= _MOST_DIGITS else None
