"""A folder that is made one tensor after another: complete or not there, and continued after a kill.

It is made under a hidden name beside its place and renamed when it is complete. A journal in it says what is done.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clvr_jax.errors import ClvrError, UsageError

_NAME = ".journal"


class Journal:
    """What is done of a folder's work, each with something to remember: `done[name]`, any JSON.

    Args:
      path: of the file; it is begun if it does not exist.
      work: "conversion", say, for the error.
      identity: what must be the same for the work to go on, one line.
    Raises: ClvrError if the file is of other work.
    """

    def __init__(self, path: Path, work: str, identity: str):
        self._path = path
        self.done: dict[str, Any] = {}
        if not path.exists():
            path.write_text(identity + "\n")
            return
        first, *lines = path.read_text().split("\n")
        if first != identity:
            raise ClvrError(f"{path.parent}: was begun for another {work}; remove it")
        complete = lines[:-1]  # what follows the last newline was cut off
        self.done = dict(json.loads(line) for line in complete)

    def add(self, name: str, value: Any) -> None:
        """Says that `name` is done."""
        self.done[name] = value
        with self._path.open("a") as file:
            file.write(json.dumps([name, value]) + "\n")


@contextmanager
def resumable(
    destination: Path, work: str, identity: str, nbytes: int, resume: bool = False
) -> Iterator[tuple[Path, Journal]]:
    """A temporary folder that becomes `destination` when the block ends well, and its journal.

    Args:
      destination: the new folder; must not exist.
      work: "conversion", say, for messages and for the temporary name.
      identity: what must be the same for a killed run to go on, one line.
      nbytes: what will be written in all.
      resume: go on with a killed run.
    Raises: UsageError if the destination exists, or a killed run is there and `resume` is not set; ClvrError if there
      is no room or something cannot be written. A block that ends with ClvrError or OSError leaves nothing behind; one
      that is killed leaves the temporary folder.
    """
    if destination.exists():
        raise UsageError(f"{destination}: exists already; choose another name or remove it")
    temporary = destination.with_name(f".{destination.name}.{work}")
    if temporary.exists() and not resume:
        raise UsageError(f"{temporary}: a {work} was stopped here; add --resume to go on with it, or remove it")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        journal = Journal(temporary / _NAME, work, identity)
    except OSError as error:
        raise _unwritable(destination, temporary, error) from error
    try:
        _check_room(nbytes, temporary)
        yield temporary, journal
        (temporary / _NAME).unlink()
        temporary.rename(destination)
    except ClvrError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except OSError as error:
        raise _unwritable(destination, temporary, error) from error


def _unwritable(destination: Path, temporary: Path, error: OSError) -> ClvrError:
    shutil.rmtree(temporary, ignore_errors=True)
    return ClvrError(f"{destination}: cannot be written ({error.strerror or error})")


def _check_room(nbytes: int, folder: Path) -> None:
    written = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if nbytes - written > free:
        raise ClvrError(f"{folder.parent}: {nbytes / 2**30:.1f} GiB are to be written, {free / 2**30:.1f} GiB are free")
