"""The resumable creation of a directory, tensor by tensor: the directory appears only when it is complete.

It is written under a hidden name beside its destination and renamed when it is complete. A journal in it records the
finished tensors, and a lock shows that a process works in it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.json_input import parse_json
from clvr_jax.files.locks import LOCK, locked

_NAME = ".journal"
_EDGE = 1 << 16


class Journal:
    """A file that records the finished steps of a work; `done` is name -> value of each step, any JSON.

    Args:
      path: of the file, which is created if it does not exist.
      work: name of the work for the error, for example "conversion".
      identity: one line that must be equal to resume the work.
    Raises: ClvrError if the file belongs to other work, or is damaged.
    """

    def __init__(self, path: Path, work: str, identity: str):
        self._path = path
        self.done: dict[str, Any] = {}
        try:
            if not path.exists():
                path.write_text(identity + "\n")
                return
            first, *lines = path.read_text(errors="replace").split("\n")
        except OSError as error:
            raise ClvrError(f"{path}: cannot be read or written ({error.strerror or error})") from error
        if first != identity:
            raise ClvrError(
                f"{path.parent}: was begun for another {work}, or its sources have changed since; remove it"
            )
        for line in lines[:-1]:  # text after the last newline is an incomplete record
            entry = parse_json(line, str(path))
            if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
                raise ClvrError(f"{path}: is damaged; remove {path.parent}")
            self.done[entry[0]] = entry[1]
        if lines and lines[-1]:  # else the next record would be appended to the incomplete one
            path.write_text("\n".join([first, *lines[:-1], ""]))

    def add(self, name: str, value: object) -> None:
        """Records that `name` is finished."""
        self.done[name] = value
        with self._path.open("a") as file:
            file.write(json.dumps([name, value]) + "\n")


def states(files: Iterable[Path]) -> list[tuple[str, int, int, str]]:
    """Returns path, size, modification time (ns) and a digest of both ends of each file, to detect changes.

    The digest covers the header of a safetensors file; size and time alone can be equal for another content.
    Raises: ClvrError if a file cannot be read.
    """
    return [_state(path) for path in sorted(files)]


def _state(path: Path) -> tuple[str, int, int, str]:
    try:
        stat = path.stat()
        digest = hashlib.sha256()
        with path.open("rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(stat.st_size - _EDGE, 0))
            digest.update(file.read(_EDGE))
    except OSError as error:
        raise ClvrError(f"{path}: cannot be read ({error.strerror or error})") from error
    return str(path.absolute()), stat.st_size, stat.st_mtime_ns, digest.hexdigest()


@contextmanager
def reading(source: Path | str) -> Iterator[None]:
    """Converts a system error while a source is read to a ClvrError that names the source.

    Otherwise it would be reported as an error of writing, because both happen in one block.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ClvrError(f"{source}: cannot be read ({reason}); fetch or convert it again") from error


@contextmanager
def resumable(
    destination: Path, work: str, identity: str, nbytes: int, resume: bool = False
) -> Iterator[tuple[Path, Journal]]:
    """Yields a temporary directory and its journal; renames it to `destination` when the block succeeds.

    Args:
      destination: the new directory; must not exist.
      work: name of the work for messages and for the temporary name, for example "conversion".
      identity: one line that must be equal to resume an interrupted run.
      nbytes: total size of all files to write.
      resume: continue an interrupted run.
    Raises: UsageError if the destination exists, or if there is an interrupted run and `resume` is not set; ClvrError
      if another process works in it, the disk has too little space or a file cannot be written. A block that fails with
      ClvrError or OSError leaves no files; a process that is killed leaves the temporary directory.
    """
    if os.path.lexists(destination):
        raise UsageError(f"{destination}: exists already; choose another name or remove it")
    temporary = destination.with_name(f".{destination.name}.{work}")
    was_there = temporary.exists()
    try:
        temporary.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClvrError(f"{destination}: cannot be written ({error.strerror or error})") from error
    with locked(temporary, destination):
        if was_there and not resume:
            raise UsageError(f"{temporary}: a {work} was interrupted here; add --resume to continue it, or remove it")
        journal = _journal(temporary, work, identity, was_there)
        try:
            _check_room(nbytes, temporary)
            yield temporary, journal
            (temporary / _NAME).unlink()
            (temporary / LOCK).unlink()
            temporary.rename(destination)
        except ClvrError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise ClvrError(f"{destination}: cannot be written ({error.strerror or error})") from error


def _journal(temporary: Path, work: str, identity: str, was_there: bool) -> Journal:
    """Opens the journal in a temporary directory; after a failure, removes the directory if this run created it."""
    try:
        return Journal(temporary / _NAME, work, identity)
    except OSError as error:
        if not was_there:
            shutil.rmtree(temporary, ignore_errors=True)
        raise ClvrError(f"{temporary}: cannot be written ({error.strerror or error})") from error


def _check_room(nbytes: int, directory: Path) -> None:
    written = sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
    free = shutil.disk_usage(directory).free
    if nbytes - written > free:
        sizes = f"{nbytes / 2**30:.1f} GiB are to be written, {free / 2**30:.1f} GiB are free"
        raise ClvrError(f"{directory.parent}: {sizes}")
