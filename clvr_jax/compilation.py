"""Compiled programs that outlive the process, so that the second run of a command starts at once."""

import os
from pathlib import Path

import jax


def keep_compiled_programs() -> Path | None:
    """Turns on JAX's persistent compilation cache.

    It is stored in the user's cache directory (`$XDG_CACHE_HOME`, else `~/.cache`), and holds programs that take at
    least 0.3 seconds to compile; JAX's environment variables override both.
    Returns: the directory, or None if it cannot be written: then every process compiles for itself, which is no error.
    """
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    try:
        folder = Path(given) if given else user_cache() / "clvr-jax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    return folder


def user_cache() -> Path:
    """The folder for what can be made again. Raises: RuntimeError if the user has no home folder."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The standard says that a relative path is to be ignored.
    return Path(named) if os.path.isabs(named) else Path.home() / ".cache"
