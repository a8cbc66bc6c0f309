"""Objects in a bucket: read, written and listed with retries; each failure is one line.

An object is written completely or not at all. A write may depend on the generation of the object that it replaces,
which the server compares. Requests that meet 429, 500 to 504, or a connection that ends too early are repeated with
exponential backoff for up to `DEADLINE_SECONDS`; the client compares checksums of what it sends and receives.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from clvr_jax.errors import ClvrError
from clvr_jax.files import file_names
from clvr_jax.files.buckets.paths import is_bucket, split

if TYPE_CHECKING:
    from google.api_core.retry import Retry
    from google.cloud.storage import Blob, Client

DEADLINE_SECONDS = 300.0
"""A request is repeated for so long before it is an error."""
REQUEST_SECONDS = (30.0, 120.0)
"""A connection must be made, and bytes must arrive, within so many seconds."""
ABSENT = 0
"""Generation of an object that does not exist."""
COMMIT = "commit_success.txt"
"""Is written last in a directory of a bucket, so that without it the directory is not complete; as Orbax does it."""

_PROBE = ".clvr.probe."
_SIGN_IN = "run `gcloud auth application-default login`, or give this machine a service account"
_THREADS = 8


@dataclass(frozen=True)
class Stat:
    """Size in bytes, generation, which differs after each write, and time of the last write by the server's clock."""

    size: int
    generation: int
    updated: datetime


class GenerationError(Exception):
    """The object does not have the generation that was expected: another process has written or deleted it."""


def stat(path: Path) -> Stat | None:
    """Returns what is known of an object; None if there is none. Raises: ClvrError."""
    from google.api_core.exceptions import NotFound

    with _errors(path, "read"):
        try:
            blob = _blob(path)
            blob.reload(**_options())
        except NotFound:
            return None
        return Stat(int(blob.size), int(blob.generation), blob.updated)


def read(path: Path) -> bytes | None:
    """Returns the content of an object; None if there is none. Raises: ClvrError."""
    from google.api_core.exceptions import NotFound

    with _errors(path, "read"):
        try:
            content = _whole(lambda: _blob(path).download_as_bytes(**_options()))
        except NotFound:
            return None
        return bytes(content)


def write(
    path: Path, content: bytes, generation: int | None = None, deadline_seconds: float = DEADLINE_SECONDS
) -> Stat:
    """Writes an object, completely or not at all.

    Args:
      path: of the object.
      content: its bytes; with `generation` they must differ from those of any other process.
      generation: write only if the object has this generation, `ABSENT` if it must not exist; None: in any case.
      deadline_seconds: a failing request is repeated for so long.
    Raises: GenerationError if it has another one; ClvrError if it cannot be written.
    """
    from google.api_core.exceptions import PreconditionFailed

    with _errors(path, "written"):
        blob = _blob(path)
        try:
            options = _options(deadline_seconds)
            blob.upload_from_string(content, if_generation_match=generation, **options)
        except PreconditionFailed as error:
            # The response to an earlier attempt may have been lost, though it was obeyed.
            found = stat(path)
            if found is None or read(path) != content:
                raise GenerationError from error
            return found
        return Stat(len(content), int(blob.generation), blob.updated)


def delete(path: Path, generation: int | None = None) -> None:
    """Deletes an object if it exists, with `generation` only if it has this one. Raises: ClvrError."""
    from google.api_core.exceptions import NotFound, PreconditionFailed

    with _errors(path, "deleted"), contextlib.suppress(NotFound, PreconditionFailed):
        _blob(path).delete(if_generation_match=generation, **_options())


def stats(directory: Path) -> dict[str, Stat]:
    """Returns all objects below a directory, by their names relative to it, in order. Raises: ClvrError."""
    prefix = _prefix(directory)
    found = {blob.name.removeprefix(prefix): blob for blob in _list(directory)}
    # Some tools mark directories by names with a slash at the end.
    return {
        name: Stat(int(blob.size), int(blob.generation), blob.updated)
        for name, blob in sorted(found.items())
        if name and not name.endswith("/")
    }


def names(directory: Path) -> list[str]:
    """Returns the names of all objects below a directory, relative to it, in order. Raises: ClvrError."""
    return list(stats(directory))


def has_entry(path: Path) -> bool:
    """Returns whether there is a file at a path, on this machine or in a bucket; see `file_names.has_entry`.

    Raises: ClvrError if the bucket cannot be read.
    """
    return stat(path) is not None if is_bucket(path) else file_names.has_entry(path)


def delete_directory(directory: Path) -> None:
    """Deletes all objects below a directory, the one that says that it is complete first. Raises: ClvrError."""
    from google.api_core.exceptions import NotFound

    delete(directory / COMMIT)

    def delete_blob(blob: "Blob") -> None:
        with contextlib.suppress(NotFound):
            blob.delete(**_options())

    with _errors(directory, "deleted"), ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(delete_blob, _list(directory)))


def upload(source: Path, path: Path) -> None:
    """Writes an object with the content of a file of this machine. Raises: ClvrError."""
    with _errors(path, "written"):
        _blob(path).upload_from_filename(str(source), **_options())


