"""Safe file names for ids in external data, checks of file names that such data contains, and URLs given as paths."""

import hashlib
import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from clvr_jax.errors import ClvrError

MAX_NAME_BYTES = 160
"""Longest id that is used unchanged; most file systems allow 255 bytes, and a suffix is added."""

_FORBIDDEN = '/\\:*?"<>|'
_URL = re.compile(r"\A([a-z][a-z0-9+.-]+):/{1,2}")
"""Begins a URL, also one of which `Path` has dropped a slash; a drive of Windows has one letter."""
_ENCODED = re.compile(r".*~[0-9a-f]{16}")


def file_name(identifier: str) -> str:
    """Returns a file name without suffix for an id of external data.

    An id that is a safe name on every system is used unchanged, so that official layouts keep their names. Every other
    id becomes its letters and digits, "~", and 16 digits of its hash, so that two ids never share a file name.

    Args:
      identifier: any text, such as the id of a prompt, a record or a dataset.
    Returns: a name that is not empty and has no separator, no leading dot, and at most `MAX_NAME_BYTES` bytes.
    """
    encoded = identifier.encode("utf-8", "surrogatepass")
    is_safe = (
        identifier.isprintable()
        and identifier == identifier.strip()
        and not set(identifier) & set(_FORBIDDEN)
        and not identifier.startswith((".", "-"))
        and not identifier.endswith(".")
        and not _ENCODED.fullmatch(identifier)
        and 0 < len(encoded) <= MAX_NAME_BYTES
    )
    if is_safe:
        return identifier
    words = "-".join(re.findall(r"[A-Za-z0-9]+", identifier))[:48].strip("-")
    return f"{words}~{hashlib.blake2b(encoded, digest_size=8).hexdigest()}"


def listed_file(directory: Path, name: str, where: str) -> Path:
    """Returns the path of a file that is listed in a file of `directory`.

    Args:
      directory: of the list.
      name: the listed name, relative to `directory`; it may be in a subdirectory.
      where: file and line of the list, for messages.
    Raises: ClvrError, one line, if the path is outside of the directory, by itself or through a link, or if there is no
      such file. Links of a Hugging Face cache to its blobs are allowed.
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
    except (OSError, ValueError, RuntimeError):  # a name that is too long or has a NUL character, or a cycle of links
        is_file = is_inside = False
    else:
        if not is_inside:
            raise ClvrError(f"{where}: {name!r:.200} is a link to outside the directory; copy the file into it")
    if not is_file:
        raise ClvrError(f"{where}: no such image, {name!r:.200}")
    return path


def shown_path(path: str | os.PathLike[str]) -> str:
    """Returns a path for messages. `Path` keeps one of the two slashes of a URL; a message has both."""
    return _URL.sub(r"\1://", os.fspath(path), count=1)


def refuse_url(path: str | os.PathLike[str]) -> None:
    """Raises: ClvrError for a URL such as gs://bucket/name, which would become a directory with the name `gs:`."""
    if _URL.match(os.fspath(path)):
        advice = "mount the bucket and give the path where it is mounted"
        raise ClvrError(f"{shown_path(path)}: a URL, not a file or directory of this machine; {advice}")


def local_path(text: str) -> Path:
    """Returns a path that a user has written. Raises: ClvrError for a URL."""
    refuse_url(text)
    return Path(text)


def is_regular_file(path: str | os.PathLike[str]) -> bool:
    """Returns whether a regular file is stored at `path`; False for names that no file can have."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def has_entry(path: Path) -> bool:
    """Returns whether there is anything at `path`, a broken link or a named pipe included.

    An optional file is absent only if this is False: reading anything else is an error, while a broken link to a file,
    as caches of downloads and git-annex leave them, would be taken for an absent file and change results.
    """
    return os.path.lexists(path)


def _parts(name: str) -> list[str]:
    return re.split(r"[/\\]", name)


def _roots(directory: Path) -> list[Path]:
    """Returns the directories that files of `directory` may be stored in."""
    root = directory.resolve()
    return [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
