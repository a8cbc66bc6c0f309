"""Places for results: checked before a model works for minutes, named when nobody named them."""

import hashlib
import os
import re
import tempfile
from pathlib import Path

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files import refuse_address


def check_folder(folder: Path) -> Path:
    """Makes sure that files can be put into `folder`, which need not exist yet; nothing is left behind.

    Raises: ClvrError if it, or the place it would be made in, is no folder or cannot be written.
    """
    refuse_address(folder)
    place = folder.absolute()
    try:
        while not os.path.lexists(place):
            place = place.parent
        # The mode bits do not tell: root may be refused too, by a read-only file system.
        Path(tempfile.mkdtemp(prefix=".clvr.", dir=place)).rmdir()
    except OSError as error:
        raise ClvrError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from error
    return folder


def check_destination(destination: Path, *sources: Path) -> Path:
    """Checks that a new directory can be made, outside of the directories that it is made from.

    Raises: ClvrError as `check_folder`; UsageError if it is inside of a source, whose files are read meanwhile.
    """
    check_folder(destination)
    place = destination.absolute().resolve()
    for source in sources:
        if source.is_dir() and place.is_relative_to(source.resolve()) and place != source.resolve():
            raise UsageError(f"{destination}: is inside of {source}, which it is made from; choose a place outside")
    return destination


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
