"""Results for waiting clients, who may have left: then their future is canceled, and nobody reads the result."""

import contextlib
from concurrent.futures import Future, InvalidStateError
from typing import TypeVar

Value = TypeVar("Value")


def deliver(future: Future[Value], result: Value) -> None:
    """Sets the result of a future, unless it has one or was canceled."""
    with contextlib.suppress(InvalidStateError):
        future.set_result(result)


def deliver_error(future: Future[Value], error: BaseException) -> None:
    """Sets the exception of a future, unless it has a result or was canceled."""
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)
