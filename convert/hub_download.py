"""Downloads of models from the Hugging Face Hub.

The library `huggingface_hub` downloads, resumes, caches and shows the progress; its settings are HF_HOME, HF_TOKEN,
HF_ENDPOINT and HF_HUB_OFFLINE. This module turns its errors into one line.
"""

import errno
import shutil
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, snapshot_download
from huggingface_hub.utils import tqdm

from clvr_jax.errors import ClvrError


class _NoBars(tqdm):
    """A disabled progress bar: the library shows one of its bars even without a terminal."""

    def __init__(self, *args: object, **options: object):
        super().__init__(*args, **{**options, "disable": True})


def download(source: str, repository: str, revision: str | None, patterns: list[str]) -> Path:
    """Returns the local path of a repository, whose files are downloaded unless they are cached.

    Args:
      source: what the user gave, for messages.
      repository, revision: `org/name`, and a branch, tag or commit; None is the main branch.
      patterns: of the files.
    Raises: ClvrError, see `hub.local_directory`.
    """
    revision = revision or constants.DEFAULT_REVISION
    try:
        return _fetched(repository, revision, patterns)
    # hf_xet, which transfers large files, raises only RuntimeError.
    except (errors.HTTPError, errors.HFValidationError, OSError, RuntimeError) as error:
        raise ClvrError(f"{source}: {_reason(error, repository, revision)}") from error


def _fetched(repository: str, revision: str, patterns: list[str]) -> Path:
    wanted: dict[str, Any] = {"repo_id": repository, "revision": revision, "allow_patterns": patterns}
    try:
        files = snapshot_download(**wanted, dry_run=True, tqdm_class=_NoBars)
    except errors.DryRunError as unreachable:
        try:
            return Path(snapshot_download(**wanted, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            raise unreachable from unreachable.__cause__
    if not files:
        raise ClvrError(f"{repository}: contains no file of a model that can be read: {', '.join(patterns)}")
    absent = [file for file in files if file.will_download]
    if absent:
        size = sum(file.file_size or 0 for file in absent)
        _check_room(repository, size)
        print(f"{repository}: {len(absent)} files, {size / 2**30:.2f} GiB, from {constants.ENDPOINT}", file=sys.stderr)
    return Path(snapshot_download(**wanted, tqdm_class=tqdm if absent and sys.stderr.isatty() else _NoBars))


def _check_room(repository: str, size: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if size > free:
        raise ClvrError(
            f"{repository}: {size / 2**30:.1f} GiB are to be fetched, {free / 2**30:.1f} GiB are free in {cache}; "
            "set HF_HOME to a larger disk"
        )


def _reason(error: Exception, repository: str, revision: str) -> str:
    """Returns one line with the cause of a failed download and a remedy, for the library's multi-line exceptions."""
    # The library wraps the error of the network in one about the missing file in the cache.
    wraps = isinstance(error, (errors.DryRunError, errors.LocalEntryNotFoundError))
    cause = error.__cause__ if wraps and error.__cause__ is not None else error
    hub, message = constants.ENDPOINT, " ".join(str(cause).split())[:160]
    elsewhere = f"pass a directory, or fetch it elsewhere with `hf download {repository}` and pass that"
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return f"not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; {elsewhere}"
    if isinstance(cause, errors.GatedRepoError):
        return f"is gated; accept its license at {hub}/{repository} and set HF_TOKEN to a token of that account"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"{hub}/{repository} has no revision {revision!r}"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return (
            f"no such directory here, and no such repository at {hub} or a private one; check the name or set HF_TOKEN"
        )
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        if status in (401, 403):
            return f"{hub} refuses it ({status}); check that HF_TOKEN is valid and may read {hub}/{repository}"
        if status == 404:
            return f"no such directory here, and {hub} has no such repository or revision {revision!r}"
        return f"{hub} answers {status}; try again later, or {elsewhere}"
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return f"no room left in {constants.HF_HUB_CACHE}; set HF_HOME to a larger disk"
    if isinstance(cause, errors.HTTPError):
        return f"no such directory here, and {hub} cannot be reached ({message}); {elsewhere}"
    return f"cannot be fetched from {hub} ({message})"
