"""Places for results: checked before a model works for minutes, named when nobody named them."""

import hashlib
import os
import re
import tempfile
from pathlib import Path

from clvr_jax.errors import ClvrError


def check_folder(folder: Path) -> Path:
    """Makes sure that files can be put into `folder`, which need not exist yet; nothing is left behind.

    Raises: ClvrError if it, or the place it would be made in, is no folder or cannot be written.
    """
    if re.match(r"[a-z]\w+:/", str(folder)):
        raise ClvrError(f"{folder}: an address, no folder; mount the bucket and give the folder where it is mounted")
    place = folder.absolute()
    try:
        while not os.path.lexists(place):
            place = place.parent
        # The mode bits do not tell: root may be refused too, by a read-only file system.
        Path(tempfile.mkdtemp(prefix=".clvr.", dir=place)).rmdir()
    except OSError as error:
        raise ClvrError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from error
    return folder


def check_file(path: Path) -> Path:
    """Makes sure that a file can be put at `path`; see `check_folder`."""
    if path.is_dir():
        raise ClvrError(f"{path}: is a folder; give --out the name of a file")
    check_folder(path.parent)
    return path


def name_for(prompt: str, *settings: object) -> str:
    """A file name without suffix: the first words of the prompt, and letters that depend on all that is given."""
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower())[:6])[:48].strip("-")
    digest = hashlib.blake2b(repr((prompt, *settings)).encode(errors="backslashreplace"), digest_size=3).hexdigest()
    return f"{words}-{digest}" if words else digest
