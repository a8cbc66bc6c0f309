"""Downloads of models from the Hugging Face Hub: `org/name` or `org/name@revision` in place of a directory.

The library `huggingface_hub` downloads, resumes, caches and shows the progress; its settings are HF_HOME, HF_TOKEN,
HF_ENDPOINT and HF_HUB_OFFLINE. This module selects the files of a model and turns errors into one line.
"""

import errno
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, snapshot_download
from huggingface_hub.utils import tqdm

from clvr_jax.checkpoint_io.tensors import DIFFUSERS_NAME, TRANSFORMERS_NAME
from clvr_jax.errors import ClvrError, UsageError

_BESIDE = ("*.json", "*.txt", "*.jinja", "*.model", "*.md", "LICENSE*")


def model_files(variant: str | None = None) -> tuple[str, ...]:
    """Returns `fnmatch` patterns for the files of a model, without pickles and files for other programs.

    Only tensors that `stored_tensors` reads match: repositories often contain the same weights again as a single file.

    Args:
      variant: match only models with this variant, for example "fp16".
    """
    kind = f".{variant}" if variant else ""
    tensors = (
        f"{directory}{name}{kind}{shard}.safetensors"
        for directory in ("", "*/")
        for name in (DIFFUSERS_NAME, TRANSFORMERS_NAME)
        for shard in ("", "-*-of-*")
    )
    return (*_BESIDE, *tensors)


_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\S+))?")


def repository_of(source: str) -> str | None:
    """Returns `org/name` of a Hugging Face id, with or without a revision; None for a path or a shipped name."""
    found = _ID.fullmatch(source)
    return None if found is None or Path(source).expanduser().exists() else found["repository"]


class _NoBars(tqdm):
    """A disabled progress bar: the library shows one of its bars even without a terminal."""

    def __init__(self, *args: object, **options: object):
        super().__init__(*args, **{**options, "disable": True})


def local_directory(source: str, revision: str | None = None, *, allow_patterns: Sequence[str] = model_files()) -> Path:
    """Returns the local path of a model, and downloads it if `source` is a Hugging Face id.

    Args:
      source: an existing path, which is returned as it is, or `org/name` or `org/name@revision`.
      revision: branch, tag or commit of the repository; None uses that of `source`, else the main branch.
      allow_patterns: patterns of the files to download. Cached files are not downloaded again.
    Raises: UsageError for a revision of a path, or two different revisions; ClvrError, one line with a remedy, if
      `source` is neither path nor id, does not exist, is gated, cannot be reached or does not fit the disk.
    """
    path = Path(source).expanduser()
    found = _ID.fullmatch(source)
    if path.exists():
        if revision is not None:
            raise UsageError(f"{source}: a path on this machine has no revision {revision!r}; leave it out")
        return path
    if found is None:
        raise ClvrError(f"{source}: no such directory; give one, or a Hugging Face id, org/name or org/name@revision")
    if revision is not None and found["revision"] not in (None, revision):
        raise UsageError(f"{source}: names a revision other than {revision!r}; give one of them")
    repository, revision = found["repository"], revision or found["revision"] or constants.DEFAULT_REVISION
    try:
        return _fetched(repository, revision, list(allow_patterns))
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
