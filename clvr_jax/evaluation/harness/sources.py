"""Prompt files of benchmarks, which are fetched once, at a pinned revision, and stored in the user's cache."""

from __future__ import annotations

import hashlib
import http.client
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from clvr_jax.compilation import user_cache
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import write_atomically

_TIMEOUT, _MOST_SECONDS = 10, 300
_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Remote:
    """A file of a repository. url: its address at one commit. blob: git's id of its content at that commit."""

    url: str
    blob: str

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.url.rpartition("/")[2].replace("%2B", "+")


@dataclass(frozen=True)
class Source:
    """The source of a benchmark's prompts. files: the prompt files. license: the license of the prompts."""

    files: tuple[Remote, ...]
    license: str

    def fetch(self, benchmark: str, *, is_script: bool = False) -> Path:
        """Returns the file, or the directory of several files; files in the cache are not fetched again.

        Args:
          benchmark: name of the directory in the cache.
          is_script: whether the file is a script in place of prompts, which --prompts would name.

        Raises: ClvrError, one line, if a file cannot be fetched or its content is not the pinned one.
        """
        directory = _cache() / benchmark
        for remote in self.files:
            path = directory / remote.name
            if path.is_file() and blob_id(path.read_bytes()) == remote.blob:
                continue
            remedy = f"store the file as {path}" if is_script else "give the file with --prompts PATH"
            content = _download(remote.url, benchmark, remedy)
            if (found := blob_id(content)) != remote.blob:
                raise ClvrError(
                    f"{benchmark}: the content of {remote.url} is not the pinned one (git blob {found}, not "
                    f"{remote.blob}); {remedy}"
                )
            write_atomically(path, content)
        return directory / self.files[0].name if len(self.files) == 1 else directory


def github(repository: str, commit: str, blobs: dict[str, str]) -> tuple[Remote, ...]:
    """Returns files of a GitHub repository at a commit. blobs: path in the repository -> git's id of the content."""
    return tuple(
        Remote(f"https://raw.githubusercontent.com/{repository}/{commit}/{path.replace('+', '%2B')}", blob)
        for path, blob in blobs.items()
    )


def blob_id(content: bytes) -> str:
    """Returns git's id of a file's content, which can be looked up in a repository without fetching the file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _download(url: str, benchmark: str, remedy: str) -> bytes:
    found: Future[bytes] = Future()
    # In a thread, which may be left behind: a server can drip the headers, which urllib reads without a deadline.
    threading.Thread(target=_fetch, args=(url, found), daemon=True).start()
    try:
        return found.result(_MOST_SECONDS)
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error.reason if isinstance(error, urllib.error.URLError) else error).split())[:200]
        reason = reason or f"not complete after {_MOST_SECONDS} s"  # of `Future.result`
        raise ClvrError(
            f"{benchmark}: {url} cannot be fetched ({reason}); download it elsewhere and {remedy}"
        ) from error


def _fetch(url: str, found: Future[bytes]) -> None:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            found.set_result(_content(response))
    except Exception as error:  # noqa: BLE001 - raised again by `Future.result`
        found.set_exception(error)


def _content(response: http.client.HTTPResponse) -> bytes:
    """Reads a response of at most `_MOST_BYTES`, what is longer is cut. Raises: TimeoutError if it takes too long."""
    content, deadline = bytearray(), time.monotonic() + _MOST_SECONDS
    while len(content) <= _MOST_BYTES and (piece := response.read1(1 << 16)):
        content += piece
        if time.monotonic() > deadline:
            raise TimeoutError(f"not complete after {_MOST_SECONDS} s")
    return bytes(content)


def _cache() -> Path:
    return user_cache() / "clvr-jax" / "benchmarks"
