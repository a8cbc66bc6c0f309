"""The files of loops, one directory each: on a disk, or in a bucket such as gs://NAME/PREFIX."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import write_atomically
from clvr_jax.files.file_names import local_path
from clvr_jax.files.image_io import MAX_FILE_BYTES
from clvr_jax.reasoning.trajectories.trajectory_files import write_directory

_NAME = re.compile(r"(step|given)_\d{2,9}\.png|trajectory\.json|events\.json|index\.html")
"""Names that loops have; nothing else is fetched from a bucket."""
MARK = "trajectory.json"
"""Is written last and removed first, so that a trajectory is there as a whole or not at all."""


class LoopFiles(Protocol):
    """The files of all loops. Loop ids were checked by the caller, since they become paths."""

    def write(self, loop_id: str, files: Mapping[str, bytes]) -> int:
        """Writes the files of a finished loop, trajectory.json last. Returns: their bytes. Raises: ClvrError."""
        ...

    def add(self, loop_id: str, name: str, content: bytes) -> None:
        """Writes one file of a running loop, completely or not at all. Raises: ClvrError."""
        ...

    def read(self, loop_id: str, name: str) -> bytes | None:
        """Returns the content of a file; None if there is none. Raises: ClvrError if it cannot be read."""
        ...

    def delete(self, loop_id: str) -> None:
        """Deletes all files of a loop that there are."""
        ...

    def local(self, loop_id: str) -> Any:
        """Returns a context with the directory of a loop on this machine, empty if there is none."""
        ...


class DirectoryFiles:
    """Files below a directory, which several machines may share.

    Raises: OSError if it cannot be created.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, loop_id: str, files: Mapping[str, bytes]) -> int:
        """See `LoopFiles`."""
        write_directory(self._directory / loop_id, {**files, MARK: files[MARK]})
        return sum(map(len, files.values()))

    def add(self, loop_id: str, name: str, content: bytes) -> None:
        """See `LoopFiles`."""
        write_atomically(self._directory / loop_id / name, content)

    def read(self, loop_id: str, name: str) -> bytes | None:
        """See `LoopFiles`."""
        path = self._directory / loop_id / name
        try:
            if not path.is_file():
                return None
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ClvrError(f"{path}: is too large")
            return path.read_bytes()
        except OSError as error:
            raise ClvrError(f"{path}: cannot be read ({error.strerror})") from error

    def delete(self, loop_id: str) -> None:
        """See `LoopFiles`; also deletes what a killed process has not finished to write."""
        for path in (self._directory / loop_id, *self._directory.glob(f".{loop_id}.*")):
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def local(self, loop_id: str) -> Iterator[Path]:
        """See `LoopFiles`."""
        yield self._directory / loop_id


class BucketFiles:
    """Files below a prefix of a bucket.

    Args:
      url: gs://NAME/PREFIX, or another one that `etils.epath` knows.
    Raises: ClvrError if a package is missing, or the bucket cannot be reached.
    """

    def __init__(self, url: str):
        try:
            from etils import epath

            self._root = epath.Path(url)
            self._root.exists()
        except ImportError as error:
            message = f"{url}: a package for buckets is missing ({_one_line(error)}): pip install 'clvr-jax[replicas]'"
            raise ClvrError(message) from error
        except Exception as error:  # each kind of bucket has errors of its own
            raise ClvrError(f"{url}: cannot be reached ({_one_line(error)})") from error

    def write(self, loop_id: str, files: Mapping[str, bytes]) -> int:
        """See `LoopFiles`."""
        with self._errors(loop_id):
            directory = self._root / loop_id
            if (mark := directory / MARK).exists():
                mark.unlink()
            for name, content in files.items():
                if name != MARK:
                    (directory / name).write_bytes(content)
            mark.write_bytes(files[MARK])
        return sum(map(len, files.values()))

    def add(self, loop_id: str, name: str, content: bytes) -> None:
        """See `LoopFiles`; a bucket shows an object only when it is complete."""
        with self._errors(loop_id):
            (self._root / loop_id / name).write_bytes(content)

    def read(self, loop_id: str, name: str) -> bytes | None:
        """See `LoopFiles`."""
        path = self._root / loop_id / name
        with self._errors(loop_id):
            try:
                if path.stat().length > MAX_FILE_BYTES:
                    raise ClvrError(f"{path}: is too large")
                content: bytes = path.read_bytes()
            except FileNotFoundError:
                return None
            return content

    def delete(self, loop_id: str) -> None:
        """See `LoopFiles`."""
        with self._errors(loop_id):
            directory = self._root / loop_id
            if directory.exists():
                directory.rmtree()

    @contextmanager
    def local(self, loop_id: str) -> Iterator[Path]:
        """See `LoopFiles`; downloads the files into a temporary directory."""
        with tempfile.TemporaryDirectory(prefix="clvr-loop-") as place:
            directory = Path(place) / loop_id
            directory.mkdir()
            with self._errors(loop_id):
                source = self._root / loop_id
                names = [path.name for path in source.iterdir()] if source.exists() else []
            for name in names:
                if _NAME.fullmatch(name) and (content := self.read(loop_id, name)) is not None:
                    (directory / name).write_bytes(content)
            yield directory

    @contextmanager
    def _errors(self, loop_id: str) -> Iterator[None]:
        """Turns errors of the bucket into one line."""
        try:
            yield
        except ClvrError:
            raise
        except Exception as error:  # each kind of bucket has errors of its own
            raise ClvrError(f"{self._root / loop_id}: cannot be read or written ({_one_line(error)})") from error


def open_files(place: str) -> LoopFiles:
    """Opens a directory, or a bucket by its URL. Raises: ClvrError if it cannot be used."""
    if is_bucket(place):
        return BucketFiles(place)
    try:
        return DirectoryFiles(local_path(place))
    except OSError as error:
        raise ClvrError(f"{place}: cannot be written ({error.strerror}); choose another --out") from error


def is_bucket(place: str) -> bool:
    """Whether loops are stored in a bucket, gs://NAME or gs://NAME/PREFIX, and not in a directory."""
    return re.match(r"gs://[^/]", place) is not None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
