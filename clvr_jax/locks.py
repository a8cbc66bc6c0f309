"""A lock on the directory that a command writes to: two runs that write to one --out would destroy each other.

The lock is a hidden file in the directory, locked with the system's `flock`, which ends with its process however that
ends. The file says which process it is, for the message to the other one. A file of a dead process is stale and is
taken over. For processes of another host the time of the file decides, which a living one renews: a run that was
killed with its host can be resumed on another one without help.

Processes that divide the work on one directory into shares hold a lock for each share. They never wait for each other,
but no share runs twice, and nobody else runs beside them.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clvr_jax.errors import ClvrError, UsageError

LOCK = ".lock"
"""Name of the file in the directory; that of a share has its numbers behind it."""

Share = tuple[int, int]
"""(k, n): share k, from 0, of n shares."""

_SHARE = re.compile(rf"{re.escape(LOCK)}(?:-\d{{1,9}}-of-(\d{{1,9}}))?")
_BEAT_SECONDS, _STALE_SECONDS = 20.0, 120.0


@contextmanager
def locked_output(out: Path, share: Share = (0, 1)) -> Iterator[None]:
    """Holds the lock of an output directory, which is made first if need be; an empty one is not left behind.

    Args:
      out: the directory.
      share: see `locked`.
    Raises: ClvrError if another process holds it, or the directory cannot be written.
    """
    try:
        was_there = out.is_dir()
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClvrError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error
    try:
        with locked(out, share=share):
            yield
    finally:
        if not was_there:
            with contextlib.suppress(OSError):  # not empty
                out.rmdir()


@contextmanager
def new_directory(destination: Path, work: str) -> Iterator[Path]:
    """A path in a locked temporary directory; what the block makes there becomes `destination` when it ends well.

    Nothing is left otherwise, and what a killed process left is removed as well. The path does not exist at first:
    those who write models create or replace the directory themselves.

    Args:
      destination: the new directory; must not exist.
      work: "export", say, for the temporary name.
    Raises: UsageError if the destination exists; ClvrError if another process writes it, or it cannot be written.
    """
    if os.path.lexists(destination):
        raise UsageError(f"{destination}: exists already; choose another name or remove it")
    temporary = destination.with_name(f".{destination.name}.{work}")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        with locked(temporary, destination):
            try:
                _clear(temporary)
                yield temporary / destination.name
                (temporary / destination.name).rename(destination)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ClvrError(f"{destination}: cannot be written ({error.strerror or error})") from error


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


@contextmanager
def locked(directory: Path, out: Path | None = None, share: Share = (0, 1)) -> Iterator[None]:
    """Holds the lock of a directory while the block runs.

    Args:
      directory: an existing directory.
      out: its name in messages, where that is another one than `directory`: a temporary directory is made for it.
      share: of the work on the directory; the other shares of the same number may run at the same time.
    Raises: ClvrError if another process holds it, or the directory cannot be written.
    """
    path = directory / (LOCK if share[1] == 1 else f"{LOCK}-{share[0]}-of-{share[1]}")
    descriptor = _acquired(path, out or directory)
    ended = threading.Event()
    beat = threading.Thread(target=_renew, args=(descriptor, ended), daemon=True)
    beat.start()
    try:
        # Its own lock comes first: of two that begin at once, one at least sees the other.
        _refuse_others(directory, out or directory, share)
        yield
    finally:
        ended.set()
        beat.join()
        # The name goes first: whoever opens the file later makes another one.
        with contextlib.suppress(OSError):
            if _is_at(descriptor, path):
                path.unlink()
        os.close(descriptor)


def _refuse_others(directory: Path, out: Path, share: Share) -> None:
    """Raises ClvrError if a process works on the directory as a whole beside shares, or with other shares."""
    for path in sorted(directory.glob(f"{LOCK}*")):
        shares = _shares(path.name)
        if shares not in (None, share[1]) and (holder := _holder(path)) is not None:
            raise ClvrError(_message(path, out, holder))


def _shares(name: str) -> int | None:
    """Into how many shares the work is divided whose lock has this name; None if it is no lock."""
    found = _SHARE.fullmatch(name)
    return int(found[1] or 1) if found else None


def _holder(path: Path) -> dict[str, Any] | None:
    """What the lock file of a living process says; None, and the file is removed, if its process is dead."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:  # of another user
        return {}
    try:
        holder = _read(descriptor)
        # Shared, so that two that look at once are not taken for holders.
        if not _flocked(descriptor, holder, fcntl.LOCK_SH) or _is_alive_elsewhere(holder, descriptor):
            return holder
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    finally:
        os.close(descriptor)


def _renew(descriptor: int, ended: threading.Event) -> None:
    """Says to other hosts, every some seconds, that this process is alive."""
    while not ended.wait(_BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _acquired(path: Path, out: Path) -> int:
    """The locked file, open, with this process in it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ClvrError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error
        try:
            holder = _read(descriptor)
            if not _flocked(descriptor, holder) or _is_alive_elsewhere(holder, descriptor):
                raise ClvrError(_message(path, out, holder))
            if _is_at(descriptor, path):
                _write(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it meanwhile


def _flocked(descriptor: int, holder: dict[str, Any], operation: int = fcntl.LOCK_EX) -> bool:
    """Takes the system's lock; where there is none, the process that the file names decides."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return holder.get("host") != socket.gethostname() or not _is_running(holder.get("process"))
    return True


def _is_elsewhere(holder: dict[str, Any]) -> bool:
    return bool(holder) and holder.get("host") != socket.gethostname()


def _is_alive_elsewhere(holder: dict[str, Any], descriptor: int) -> bool:
    """Whether the file is of another host and was renewed a short while ago."""
    return _is_elsewhere(holder) and time.time() - os.fstat(descriptor).st_mtime < _STALE_SECONDS


def _is_running(process: Any) -> bool:
    if not isinstance(process, int) or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _read(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(descriptor: int) -> None:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:3]])[:120]
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = {"process": os.getpid(), "host": socket.gethostname(), "command": command, "since": since}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _message(path: Path, out: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('process', '(unknown)')}"
    who += f" ({holder.get('command', '')}) on {holder.get('host', 'this host')}"
    advice = "wait for it, or choose another --out"
    if _is_elsewhere(holder):
        advice += f"; if it was killed, try again in {_STALE_SECONDS:.0f} s or remove {path}"
    return f"{out}: {who} has been writing to it since {holder.get('since', 'a moment ago')}; {advice}"
