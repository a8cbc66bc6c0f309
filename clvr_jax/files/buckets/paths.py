"""Paths that may be in a bucket: gs://NAME/PREFIX beside the paths of this machine.

A path in a bucket is an `etils.epath.Path`, which Orbax takes as well. It has the names and operators of
`pathlib.Path`, so it is passed as one; functions that read or write files call `is_bucket` and use `objects` for it.
"""

import functools
import importlib.util
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

from clvr_jax.errors import ClvrError
from clvr_jax.files.file_names import local_path, shown_path

SCHEME = "gs://"
MAY_BE_IN_BUCKET = "may be in a bucket"
"""Part of the annotation of a field whose path may be in a bucket."""
MAX_NAME_BYTES = 800
"""Longest path inside a bucket. Names of objects have at most 1024 bytes, and files of a run are below its path."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_WILDCARDS = re.compile(r"[*?\[\]#]")
_PACKAGES = ("google.cloud.storage", "gcsfs")


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is in a bucket. A `pathlib.Path` never is, since it drops a slash of gs://."""
    return os.fspath(path).startswith(SCHEME)


def storage_path(path: str | os.PathLike[str]) -> Path:
    """Returns a path that a user has written, on this machine or in a bucket.

    Args:
      path: a path, or gs://NAME or gs://NAME/PREFIX.
    Raises: ClvrError, one line, for another URL, a name that no bucket or object can have, or a missing package.
    """
    text = shown_path(path)
    if not is_bucket(text):
        return local_path(os.fspath(path))
    bucket, _, name = text.removeprefix(SCHEME).partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ClvrError(f"{text[:300]!r}: not the name of a bucket; give gs://NAME/PREFIX")
    has_parts = set(name.split("/")) & {".", ".."}
    if not name.isprintable() or _WILDCARDS.search(name) or has_parts or len(name.encode()) > MAX_NAME_BYTES:
        advice = f"use up to {MAX_NAME_BYTES} bytes without '..', '.', '*', '?', '#', brackets and control characters"
        raise ClvrError(f"{text[:300]!r}: not a name for files in a bucket; {advice}")
    return _bucket_path()(text.rstrip("/"))


def absolute(path: Path) -> Path:
    """Returns a path that does not depend on the working directory; that in a bucket never does."""
    return path if is_bucket(path) else path.absolute()


def split(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Returns the name of the bucket, and the name of the object in it, of a path in a bucket."""
    bucket, _, name = os.fspath(path).removeprefix(SCHEME).partition("/")
    return bucket, name


@functools.cache
def _bucket_path() -> Callable[[str], Path]:
    """Returns the class of paths in buckets, for whose first use the libraries below it are set up."""
    for package in _PACKAGES:
        try:
            is_there = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:  # of a package above it
            is_there = False
        if not is_there:
            raise ClvrError(f"paths such as gs://NAME/PREFIX need {package}: pip install 'clvr-jax[gcs]'")
    from etils import epath
    from fsspec.config import conf

    # The cache of gcsfs never learns what TensorStore, or another process, has written.
    conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of errors that it raises as well
    return cast(Callable[[str], Path], epath.Path)
