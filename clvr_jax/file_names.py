"""Names of files that come from data: an id becomes one safe file name, and a listed name stays in its directory."""

import hashlib
import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from clvr_jax.errors import ClvrError

MAX_NAME_BYTES = 160
"""Longest id that is used as it is: most file systems allow 255 bytes, and a suffix follows."""

_FORBIDDEN = '/\\:*?"<>|'
_ENCODED = re.compile(r".*~[0-9a-f]{16}")


def file_name(identifier: str) -> str:
    """Returns a file name without suffix for an id of outside data.

    An id that is a harmless name on every system is its own file name, so that official layouts keep their names. Every
    other id becomes its letters and digits, "~", and 16 digits of its hash: two ids never share a file name.

    Args:
      identifier: any text: of a benchmark's prompt, a record, a dataset.
    Returns: a name that is no path: not empty, no separator, no leading dot, at most `MAX_NAME_BYTES` bytes.
    """
    encoded = identifier.encode("utf-8", "surrogatepass")
    is_harmless = (
        identifier.isprintable()
        and identifier == identifier.strip()
        and not set(identifier) & set(_FORBIDDEN)
        and not identifier.startswith((".", "-"))
        and not identifier.endswith(".")
        and not _ENCODED.fullmatch(identifier)
        and 0 < len(encoded) <= MAX_NAME_BYTES
    )
    if is_harmless:
        return identifier
    words = "-".join(re.findall(r"[A-Za-z0-9]+", identifier))[:48].strip("-")
    return f"{words}~{hashlib.blake2b(encoded, digest_size=8).hexdigest()}"


def listed_file(directory: Path, name: str, where: str) -> Path:
    """Returns the path of a file that a list in `directory` names.

    Args:
      directory: of the list.
      name: what the list says, relative to `directory`; it may name a file of a subdirectory.
      where: file and line of the list, for messages.
    Raises: ClvrError, one line, if the name leads out of the directory, by itself or through a link, or if there is no
      such file. Links of a Hugging Face cache lead to its blobs, which is fine.
    """
    leads_out = PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor) or ".." in _parts(name)
    if leads_out:
        raise ClvrError(f"{where}: {name!r:.200} is outside the directory; give a name relative to it")
    path = directory / name
    try:
        # Resolved, because a link of the directory may lead out of it as well.
        resolved = path.resolve(strict=True)
        is_file = resolved.is_file()
        is_inside = any(resolved.is_relative_to(root) for root in _roots(directory))
    except (OSError, ValueError, RuntimeError):  # too long, with a NUL character, or a circle of links
        is_file = is_inside = False
    else:
        if not is_inside:
            raise ClvrError(f"{where}: {name!r:.200} is a link to outside the directory; copy the file into it")
    if not is_file:
        raise ClvrError(f"{where}: no such image, {name!r:.200}")
    return path


def is_regular_file(path: str | os.PathLike[str]) -> bool:
    """Whether a regular file is stored at `path`; False, not an error, for names that no file can have."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def _parts(name: str) -> list[str]:
    return re.split(r"[/\\]", name)


def _roots(directory: Path) -> list[Path]:
    """The directories that files of `directory` may be stored in."""
    root = directory.resolve()
    return [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