def download(path: Path, file: Path, generation: int) -> None:
    """Writes the content of an object to a file of this machine, as a whole or not at all.

    Args:
      path: of the object.
      file: its name on this machine; its directory is created.
      generation: that the object must have.
    Raises: GenerationError if it has another one, or was deleted; ClvrError if it cannot be read or written.
    """
    from google.api_core.exceptions import NotFound, PreconditionFailed

    temporary = file.with_name(f".{file.name}.part")
    with _errors(path, "copied"):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            options = {"if_generation_match": generation, **_options()}
            _whole(lambda: _blob(path).download_to_filename(str(temporary), **options))
            temporary.replace(file)
        except (NotFound, PreconditionFailed) as error:
            raise GenerationError from error
        finally:
            temporary.unlink(missing_ok=True)


def upload_directory(source: Path, directory: Path) -> None:
    """Replaces a directory in a bucket by the files of one on this machine.

    `COMMIT` is deleted first and written last: without it, the directory is not complete.
    Raises: ClvrError.
    """
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    wanted = {path.relative_to(source).as_posix() for path in files}
    delete(directory / COMMIT)
    upload_files(source, sorted(wanted), directory)
    for name in set(names(directory)) - wanted:
        delete(directory / name)
    write(directory / COMMIT, f"{len(wanted)} files\n".encode())


def upload_files(source: Path, files: Sequence[str], directory: Path) -> None:
    """Writes objects with the content of some files of a directory on this machine. Raises: ClvrError."""
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda name: upload(source / name, directory / name), files))


def check_writable(directory: Path) -> Stat:
    """Writes an object into a directory and deletes it. Returns: what was known of it. Raises: ClvrError."""
    probe = directory / f"{_PROBE}{os.urandom(8).hex()}"
    found = write(probe, b"")
    delete(probe)
    return found


def delete_probes(directory: Path) -> None:
    """Deletes the objects that killed processes have left in `check_writable`. Raises: ClvrError."""
    for blob in _list(directory, _PROBE):
        delete(directory / blob.name.removeprefix(_prefix(directory)))


@functools.cache
def _client() -> "Client":
    """Returns the client of this process."""
    from google.cloud.storage import Client

    return Client(project=None)  # none is needed for objects of a bucket


@functools.cache
def _retry(deadline_seconds: float) -> "Retry":
    from google.cloud.storage.retry import DEFAULT_RETRY

    return cast("Retry", DEFAULT_RETRY.with_delay(initial=0.5, maximum=30.0).with_timeout(deadline_seconds))


def _whole(download: Callable[[], Any]) -> Any:
    """Downloads again if the checksum differs, which a connection that ends inside of the headers looks like."""
    from google.cloud.storage.exceptions import DataCorruption

    retry: Any = _retry(DEADLINE_SECONDS).with_predicate(lambda error: isinstance(error, DataCorruption))
    return retry(download)()


def _options(deadline_seconds: float = DEADLINE_SECONDS) -> dict[str, Any]:
    return {"retry": _retry(deadline_seconds), "timeout": REQUEST_SECONDS}


def _prefix(directory: Path) -> str:
    name = split(directory)[1]
    return f"{name}/" if name else ""


def _list(directory: Path, beginning: str = "") -> "list[Blob]":
    """Returns all objects below a directory whose relative name has a beginning. Raises: ClvrError."""
    prefix = _prefix(directory) + beginning
    with _errors(directory, "read"):
        return list(_client().list_blobs(split(directory)[0], prefix=prefix, **_options()))


def _blob(path: Path) -> "Blob":
    bucket, name = split(path)
    return _client().bucket(bucket).blob(name)


@contextmanager
def _errors(path: Path, verb: str) -> Iterator[None]:
    """Turns errors of the client into one line that says what to do; `verb` is what was not done, such as "read"."""
    try:
        yield
    except (ClvrError, GenerationError):
        raise
    except Exception as error:  # the client lets those of its libraries for HTTP through
        reason, advice = _explained(split(path)[0], error)
        raise ClvrError(f"{path}: cannot be {verb}: {reason}; {advice}") from error


def _explained(bucket: str, error: Exception) -> tuple[str, str]:
    """Returns the reason of an error of the client in one line, and what to do."""
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import InvalidResponse

    if isinstance(error, exceptions.RetryError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, InvalidResponse):
        error = exceptions.from_http_response(error.response)
    if isinstance(error, GoogleAuthError):
        return f"no credentials ({_one_line(error)})", _SIGN_IN
    if not isinstance(error, exceptions.GoogleAPICallError):
        return f"{type(error).__name__} ({_one_line(error)})", "try again, or choose another path"
    code = int(error.code or 0)
    reasons = " ".join([str(error), *(str(each) for each in error.errors or ())]).lower()
    if code == 404:
        return f"there is no bucket {bucket}", "create it, or choose another one"
    if code == 429 or "quota" in reasons or "ratelimit" in reasons:
        advice = "the quota or the rate limit of the project is reached; raise it, or try again later"
    elif code == 401:
        advice = _SIGN_IN
    elif code == 403:
        advice = f"give the account the roles Storage Object User and Storage Legacy Bucket Reader of {bucket}"
    else:
        advice = "try again, or choose another path"
    return f"{code} {_one_line(error)}", advice


def _one_line(error: Exception) -> str:
    """Returns the message of an error, without the request and without what the client adds."""
    text = " ".join(str(getattr(error, "message", None) or error).split())
    text = re.sub(r"^(GET|POST|PUT|PATCH|DELETE) \S+: ", "", text)
    return re.sub(r":? ?\('Request failed with status code'.*", "", text)[:200]
