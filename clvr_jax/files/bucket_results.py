"""Results of commands that may be written to a bucket: new directories, which appear when they are complete.

Tensors are written in any order, and an interrupted command continues from its files, neither of which a bucket can do.
So a result is made on this machine, beside the copies of `bucket_copies`, and takes room there until it is uploaded.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.bucket_copies import copies
from clvr_jax.files.buckets import objects
from clvr_jax.files.buckets.paths import is_bucket, split
from clvr_jax.files.file_names import file_name

_RESULTS = ".results"  # no bucket begins with a dot


def check_new(destination: Path) -> None:
    """Checks that nothing is at the place of a new directory, on this machine or in a bucket.

    Raises: UsageError if something is there, or an earlier result for the same place in a bucket was not uploaded;
      ClvrError if the bucket cannot be read.
    """
    if is_bucket(destination) and (earlier := _made_at(destination)).exists():
        raise UsageError(f"{earlier}: an earlier result for {destination}, never uploaded; upload or remove it")
    if objects.names(destination) if is_bucket(destination) else os.path.lexists(destination):
        raise UsageError(f"{destination}: exists already; choose another name or remove it")


@contextmanager
def result_directory(destination: Path) -> Iterator[Path]:
    """Yields the path at which the block makes a new directory, as a whole; `check_new` has passed before.

    If the destination is in a bucket, that is a path on this machine. What the block has made there is uploaded after
    it, and removed. What it leaves beside it, to continue from, stays for the next call with the same destination.

    Raises: ClvrError if it cannot be uploaded, or another process has written there meanwhile. A result that is made
      and not uploaded, also because the block fails, stays on this machine, and the error says where.
    """
    if not is_bucket(destination):
        yield destination
        return
    directory = _made_at(destination)
    try:
        yield directory
        if objects.names(destination):
            raise ClvrError(f"{destination}: was written by another process meanwhile; choose another name")
        objects.upload_directory(directory, destination)
    except ClvrError as error:
        if directory.exists():
            error.args = (f"{error}; the result is complete in {directory}",)
        raise
    shutil.rmtree(directory.parent)


def _made_at(destination: Path) -> Path:
    """Returns the path on this machine of a result for a bucket.

    Its last part is that of the destination: the name of the new directory is the title of a model card.
    """
    bucket, name = split(destination)
    return copies() / _RESULTS / bucket / file_name(name or ".") / file_name(name.rpartition("/")[2] or bucket)
