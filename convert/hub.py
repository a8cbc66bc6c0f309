"""Models elsewhere, in place of a directory: `org/name` or `org/name@revision` on the Hugging Face Hub, or in a bucket.

This module finds out which models these are, and selects their files; `hub_download` and `bucket_copies` fetch them.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from clvr_jax.checkpoint_io.tensors import DIFFUSERS_NAME, TRANSFORMERS_NAME
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files import bucket_copies
from clvr_jax.files.buckets.paths import is_bucket, storage_path
from clvr_jax.files.file_names import shown_path

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


def local_directory(source: str, revision: str | None = None, *, allow_patterns: Sequence[str] = model_files()) -> Path:
    """Returns the local path of a model, and downloads it if `source` is a Hugging Face id or in a bucket.

    Args:
      source: an existing path, which is returned as it is, `org/name` or `org/name@revision`, or gs://NAME/PREFIX.
      revision: branch, tag or commit of the repository; None uses that of `source`, else the main branch.
      allow_patterns: patterns of the files to download. Cached files are not downloaded again.
    Raises: UsageError for a revision of a path, or two different revisions; ClvrError, one line with a remedy, if
      `source` is neither path nor id, does not exist, is gated, cannot be reached or does not fit the disk.
    """
    if is_bucket(shown_path(source)):
        if revision is not None:
            raise UsageError(f"{source}: a model in a bucket has no revision {revision!r}; leave it out")
        return bucket_copies.copied(storage_path(source), tuple(allow_patterns))
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
    from clvr_jax.convert.hub_download import download  # the library is slow to import, and paths do not need it

    return download(source, found["repository"], revision or found["revision"], list(allow_patterns))
