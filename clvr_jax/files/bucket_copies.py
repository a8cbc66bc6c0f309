"""Copies of models and datasets in buckets: gs://NAME/PREFIX in place of a directory.

Their readers need files: safetensors are mapped into memory and read by several threads, and array_record opens only
paths of this machine. So a directory is copied as a whole, as a model of the Hugging Face Hub is. A copy is kept, and
only objects that have changed are copied again. It takes as much room as the directory; the environment variable
CLVR_COPIES names the directory of all copies.
"""

import fcntl
import fnmatch
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from clvr_jax.compilation import user_cache
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import read_json, write_json
from clvr_jax.files.buckets import objects
from clvr_jax.files.buckets.objects import COMMIT, GenerationError, Stat
from clvr_jax.files.buckets.paths import is_bucket, split
from clvr_jax.files.file_names import file_name

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
"""Files with these endings are copied only if the patterns of the caller match them."""
_ZARR = ".zarray"
"""Shape and type of an array that Orbax has written: the only hidden file that belongs to a model."""
_THREADS = 8
_INDEX = ".objects.json"


def copies() -> Path:
    """Returns the directory of all copies."""
    return Path(os.environ.get("CLVR_COPIES") or user_cache() / "clvr-jax" / "copies")


def on_disk(directory: Path) -> Path:
    """Returns a directory of this machine: a copy of `directory` if that is in a bucket. Raises: ClvrError."""
    return copied(directory, ("*",)) if is_bucket(directory) else directory


@contextmanager
def files_on_disk(directories: Sequence[Path], names: Sequence[str]) -> Iterator[list[Path]]:
    """Yields directories of this machine, of the same names, with some small files of `directories`.

    Those of this machine are yielded themselves. Files in buckets are read anew, since they may be growing, and are
    there until the block ends; a file that does not exist is left out.

    Raises: ClvrError if a bucket cannot be read, and errors of the block, which name the paths that were given.
    """

    def fetched(source: Path, place: Path) -> Path:
        bucket, name = split(source)
        directory = place / file_name(name.rpartition("/")[2] or bucket)
        directory.mkdir(parents=True)
        for each in names:
            content = objects.read(source / each)
            if content is not None:
                (directory / each).write_bytes(content)
        return directory

    with tempfile.TemporaryDirectory(prefix="clvr-files-") as place:
        found = [
            fetched(directory, Path(place) / str(number)) if is_bucket(directory) else directory
            for number, directory in enumerate(directories)
        ]
        try:
            yield found
        except ClvrError as error:
            message = str(error)
            for directory, own in zip(directories, found, strict=True):
                message = message.replace(str(own), str(directory))
            error.args = (message,)
            raise


@functools.cache
def copied(source: Path, patterns: Sequence[str]) -> Path:
    """Returns the directory of a copy of a directory in a bucket; a process copies it once.

    Args:
      source: directory in a bucket.
      patterns: `fnmatch` patterns of the files with tensors; other files are copied as well.
    Raises: ClvrError if there is nothing, it changes meanwhile, or there is no room.
    """
    bucket, name = split(source)
    directory = copies() / bucket / file_name(name or ".")
    with _alone(directory):
        return _updated(source, directory, patterns)


def _updated(source: Path, directory: Path, patterns: Sequence[str]) -> Path:
    """Makes a directory equal to one in a bucket."""
    wanted = {name: each for name, each in objects.stats(source).items() if _is_wanted(name, patterns)}
    if not wanted:
        raise ClvrError(f"{source}: nothing is stored there; give a directory in a bucket")
    known = _known(directory)
    absent = {name: each for name, each in wanted.items() if not _is_copied(directory, name, each, known)}
    if absent:
        size = sum(each.size for each in absent.values())
        _check_room(source, directory, size)
        print(f"{source}: {len(absent)} files, {size / 2**30:.2f} GiB, to {directory}", file=sys.stderr)
        # Should this be interrupted, the index lists only files that are complete and not about to be replaced.
        write_json(directory / _INDEX, {name: each for name, each in known.items() if name not in absent})

        def copy(name: str) -> None:
            objects.download(source / name, directory / name, absent[name].generation)

        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(copy, absent))
        except GenerationError as error:
            raise ClvrError(f"{source}: was changed while it was copied; try again") from error
        except OSError as error:
            raise ClvrError(f"{directory}: cannot be written ({error.strerror or error})") from error
    write_json(directory / _INDEX, {name: each.generation for name, each in wanted.items()})
    for path in [path for path in directory.rglob("*") if path.is_file()]:
        if (name := path.relative_to(directory).as_posix()) not in wanted and name != _INDEX:
            path.unlink()
    return directory


def _is_wanted(name: str, patterns: Sequence[str]) -> bool:
    # Hidden files are left out; "..", and an empty part as in gs://NAME/PREFIX//etc, would be outside of the copy.
    is_below = all(part and (part == _ZARR or not part.startswith(".")) for part in name.split("/"))
    is_read = not name.endswith(_WEIGHTS) or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    return is_read and is_below and name != COMMIT


def _known(directory: Path) -> Mapping[str, int]:
    """Returns the generation of each object that was copied; none if that cannot be read."""
    try:
        found = read_json(directory / _INDEX)
    except ClvrError:
        return {}
    return {name: generation for name, generation in found.items() if isinstance(generation, int)}


def _is_copied(directory: Path, name: str, found: Stat, known: Mapping[str, int]) -> bool:
    path = directory / name
    return known.get(name) == found.generation and path.is_file() and path.stat().st_size == found.size


def _check_room(source: Path, directory: Path, size: int) -> None:
    free = shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free
    if size > free:
        raise ClvrError(
            f"{source}: {size / 2**30:.1f} GiB are to be copied, {free / 2**30:.1f} GiB are free in {copies()}; set "
            "CLVR_COPIES to a larger disk"
        )


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Waits until no other process of this machine makes the same copy."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory.with_name(f".{directory.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    except OSError as error:
        raise ClvrError(f"{directory}: cannot be written ({error.strerror}); set CLVR_COPIES") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
