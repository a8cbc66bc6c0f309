"""Files that grow or are made by libraries for disks, of a directory in a bucket: kept on this machine and copied.

An object cannot be appended to. Metrics, TensorBoard events and profiles are written to a temporary directory, and
those that have changed are copied to the bucket as a whole: in the background, and before a checkpoint is saved.
"""

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from clvr_jax.errors import ClvrError
from clvr_jax.files.buckets.objects import read, upload_directory, upload_files
from clvr_jax.files.buckets.paths import is_bucket

INTERVAL_SECONDS = 30.0
"""Changed files are copied so often, but not for more than a tenth of the time."""
_LOCAL_ONLY = ("wandb",)
"""Directories that are not copied; Weights & Biases uploads its own files."""


class RunFiles:
    """The growing files of a directory.

    Attributes:
      out: the directory.
      directory: where they are on this machine; the directory itself if it is not in a bucket.
      is_copied: whether they are copied to a bucket.
    """

    def __init__(self, out: Path, directory: Path, check: Callable[[], None]):
        self.out, self.directory, self.is_copied = out, directory, is_bucket(out)
        self._check = check
        self._copied: dict[str, tuple[int, int]] = {}
        self._mutex = threading.Lock()

    def fetch(self, name: str) -> None:
        """Copies a file from the bucket, if it is there, to continue it. Raises: ClvrError."""
        if self.is_copied and (content := read(self.out / name)) is not None:
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            self._copied[name] = _state(path)

    def copy(self) -> None:
        """Copies the files that have changed since the last call; returns when they are there. Raises: ClvrError."""
        if not self.is_copied:
            return
        with self._mutex:
            self._check()
            found = self._sizes()
            changed = sorted(name for name, size in found.items() if self._copied.get(name) != size)
            upload_files(self.directory, changed, self.out)
            self._copied.update({name: found[name] for name in changed})

    def keep_copying(self, ended: threading.Event) -> None:
        """Copies until `ended` is set; what fails is tried again."""
        seconds = 0.0
        while not ended.wait(max(INTERVAL_SECONDS, 9 * seconds)):
            start = time.monotonic()
            with contextlib.suppress(ClvrError):
                self.copy()
            seconds = time.monotonic() - start

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Returns size and modification time of each file by its name."""
        paths = [path for path in self.directory.rglob("*") if path.is_file()]
        named = {path.relative_to(self.directory).as_posix(): path for path in paths}
        return {name: _state(path) for name, path in named.items() if name.partition("/")[0] not in _LOCAL_ONLY}


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


_active: ContextVar[RunFiles | None] = ContextVar("run_files", default=None)


@contextmanager
def run_files(out: Path, check: Callable[[], None]) -> Iterator[RunFiles]:
    """Yields the growing files of a directory, and copies them at the end, also after an error.

    Inside of a context of the same directory it yields those of that one, which copies them at its end.

    Args:
      out: the directory.
      check: called before files are copied to a bucket; raises ClvrError if this process must not write there.
    Raises: ClvrError if files cannot be copied.
    """
    outer = _active.get()
    if outer is not None and outer.out == out:
        yield outer
        return
    with _copied(out, check) if is_bucket(out) else contextlib.nullcontext(RunFiles(out, out, check)) as files:
        token = _active.set(files)
        try:
            yield files
        finally:
            _active.reset(token)


def active_run_files() -> RunFiles:
    """Returns the files of the innermost context of `run_files`. Raises: LookupError if there is none."""
    files = _active.get()
    if files is None:
        raise LookupError("no context of run_files")
    return files


@contextmanager
def _copied(out: Path, check: Callable[[], None]) -> Iterator[RunFiles]:
    """Yields files in a temporary directory, which are copied in the background and at the end."""
    ended = threading.Event()
    with tempfile.TemporaryDirectory(prefix="clvr-run-", ignore_cleanup_errors=True) as place:
        files = RunFiles(out, Path(place), check)
        thread = threading.Thread(target=files.keep_copying, args=(ended,), daemon=True)
        thread.start()
        try:
            yield files
        except BaseException:
            ended.set()
            with contextlib.suppress(ClvrError):
                files.copy()
            raise
        finally:
            ended.set()
            thread.join()
        files.copy()


@contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """Yields a directory on this machine whose files replace those of `destination` if the block succeeds.

    If the destination is not in a bucket, it is yielded itself. Raises: ClvrError if the bucket cannot be written.
    """
    if not is_bucket(destination):
        yield destination
        return
    with tempfile.TemporaryDirectory(prefix="clvr-export-") as place:
        directory = Path(place) / destination.name
        yield directory
        upload_directory(directory, destination)
