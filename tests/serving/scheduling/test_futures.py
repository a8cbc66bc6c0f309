"""A result for a client that has left is dropped; it must not end the thread that delivers it."""

from concurrent.futures import CancelledError, Future

import pytest

from clvr_jax.serving.scheduling.futures import deliver, deliver_error


def test_a_canceled_future_takes_neither_result_nor_error():
    future = Future()
    future.cancel()
    deliver(future, 1)
    deliver_error(future, ValueError("late"))
    with pytest.raises(CancelledError):
        future.result(0)


def test_the_first_result_stays():
    future = Future()
    deliver(future, 1)
    deliver_error(future, ValueError("late"))
    assert future.result(0) == 1
