"""Results of tracing other than programs, which are stored beside them."""

import logging
import pickle
from collections.abc import Callable
from typing import TypeVar

from clvr_jax.programs.environment import process, sources
from clvr_jax.programs.fingerprint import NotStorableError, fingerprint
from clvr_jax.programs.settings import active_store

_log = logging.getLogger("clvr.programs")

Value = TypeVar("Value")


def stored_value(make: Callable[[], Value], *depends_on: object) -> Value:
    """Returns `make()`, or what an earlier process has made with the same versions and the same source.

    Args:
      make: makes a value that can be pickled.
      depends_on: everything else that the value depends on.
    """
    store = active_store()
    if store is None:
        return make()
    try:
        key = fingerprint("value", process(), sources(), depends_on)
    except NotStorableError as error:
        _log.info("a value is not stored: %s", error)
        return make()
    if (stored := store.read_key(key)) is not None:
        try:
            value: Value = pickle.loads(stored)  # noqa: S301 - a file that only this user can write, see `store`
        except Exception as error:  # noqa: BLE001 - whatever an old or damaged pickle raises
            store.discard(key, f"cannot be read ({type(error).__name__})")
        else:
            return value
    made = make()
    try:
        store.write_key(key, pickle.dumps(made))
    except Exception as error:  # noqa: BLE001 - of any part of the value
        _log.info("a value cannot be stored: %s", error)
    return made
