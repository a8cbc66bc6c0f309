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

    Raises: UsageError if something is there; ClvrError if the bucket cannot be read.
    """
    if objects.names(destination) if is_bucket(destination) else os.path.lexists(destination):
        raise UsageError(f"{destination}: exists already; choose another name or remove it")


@contextmanager
def result_directory(destination: Path) -> Iterator[Path]:
    """Yields the path at which the block makes a new directory, as a whole.

    If the destination is in a bucket, that is a path on this machine. What the block has made there is uploaded after
    it, and removed. What it leaves beside it, to continue from, stays for the next call with the same destination.

    Raises: UsageError if something is at the destination, or an earlier result was not uploaded; ClvrError if it cannot
      be uploaded: it then stays on this machine.
    """
    if not is_bucket(destination):
        yield destination
        return
    check_new(destination)
    bucket, name = split(destination)
    # The last part is the name of the new directory, and the title of a model card.
    directory = copies() / _RESULTS / bucket / file_name(name or ".") / file_name(name.rpartition("/")[2] or bucket)
    if directory.exists():
        raise UsageError(f"{directory}: an earlier result for {destination}, never uploaded; upload or remove it")
    yield directory
    try:
        objects.upload_directory(directory, destination)
    except ClvrError as error:
        raise ClvrError(f"{error}; the result is complete in {directory}") from error
    shutil.rmtree(directory.parent)
