"""Several processes that run one program: one of them decides for all, and an error of one is an error of all."""

import json
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from clvr_jax.errors import ClvrError, UsageError

Value = TypeVar("Value")


def is_distributed() -> bool:
    """Returns whether this process has joined others. A process that has not imported JAX has not."""
    jax: ModuleType | None = sys.modules.get(
        "jax"
    )  # commands check their arguments before they import JAX, which takes a second
    # `process_count` would look for the devices of a process that has not joined others.
    return jax is not None and bool(jax.distributed.is_initialized() and jax.process_count() > 1)


def is_host0() -> bool:
    """Returns whether this process writes files and prints results for all: process 0, or the only one."""
    if not is_distributed():
        return True
    import jax

    return jax.process_index() == 0


def broadcast_from_host0(make: Callable[[], Value]) -> Value:
    """Returns a JSON value that process 0 makes on every process; all processes must call it.

    Raises: ClvrError or UsageError on every process, if it was raised in process 0.
    """
    if not is_distributed():
        return make()
    from jax.experimental import multihost_utils

    message = _outcome(make) if is_host0() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    bytes_n = multihost_utils.broadcast_one_to_all(np.frombuffer(message or bytes(size), np.uint8))
    made: Value = _result(np.asarray(bytes_n).tobytes())
    return made


def broadcast_decision(decision: bool) -> bool:
    """Returns process 0's decision on every process: clocks differ, and all processes must begin a save together."""
    if not is_distributed():
        return decision
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(decision)))


def broadcast_seconds() -> float:
    """Returns the monotonic clock of process 0 in seconds; all processes must call it equally often."""
    return float(broadcast_from_host0(time.monotonic))


def run_on_all(run: Callable[[], Value]) -> Value:
    """Returns `run()` of this process; an error of one process is raised on all of them, which would wait for it.

    All processes must call it, and `run` must not wait for other processes.
    Raises: ClvrError or UsageError, that of the first process that has one.
    """
    if not is_distributed():
        return run()
    from jax.experimental import multihost_utils

    made: list[Value] = []
    message = _outcome(lambda: made.append(run()))
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(message)))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    for size, row in zip(sizes, np.asarray(multihost_utils.process_allgather(padded)), strict=True):
        _result(row[:size].tobytes())
    return made[0]


def check_same(what: str, digest: str) -> None:
    """Checks that all processes have the same input; all processes must call it.

    Args:
      what: names the input in the error.
      digest: of the input.
    Raises: UsageError on all processes if one differs from process 0.
    """
    if not is_distributed():
        return
    expected = broadcast_from_host0(lambda: digest)

    def compare() -> None:
        if digest != expected:
            import jax

            raise UsageError(
                f"process {jax.process_index()} has other {what} than process 0; start all with the same arguments and "
                "files"
            )

    run_on_all(compare)


def _outcome(make: Callable[[], object]) -> bytes:
    """Returns the JSON value that a function makes, or its error, as bytes."""
    try:
        found: dict[str, object] = {"made": make()}
    except UsageError as error:
        found = {"usage": str(error)}
    except ClvrError as error:
        found = {"failed": str(error)}
    return json.dumps(found).encode()


def _result(message: bytes) -> Any:
    """Returns the value of `_outcome`, or raises its error."""
    found = json.loads(message)
    if "usage" in found:
        raise UsageError(found["usage"])
    if "failed" in found:
        raise ClvrError(found["failed"])
    return found["made"]
