"""Dynamic batching: requests of many threads are collected for a short time and computed in one call."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, Self, TypeVar

from clvr_jax.errors import ClvrError, UsageError

Request = TypeVar("Request")
Result = TypeVar("Result")


class DynamicBatcher(Generic[Request, Result]):
    """Collects requests of many threads and calls a function with batches of them.

    Requests that arrive within `wait` seconds of the first, or while the previous batch runs, share a call. The
    function runs in its own thread, where settings of a caller's thread such as `jax.default_device` do not apply. Each
    caller receives its own result or exception: a batch that fails is computed again one request at a time.

    Args:
      function: requests -> results in the same order. The result for a request must not depend on the others.
      max_batch: maximum number of requests in one call.
      wait: seconds that the first request waits for others.
    """

    def __init__(self, function: Callable[[Sequence[Request]], Sequence[Result]], max_batch: int, wait: float = 0.005):
        if max_batch < 1 or wait < 0:
            raise UsageError(f"batching: max_batch must be at least 1 and wait at least 0, got {max_batch} and {wait}")
        self._function, self._max_batch, self._wait = function, max_batch, wait
        self._waiting: deque[tuple[Request, Future[Result], float]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # A daemon, so that a program can end without close().
        self._thread = threading.Thread(target=self._work, name="dynamic-batcher", daemon=True)
        self._thread.start()

    def __call__(self, request: Request) -> Result:
        """Returns the function's result for a request. Raises: the function's exception; ClvrError if closed."""
        future: Future[Result] = Future()
        with self._changed:
            if self._closed:
                raise ClvrError("this provider is closed; make a new one")
            self._waiting.append((request, future, time.monotonic()))
            self._changed.notify()
        return future.result()

    def close(self) -> None:
        """Refuses further requests, and returns when all waiting ones are complete. May be called again."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while batch := self._next_batch():
            requests = [request for request, _, _ in batch]
            outcomes = self._outcomes(requests)
            for (_, future, _), (result, error) in zip(batch, outcomes, strict=True):
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(result)

    def _next_batch(self) -> list[tuple[Request, Future[Result], float]]:
        """Returns the oldest requests; [] if there are none and the batcher is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._waiting:
                left = self._waiting[0][2] + self._wait - time.monotonic()
                self._changed.wait_for(lambda: len(self._waiting) >= self._max_batch or self._closed, max(0.0, left))
            return [self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))]

    def _outcomes(self, requests: list[Request]) -> list[tuple[Any, BaseException | None]]:
        try:
            results = self._function(requests)
            if len(results) != len(requests):
                raise ClvrError(f"a batch of {len(requests)} requests came back with {len(results)} results")
            return [(result, None) for result in results]
        except BaseException as error:  # noqa: BLE001 - every exception is passed to the waiting caller
            if len(requests) == 1:
                return [(None, error)]
        return [outcome for request in requests for outcome in self._outcomes([request])]
