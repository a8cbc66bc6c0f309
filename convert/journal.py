"""A directory that is made one tensor after another: complete or not there, and continued after a kill.

It is made under a hidden name beside its place and renamed when it is complete. A journal in it says what is done, and
a lock that a process is at work in it.
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
from clvr_jax.json_input import parse_json
from clvr_jax.locks import LOCK, locked

_NAME = ".journal"
_EDGE = 1 << 16


class Journal:
    """What is done of a directory's work, each with something to remember: `done[name]`, any JSON.

    Args:
      path: of the file; it is begun if it does not exist.
      work: "conversion", say, for the error.
      identity: what must be the same for the work to go on, one line.
    Raises: ClvrError if the file is of other work, or damaged.
    """

    def __init__(self, path: Path, work: str, identity: str):
        self._path = path
        self.done: dict[str, Any] = {}
        if not path.exists():
            path.write_text(identity + "\n")
            return
        first, *lines = path.read_text(errors="replace").split("\n")
        if first != identity:
            raise ClvrError(
                f"{path.parent}: was begun for another {work}, or its sources have changed since; remove it"
            )
        for line in lines[:-1]:  # what follows the last newline was cut off
            entry = parse_json(line, str(path))
            if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
                raise ClvrError(f"{path}: is damaged; remove {path.parent}")
            self.done[entry[0]] = entry[1]

    def add(self, name: str, value: Any) -> None:
        """Says that `name` is done."""
        self.done[name] = value
        with self._path.open("a") as file:
            file.write(json.dumps([name, value]) + "\n")


def states(files: Iterable[Path]) -> list[tuple[str, int, int, str]]:
    """Returns path, size, time of change (ns) and a digest of both ends of each file: another file has another state.

    The beginning of a safetensors file is its header, and sizes and times alone are kept by copies of other content.
    Raises: ClvrError if one cannot be read.
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
    """Turns an error of the system while a source is read into a ClvrError that names it.

    Else it would be taken for an error of writing, since both happen in one block.
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
    """A temporary directory that becomes `destination` when the block ends well, and its journal.

    Args:
      destination: the new directory; must not exist.
      work: "conversion", say, for messages and for the temporary name.
      identity: what must be the same for a killed run to go on, one line.
      nbytes: what will be written in all.
      resume: go on with a killed run.
    Raises: UsageError if the destination exists, or a killed run is there and `resume` is not set; ClvrError if another
      process is at work, there is no room or something cannot be written. A block that ends with ClvrError or OSError
      leaves nothing behind; one that is killed leaves the temporary directory.
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
            raise UsageError(f"{temporary}: a {work} was stopped here; add --resume to go on with it, or remove it")
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
    """The journal in a temporary directory; a directory that this run did not make stays whatever happens."""
    try:
        return Journal(temporary / _NAME, work, identity)
    except OSError as error:
        if not was_there:
            shutil.rmtree(temporary, ignore_errors=True)
        raise ClvrError(f"{temporary}: cannot be written ({error.strerror or error})") from error


def _check_room(nbytes: int, folder: Path) -> None:
    written = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if nbytes - written > free:
        raise ClvrError(f"{folder.parent}: {nbytes / 2**30:.1f} GiB are to be written, {free / 2**30:.1f} GiB are free")
