"""Atomic writes of files and directories: written under a temporary name, then renamed."""

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from clvr_jax.errors import ClvrError
from clvr_jax.files.buckets import objects
from clvr_jax.files.buckets.paths import is_bucket
from clvr_jax.files.file_names import refuse_url
from clvr_jax.files.json_input import read_object


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object within limits of size and depth. Raises: ClvrError, one line, if there is none."""
    return dict(read_object(path).content)


@contextmanager
def located(where: Path | str) -> Iterator[None]:
    """Adds `where` to the front of a ClvrError raised in the block, unless its message has it already."""
    try:
        yield
    except ClvrError as error:
        if str(where) in str(error):
            raise
        raise type(error)(f"{where}: {error}") from error


def write_json(path: Path, content: object) -> None:
    """Writes indented JSON atomically; lone surrogates become escapes of JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8 atomically; see `write_atomically`.

    Lone surrogates, which a server's reply may contain, become escapes (a backslash, u, and four digits), so that no
    result is lost.
    """
    write_atomically(path, text.encode(errors="backslashreplace"))


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file or an object in a bucket completely or not at all, and creates its directory.

    Raises: ClvrError, one line, if this fails.
    """
    if is_bucket(path):
        objects.write(path, content)
        return
    refuse_url(path)
    # A hidden name, because GenEval's scorer reads every file whose name begins with digits as an image.
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ClvrError(f"{path}: cannot be written ({error.strerror or error})") from error


def open_lines(path: Path) -> BinaryIO:
    """Opens a file of lines to append to it.

    An incomplete last line, of a process that was killed, is ended, so that the next line is not added to it.
    Raises: OSError.
    """
    file = path.open("a+b")
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Yields a temporary directory that replaces `directory` if the block succeeds, and is removed otherwise."""
    refuse_url(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise ClvrError(f"{directory}: cannot be written ({error.strerror}); choose another directory") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        if directory.exists():
            # The old directory is renamed first: if the process is killed here, it is complete under another name.
            previous = temporary.with_name(temporary.name + ".previous")
            directory.rename(previous)
            temporary.rename(directory)
            shutil.rmtree(previous)
        else:
            temporary.rename(directory)
    except OSError as error:
        raise ClvrError(f"{directory}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
