"""Files and folders that are complete or not there: written to a temporary name, then renamed."""

import contextlib
import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clvr_jax.errors import ClvrError
from clvr_jax.json_input import read_object


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object within limits of size and depth; ClvrError, one line, if there is none."""
    return dict(read_object(path).content)


@contextmanager
def located(where: Path | str) -> Iterator[None]:
    """Puts the place in front of a ClvrError that does not name it."""
    try:
        yield
    except ClvrError as error:
        if str(where) in str(error):
            raise
        raise type(error)(f"{where}: {error}") from error


def refuse_address(place: Path) -> None:
    """Raises: ClvrError for an address such as gs://bucket/name, of which a directory called `gs:` would be made."""
    if re.match(r"[a-z]\w+:/", str(place)):
        raise ClvrError(f"{place}: an address, no folder; mount the bucket and give the folder where it is mounted")


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON; see `write_text`, whose escapes are those of JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8; see `write_atomically`.

    Lone surrogates, which a reply of a server may hold, become escapes (a backslash, u, and four digits): what has been
    computed by then must not be lost for them.
    """
    write_atomically(path, text.encode(errors="backslashreplace"))


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all and makes its folder; ClvrError, one line, if that fails."""
    refuse_address(path)
    # GenEval's scorer takes every name that begins with digits for a picture; a hidden name is safe.
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ClvrError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well, else is removed."""
    refuse_address(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ClvrError(f"{folder}: cannot be written ({error.strerror}); choose another place") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        if folder.exists():
            # The old folder steps aside first: a process killed here leaves it under another name, not half deleted.
            previous = temporary.with_name(temporary.name + ".previous")
            folder.rename(previous)
            temporary.rename(folder)
            shutil.rmtree(previous)
        else:
            temporary.rename(folder)
    except OSError as error:
        raise ClvrError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
