"""Output paths: checked before a long computation, and default names."""

import contextlib
import hashlib
import os
import re
import tempfile
from pathlib import Path

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.buckets import objects
from clvr_jax.files.buckets.paths import is_bucket
from clvr_jax.files.file_names import refuse_url

_MODEL_FILES = ("model_index.json", "config.json", "adapter_config.json")
"""Files in the directories of pipelines, models and LoRAs, and in no directory that holds images or a run."""


def check_directory(directory: Path) -> Path:
    """Checks that files can be written to a directory, which need not exist yet and is not created.

    Raises: ClvrError if it, or the nearest existing parent, is not a directory or cannot be written; if it is in a
      bucket, and that does not exist or cannot be written.
    """
    if is_bucket(directory):
        objects.check_writable(directory)
        return directory
    refuse_url(directory)
    existing = directory.absolute()
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(existing)  # raises for a name that no directory can have, which `lexists` takes for an absent one
        while not os.path.lexists(existing):
            existing = existing.parent
        # Tried, because mode bits are not sufficient: a read-only file system refuses root, too.
        Path(tempfile.mkdtemp(prefix=".clvr.", dir=existing)).rmdir()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = getattr(error, "strerror", None) or error
        raise ClvrError(f"{str(directory)[:400]}: cannot be written ({reason}); choose another --out") from error
    return directory


def check_output_directory(directory: Path) -> Path:
    """Checks that images, results or a run can be written to a directory, which may hold earlier ones.

    Raises: ClvrError as `check_directory`; UsageError if it holds a model, whose files would be mixed with them.
    """
    check_directory(directory)
    if found := next((name for name in _MODEL_FILES if objects.has_entry(directory / name)), None):
        raise UsageError(f"{directory}: holds a model ({found}); choose another --out")
    return directory


def check_destination(destination: Path, *sources: Path) -> Path:
    """Checks that a new directory can be written, outside of the source directories.

    Raises: ClvrError as `check_directory`; UsageError if it is inside of a source, whose files are still being read.
    """
    check_directory(destination)
    resolved = destination.absolute().resolve()
    for source in sources:
        if source.is_dir() and resolved.is_relative_to(source.resolve()) and resolved != source.resolve():
            raise UsageError(f"{destination}: is inside of {source}, its source; choose a directory outside")
    return destination


def check_file(path: Path) -> Path:
    """Checks that a file can be written at `path`. Raises: ClvrError as `check_directory`."""
    if path.is_dir():
        raise ClvrError(f"{path}: is a directory; give --out the name of a file")
    check_directory(path.parent)
    return path


def output_name(prompt: str, *settings: object) -> str:
    """Returns a file name without suffix: the first words of the prompt, and a hash of the prompt and all settings."""
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower())[:6])[:48].strip("-")
    digest = hashlib.blake2b(repr((prompt, *settings)).encode(errors="backslashreplace"), digest_size=3).hexdigest()
    return f"{words}-{digest}" if words else digest
