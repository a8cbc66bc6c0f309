"""A lock in a bucket: an object that one process holds at a time.

The server writes an object only if it has the generation that the writer expects, so of two processes one gets the
lock. The holder writes the object again every `HEARTBEAT_SECONDS`. A process that finds the lock of another host
watches it: if it is written again, its holder is running; if not for `STALE_SECONDS`, the holder is dead and the lock
is taken over. The lock of a dead process of the same machine is taken over at once.
"""

import contextlib
import functools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from clvr_jax.errors import ClvrError
from clvr_jax.files.buckets.objects import ABSENT, GenerationError, Stat, check_writable, delete, read, stat, write

HEARTBEAT_SECONDS, STALE_SECONDS = 15.0, 60.0

Holder = Mapping[str, object]
"""What the object says of its process: `host`, `process`, and what the caller adds."""


@contextmanager
def held(path: Path, about: Mapping[str, str], message: Callable[[Holder], str]) -> Iterator["BucketLock"]:
    """Holds a lock while the block runs.

    Args:
      path: of the object.
      about: what the object says of its process, beside host and process.
      message: holder -> the error for another process that wants the lock.
    Raises: ClvrError if another process holds it, or the bucket cannot be written.
    """
    lock = BucketLock(path, about, message)
    ended = threading.Event()
    heartbeat = threading.Thread(target=lock.keep, args=(ended,), daemon=True)
    heartbeat.start()
    try:
        yield lock
    finally:
        ended.set()
        heartbeat.join()
        lock.release()


class BucketLock:
    """A lock that this process has taken; see `held`."""

    def __init__(self, path: Path, about: Mapping[str, str], message: Callable[[Holder], str]):
        self._path, self._message = path, message
        self._content = json.dumps({**_this_process(), **about, "id": uuid.uuid4().hex}).encode()
        self._mutex = threading.Lock()
        self._generation = self._take().generation
        self._renewed = time.monotonic()

    def keep(self, ended: threading.Event) -> None:
        """Renews the lock until `ended` is set, or it is lost."""
        while not ended.wait(HEARTBEAT_SECONDS):
            try:
                self.renew()
            except GenerationError:
                return
            except ClvrError:
                continue  # the bucket cannot be reached for now

    def renew(self) -> None:
        """Writes the object again. Raises: GenerationError if it is lost; ClvrError if the bucket cannot be reached."""
        with self._mutex:
            self._generation = write(self._path, self._content, self._generation, STALE_SECONDS / 2).generation
            self._renewed = time.monotonic()

    def check(self) -> None:
        """Checks that this process still holds the lock.

        Raises: ClvrError if another process has taken it over, because this one did not run, or could not reach the
          bucket, for `STALE_SECONDS`.
        """
        if time.monotonic() - self._renewed < STALE_SECONDS / 2:
            return
        try:
            self.renew()
        except GenerationError as error:
            raise ClvrError(
                f"{self._path}: another process has taken over this directory while this one did not run or could not "
                "reach the bucket; this run ends"
            ) from error

    def release(self) -> None:
        """Deletes the object if this process still holds it."""
        with contextlib.suppress(ClvrError):  # it is stale soon
            delete(self._path, self._generation)

    def _take(self) -> Stat:
        """Writes the object when nobody holds it. Returns: what is known of it. Raises: ClvrError."""
        watched, is_stale_at = None, 0.0
        while True:
            with contextlib.suppress(GenerationError):
                return write(self._path, self._content, watched.generation if watched else ABSENT)
            found = stat(self._path)
            if found is None:
                watched = None
                continue
            holder = _read_holder(self._path)
            if watched is not None or _is_running_here(holder):  # it was written while it was watched
                raise ClvrError(self._message(holder))
            if not _is_of_this_machine(holder):
                age = (check_writable(self._path.parent).updated - found.updated).total_seconds()
                is_stale_at = time.monotonic() + STALE_SECONDS - age
                while time.monotonic() < is_stale_at and stat(self._path) == found:
                    time.sleep(min(1.0, STALE_SECONDS / 10))
            watched = found


def _read_holder(path: Path) -> Holder:
    try:
        found = json.loads(read(path) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _this_process() -> dict[str, object]:
    return {"host": socket.gethostname(), "machine": _machine(), "process": os.getpid(), "start": _start(os.getpid())}


@functools.cache
def _machine() -> str:
    """Returns an id of the running kernel and this process's table of processes, "" if the system has none.

    Pods that replace one another have the same host name and the same numbers of processes.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start(process: int) -> str:
    """Returns when a process was started, since numbers of processes are used again; "" if it is not running."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # a zombie, dead


def _is_of_this_machine(holder: Holder) -> bool:
    return bool(_machine()) and holder.get("machine") == _machine()


def _is_running_here(holder: Holder) -> bool:
    process = holder.get("process")
    return (
        _is_of_this_machine(holder)
        and isinstance(process, int)
        and bool(_start(process))
        and _start(process) == holder.get("start")
    )
