"""The store of this process: none by default, one directory once a command has enabled it."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

from clvr_jax.compilation import compilation_cache, user_cache
from clvr_jax.errors import UsageError
from clvr_jax.processes import is_distributed
from clvr_jax.programs.store import ProgramStore

DIRECTORY, GIB = "CLVR_PROGRAMS", "CLVR_PROGRAMS_GIB"
"""Environment variables: the directory of the programs, or "off"; the most GiB that they may take."""

DEFAULT_GIB = 8.0

_active: ProgramStore | None = None


def active_store() -> ProgramStore | None:
    """Returns the store of this process, None if programs are not stored."""
    return _active


def enable_program_store() -> ProgramStore | None:
    """Lets this process store its programs on disk, and read those of earlier processes.

    They are stored beside the compilation cache: in `programs/` of `JAX_COMPILATION_CACHE_DIR`, else of clvr-jax in the
    user's cache directory. The variable CLVR_PROGRAMS names another directory, or is "off"; CLVR_PROGRAMS_GIB is how
    many GiB they may take, 8 if not given.
    Returns: the store; None if it is off or no directory can be written, which is no error.
    Raises: UsageError for a CLVR_PROGRAMS_GIB that is not a positive number.
    """
    global _active
    _active = None
    limit, given = max_bytes(), os.environ.get(DIRECTORY, "")
    if given.lower() == "off":
        return None
    try:
        beside = os.environ.get("JAX_COMPILATION_CACHE_DIR")
        default = Path(beside) if beside else user_cache() / "clvr-jax"
        store = ProgramStore(Path(given).absolute() if given else default.absolute() / "programs", limit)
    except RuntimeError:  # no home directory
        return None
    _active = store if "://" not in (given or beside or "") and store.prepare() else None
    return _active


def max_bytes() -> int:
    """Returns the limit in bytes. Raises: UsageError for a value that is not a positive number of GiB."""
    text = os.environ.get(GIB, "")
    try:
        number = float(text) if text else DEFAULT_GIB
    except ValueError:
        number = math.nan
    if not 0 < number < 2**20:
        raise UsageError(f"{GIB} is {text!r}: give a positive number of GiB, such as 8")
    return int(number * 2**30)


@contextlib.contextmanager
def programs_in(directory: Path) -> Iterator[None]:
    """Keeps programs in a directory as well, inside the context, where the process stores programs at all.

    Then a run finds its programs again on another machine. What the process's own store has is copied from there.
    Programs of several processes are not stored: JAX's compilation cache keeps those in `xla/` of the directory, unless
    JAX_COMPILATION_CACHE_DIR names another one. They are traced again, but not compiled.
    """
    if _active is None:
        yield
    elif not is_distributed():
        store = ProgramStore(directory.absolute(), _active.max_bytes, _active)
        with program_store(store if store.prepare() else _active):
            yield
    elif "JAX_COMPILATION_CACHE_DIR" in os.environ:
        yield
    else:
        with compilation_cache(directory.absolute() / "xla"):
            yield


@contextlib.contextmanager
def program_store(store: ProgramStore | None) -> Iterator[None]:
    """Uses a store inside the context; None stores nothing."""
    global _active
    before, _active = _active, store
    try:
        yield
    finally:
        _active = before
