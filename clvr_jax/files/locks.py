"""Locks on output directories, so that two runs with the same --out do not overwrite each other's files.

The lock is a hidden file in the directory, locked with `flock`, which the system releases when the process ends. The
file contains the process, for the message to other processes. The file of a dead process is stale and is taken over. A
file of another host is stale if its modification time, which a running process renews, is old: a run that was killed
with its host can be resumed on another host.

A directory in a bucket has a lock of its own kind, `buckets.lock`.

Processes that divide the work on one directory into shares hold one lock per share. They do not wait for each other,
but no share runs twice, and no process without a share runs at the same time.
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

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.buckets import objects
from clvr_jax.files.buckets.lock import BucketLock, held
from clvr_jax.files.buckets.paths import is_bucket
from clvr_jax.files.json_input import UncheckedJSON

LOCK = ".lock"
"""Name of the file in the directory; for a share, its numbers are appended."""

Share = tuple[int, int]
"""(k, n): share k, from 0, of n shares."""

_SHARE = re.compile(rf"{re.escape(LOCK)}(?:-\d{{1,9}}-of-(\d{{1,9}}))?")
_HEARTBEAT_SECONDS, _STALE_SECONDS = 20.0, 120.0
_HELD: dict[str, BucketLock] = {}
"""The locks in buckets that this process holds, by directory."""


@contextmanager
def locked_output(out: Path, share: Share = (0, 1)) -> Iterator[None]:
    """Holds the lock of an output directory, which is created if needed and removed at the end if it is empty.

    Args:
      out: the directory.
      share: see `locked`.
    Raises: ClvrError if another process holds it, or the directory cannot be written; UsageError for a share of the
      work on a directory in a bucket.
    """
    if is_bucket(out):
        with _locked_in_bucket(out, share):
            yield
        return
    try:
        existed = out.is_dir()
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClvrError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error
    try:
        with locked(out, share=share):
            yield
    finally:
        if not existed:
            with contextlib.suppress(OSError):  # not empty
                out.rmdir()


@contextmanager
def _locked_in_bucket(out: Path, share: Share) -> Iterator[None]:
    """Holds the lock of a directory in a bucket, which does not have to be created."""
    if share[1] != 1:
        raise UsageError(f"{out}: processes cannot share the work on a directory in a bucket; run one")
    path = out / LOCK
    about = {name: value for name, value in _about_this_process().items() if isinstance(value, str)}
    with held(path, about, lambda holder: _message(path, out, holder, "")) as lock:
        objects.delete_probes(out)
        _HELD[str(out)] = lock
        try:
            yield
        finally:
            del _HELD[str(out)]


def check_lock(out: Path) -> None:
    """Checks that this process still holds the lock of a directory in a bucket, if it has taken it.

    A process that was suspended, or could not reach the bucket, for longer than a lock is valid must not write there.
    Raises: ClvrError if another process has taken it over.
    """
    if (lock := _HELD.get(str(out))) is not None:
        lock.check()


@contextmanager
def new_directory(destination: Path, work: str) -> Iterator[Path]:
    """Yields a path in a locked temporary directory, which is renamed to `destination` if the block succeeds.

    Otherwise everything is removed, and so are the files of a killed process. The path does not exist at first, because
    functions that write models create or replace the directory themselves.

    Args:
      destination: the new directory; must not exist.
      work: part of the temporary name, such as "export".
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
      out: directory in messages, if `directory` is a temporary directory for another one.
      share: of the work on the directory; other shares of the same number of shares may run at the same time.
    Raises: ClvrError if another process holds it, or the directory cannot be written.
    """
    path = directory / (LOCK if share[1] == 1 else f"{LOCK}-{share[0]}-of-{share[1]}")
    descriptor = _acquired(path, out or directory)
    ended = threading.Event()
    heartbeat = threading.Thread(target=_renew, args=(descriptor, ended), daemon=True)
    heartbeat.start()
    try:
        # After taking its own lock: of two processes that begin at once, at least one sees the other's.
        _refuse_others(directory, out or directory, share)
        yield
    finally:
        ended.set()
        heartbeat.join()
        # Unlinked before it is closed: a process that opens the name later creates a new file.
        with contextlib.suppress(OSError):
            if _is_at(descriptor, path):
                path.unlink()
        os.close(descriptor)


def _refuse_others(directory: Path, out: Path, share: Share) -> None:
    """Raises ClvrError if another process works on the complete directory, or with another number of shares."""
    for path in sorted(directory.glob(f"{LOCK}*")):
        shares = _shares(path.name)
        if shares not in (None, share[1]) and (holder := _holder(path)) is not None:
            raise ClvrError(_message(path, out, holder))


def _shares(name: str) -> int | None:
    """Returns the number of shares from the name of a lock file; None if the file is not a lock."""
    found = _SHARE.fullmatch(name)
    return int(found[1] or 1) if found else None


def _holder(path: Path) -> UncheckedJSON | None:
    """Returns the content of a running process's lock file; None if its process is dead, and removes the file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:  # of another user
        return {}
    try:
        holder = _read(descriptor)
        # A shared lock, so that two processes that check at once do not take each other for holders.
        if not _flocked(descriptor, holder, fcntl.LOCK_SH) or _is_alive_elsewhere(holder, descriptor):
            return holder
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    finally:
        os.close(descriptor)


