"""A directory of compiled programs.

The files are code: whoever can write them decides what the process that reads them does. So the directory and its files
belong to the user, nobody else can write them, and a file of another owner, or one that others can write, is not read.
A digest in each file tells damage, not forgery.

A program has two names. Its key is a digest of what it was traced from, so that it is found without tracing; the file
of a key names a content, a digest of what was lowered. Changed source has other keys; where it lowers to the same, the
program of the content is used again and only traced.
"""

import contextlib
import hashlib
import logging
import os
import stat
import time
import uuid
from pathlib import Path
from typing import NamedTuple

_log = logging.getLogger("clvr.programs")

_MAGIC = b"clvr-jax program 1\n"
_DIGEST = 32
_KEY, _PROGRAM, _TEMPORARY = ".key", ".program", ".tmp"
_STALE_SECONDS = 3600.0
"""Temporary files that are older were left behind by a process that was killed."""

_UNWRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class Size(NamedTuple):
    """What a store holds: number of programs, and bytes of all files."""

    programs: int
    nbytes: int


class ProgramStore:
    """Compiled programs in a directory, of which the least recently used are dropped beyond a number of bytes.

    Several processes may use one directory. Nothing that is wrong with it is an error: a program that cannot be read is
    not there, which is logged in one line.

    Args:
      directory: created with permissions 0700 if it does not exist.
      max_bytes: of all files together.
      shared: a store of other programs too; what is not in this one is copied from there, and both are written.
    """

    def __init__(self, directory: Path, max_bytes: int, shared: "ProgramStore | None" = None) -> None:
        self.directory, self.max_bytes, self._shared = directory, max_bytes, shared

    def prepare(self) -> bool:
        """Creates the directory; returns whether it can be used, and belongs to the user alone."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.directory.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                _log.warning("%s: not a directory of this user; compiled programs are not stored", self.directory)
                return False
            if stat.S_IMODE(found.st_mode) != 0o700:
                self.directory.chmod(0o700)
            return os.access(self.directory, os.R_OK | os.W_OK | os.X_OK)
        except OSError as error:
            reason = error.strerror or error
            _log.warning("%s: compiled programs cannot be stored (%s)", self.directory, reason)
            return False

    def read_key(self, key: str) -> bytes | None:
        """Returns what is stored under a key, None if there is nothing that can be read."""
        value = self._read(key + _KEY)
        if value is None and self._shared is not None and (value := self._shared.read_key(key)) is not None:
            self._write(key + _KEY, value)
        return value

    def read_program(self, content: str) -> bytes | None:
        """Returns the program of a content; None if there is none that can be read."""
        program = self._read(content + _PROGRAM)
        if program is None and self._shared is not None and (program := self._shared.read_program(content)) is not None:
            self._write_program(content, program)
        return program

    def write_key(self, key: str, value: bytes) -> None:
        """Stores a value under a key."""
        self._write(key + _KEY, value)
        if self._shared is not None:
            self._shared.write_key(key, value)

    def write_program(self, content: str, program: bytes) -> None:
        """Stores the program of a content; drops the least recently used ones if there is no room."""
        self._write_program(content, program)
        if self._shared is not None:
            self._shared.write_program(content, program)

    def _write_program(self, content: str, program: bytes) -> None:
        if len(program) > self.max_bytes:
            _log.warning("%s: a program of %d bytes is larger than the store", self.directory, len(program))
            return
        self._make_room(len(program))
        self._write(content + _PROGRAM, program)

    def discard(self, name: str, reason: str) -> None:
        """Removes what is stored under a key or a content, and says so in one line."""
        for suffix in (_KEY, _PROGRAM):
            path = self.directory / (name + suffix)
            if path.exists():
                _log.warning("%s: %s; the program is made anew", path, reason)
                with contextlib.suppress(OSError):
                    path.unlink()
        if self._shared is not None:
            self._shared.discard(name, reason)

    def size(self) -> Size:
        """Returns what the store holds."""
        files = self._files()
        return Size(sum(path.suffix == _PROGRAM for path in files), sum(found.st_size for found in files.values()))

    def _files(self) -> dict[Path, os.stat_result]:
        files = {}
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.directory):
                with contextlib.suppress(OSError):  # another process has removed it
                    files[Path(entry.path)] = entry.stat(follow_symlinks=False)
        return files

    def _make_room(self, nbytes: int) -> None:
        files = self._files()
        now = time.time()
        for path, found in list(files.items()):
            if path.suffix == _TEMPORARY and now - found.st_mtime > _STALE_SECONDS:
                _remove(path)
                del files[path]
        total = nbytes + sum(found.st_size for found in files.values())
        for path, found in sorted(files.items(), key=lambda item: item[1].st_mtime):
            if total <= self.max_bytes:
                return
            if path.suffix in (_KEY, _PROGRAM):
                _remove(path)
                total -= found.st_size

    def _read(self, name: str) -> bytes | None:
        path = self.directory / name
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("%s: cannot be read (%s); the program is made anew", path, error.strerror or error)
            return None
        with open(handle, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                reason = "not a file of this user"
            elif found.st_mode & _UNWRITABLE_BY_OTHERS:
                reason = "other users can write it"
            elif found.st_size > self.max_bytes:
                reason = "larger than the store"
            else:
                content = file.read()
                body = content[len(_MAGIC) + _DIGEST :]
                if content[: len(_MAGIC) + _DIGEST] == _MAGIC + _digest(body):
                    with contextlib.suppress(OSError):
                        os.utime(file.fileno())  # the least recently used files are dropped first
                    return body
                reason = "damaged, or of another format"
        _log.warning("%s: %s; the program is made anew", path, reason)
        _remove(path)
        return None

    def _write(self, name: str, body: bytes) -> None:
        temporary = self.directory / f"{uuid.uuid4().hex}{_TEMPORARY}"
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(handle, "wb") as file:
                file.write(_MAGIC + _digest(body) + body)
            temporary.replace(self.directory / name)
        except OSError as error:
            _log.warning("%s: a program cannot be stored (%s)", self.directory, error.strerror or error)
            _remove(temporary)


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST).digest()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
