"""Compiled programs: kept on disk, so that the second run of a command starts at once, and bounded in memory."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_MAPS, _MAX_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
_counted = float("-inf")
"""The time of the last count of maps."""

_cache_setting = threading.RLock()
_drops: list[Callable[[], None]] = []


def enable_compilation_cache() -> Path | None:
    """Turns on JAX's persistent compilation cache.

    It is stored in the user's cache directory (`$XDG_CACHE_HOME`, else `~/.cache`) and holds every program, so that a
    second start of the same command compiles nothing; JAX's environment variables override both.
    Returns: the directory, or None if it cannot be written: then every process compiles for itself, which is no error.
    """
    import jax  # here, so that programs without JAX can use `user_cache`

    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    try:
        directory = Path(given) if given else user_cache() / "clvr-jax" / "xla"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return None
    if not os.access(directory, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX's default, 1 second, leaves out most programs of small models: about half of those of `clvr generate`.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return directory


@contextmanager
def compilation_cache(directory: Path) -> Iterator[None]:
    """Uses another directory as JAX's persistent compilation cache inside the context."""
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    with _cache_setting:
        before = jax.config.values["jax_compilation_cache_dir"]
        jax.config.update("jax_compilation_cache_dir", str(directory))
        reset_cache()
    try:
        yield
    finally:
        with _cache_setting:
            jax.config.update("jax_compilation_cache_dir", before)
            reset_cache()


@contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Compiles without the persistent cache.

    It cannot read a program for devices that are not there, and what it has read for a CPU cannot be serialized again.
    """
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    with _cache_setting:  # two threads would restore each other's setting
        before = jax.config.values["jax_enable_compilation_cache"]
        try:
            jax.config.update("jax_enable_compilation_cache", False)
            reset_cache()  # JAX looks at the setting once, before its first program
            yield
        finally:
            jax.config.update("jax_enable_compilation_cache", before)
            reset_cache()


def drop_with_caches(drop: Callable[[], None]) -> None:
    """Lets `release_programs` call a function that drops further programs."""
    _drops.append(drop)


def release_programs(
    share: float = 0.7, maps: Path = _MAPS, limit: Path = _MAX_MAPS, interval_seconds: float = 0.0
) -> bool:
    """Drops all compiled programs if they take most of the memory maps that Linux allows a process.

    A program for a CPU takes about 60 maps. A loop over many prompts compiles hundreds of programs, for batches and
    histories of many sizes, and beyond the limit LLVM ends the process. Programs that are used again are compiled
    again, or read from the cache on disk.

    Args:
      share: of the limit, at which programs are dropped.
      maps, limit: files of the kernel; without them nothing is dropped.
      interval_seconds: do nothing if the maps were counted less than this long ago, since that takes 1 ms per 1,000
        maps. About 60 programs are read from the cache on disk in 2 seconds.
    Returns: whether programs were dropped.
    """
    global _counted
    if time.monotonic() - _counted < interval_seconds:
        return False
    _counted = time.monotonic()
    import jax

    try:
        with maps.open("rb") as lines:
            count = sum(1 for _ in lines)
        if count < share * int(limit.read_text()):
            return False
    except (OSError, ValueError):
        return False
    jax.clear_caches()
    for drop in _drops:
        drop()
    return True


def user_cache() -> Path:
    """Returns the user's cache directory. Raises: RuntimeError if the user has no home directory."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG standard requires that a relative path is ignored.
    return Path(given) if os.path.isabs(given) else Path.home() / ".cache"