def _renew(descriptor: int, ended: threading.Event) -> None:
    """Renews the modification time of the file, which shows other hosts that this process is running."""
    while not ended.wait(_HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _acquired(path: Path, out: Path) -> int:
    """Returns the descriptor of the lock file, locked and with this process as content."""
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
        except OSError as error:  # a full disk, or a pipe in place of the file
            os.close(descriptor)
            raise ClvrError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed the file meanwhile


def _flocked(descriptor: int, holder: UncheckedJSON, operation: int = fcntl.LOCK_EX) -> bool:
    """Takes the system's lock; on a file system without locks, checks whether the process in the file is running."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return holder.get("host") != socket.gethostname() or not _is_running(holder.get("process"))
    return True


def _is_elsewhere(holder: UncheckedJSON) -> bool:
    return bool(holder) and holder.get("host") != socket.gethostname()


def _is_alive_elsewhere(holder: UncheckedJSON, descriptor: int) -> bool:
    """Returns whether the file belongs to another host and was renewed recently."""
    return _is_elsewhere(holder) and time.time() - os.fstat(descriptor).st_mtime < _STALE_SECONDS


def _is_running(process: object) -> bool:
    if not isinstance(process, int) or not 0 < process < 2**31:
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


def _read(descriptor: int) -> UncheckedJSON:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except (ValueError, RecursionError, OSError):  # OSError: a named pipe
        return {}
    return found if isinstance(found, dict) else {}


def _write(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(_about_this_process()).encode(), 0)


def _about_this_process() -> dict[str, str | int]:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:3]])[:120]
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"process": os.getpid(), "host": socket.gethostname(), "command": command, "since": since}


def _message(path: Path, out: Path, holder: UncheckedJSON, advice_elsewhere: str | None = None) -> str:
    """Returns the error for a lock that another process holds.

    advice_elsewhere: what to do if the process is on another host and was killed; None: that of a lock on a disk.
    """
    who = f"process {holder.get('process', '(unknown)')}"
    who += f" ({holder.get('command', '')}) on {holder.get('host', 'this host')}"
    advice = "wait for it, or choose another --out"
    if _is_elsewhere(holder) and advice_elsewhere is None:
        advice_elsewhere = f"; if it was killed, try again in {_STALE_SECONDS:.0f} s or remove {path}"
    advice += advice_elsewhere or ""
    return f"{out}: {who} has been writing to it since {holder.get('since', 'a moment ago')}; {advice}"
