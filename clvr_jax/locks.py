"""A lock on the directory that a command writes to: two runs that write to one --out would destroy each other.

The lock is a hidden file in the directory, locked with the system's `flock`, which ends with its process however that
ends. The file says which process it is, for the message to the other one. A file of a dead process is stale and is
taken over. About processes of another host the time of the file decides, which a living one renews: a run that was
killed with its host goes on elsewhere without help.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clvr_jax.errors import ClvrError

LOCK = ".lock"
"""Name of the file in the directory."""

_BEAT_SECONDS, _STALE_SECONDS = 20.0, 120.0


@contextmanager
def locked(folder: Path, out: Path | None = None) -> Iterator[None]:
    """Holds the lock of a directory while the block runs.

    Args:
      folder: an existing directory.
      out: its name in messages, where that is another one than `folder`: a temporary directory is made for it.
    Raises: ClvrError if another process holds it, or the directory cannot be written.
    """
    path = folder / LOCK
    descriptor = _acquired(path, out or folder)
    ended = threading.Event()
    beat = threading.Thread(target=_renew, args=(descriptor, ended), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        # The name goes first: whoever opens the file later makes another one.
        with contextlib.suppress(OSError):
            if _is_at(descriptor, path):
                path.unlink()
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


def _flocked(descriptor: int, holder: dict[str, Any]) -> bool:
    """Takes the system's lock; where there is none, the process that the file names decides."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
