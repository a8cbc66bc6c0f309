"""Many callers, one batch: what is faster together is gathered for a moment."""

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
    """A function of many requests, called with one at a time from many threads.

    Requests that arrive within `wait` seconds of the first, or while the last batch runs, share a call. It runs in a
    thread of its own, so what a caller sets for its own thread (`jax.default_device`, say) does not reach it. Each
    caller gets its own result or its own exception: a batch that fails is done again one request at a time, so nobody
    suffers from another's request.

    Args:
      function: requests -> as many results, in order. The result for a request must not depend on the others; then
        neither does what a caller gets.
      max_batch: most requests of one call.
      wait: seconds for which the first request waits for company.
    """

    def __init__(self, function: Callable[[Sequence[Request]], Sequence[Result]], max_batch: int, wait: float = 0.005):
        if max_batch < 1 or wait < 0:
            raise UsageError(f"gathering: max_batch must be at least 1 and wait at least 0, got {max_batch} and {wait}")
        self._function, self._max_batch, self._wait = function, max_batch, wait
        self._waiting: deque[tuple[Request, Future[Result], float]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # A daemon: a program that ends without close() is not held up by it.
        self._thread = threading.Thread(target=self._work, name="gathered", daemon=True)
        self._thread.start()

    def __call__(self, request: Request) -> Result:
        """The function's result for this request. Raises: what the function raised for it; ClvrError once closed."""
        future: Future[Result] = Future()
        with self._changed:
            if self._closed:
                raise ClvrError("this provider is closed; make a new one")
            self._waiting.append((request, future, time.monotonic()))
            self._changed.notify()
        return future.result()

    def close(self) -> None:
        """Takes no more requests, and returns when those that wait are answered. May be called again."""
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
        """The oldest requests; none once everything is done and closed."""
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
        except BaseException as error:  # noqa: BLE001 - whatever it is, someone waits for it
            if len(requests) == 1:
                return [(None, error)]
        return [outcome for request in requests for outcome in self._outcomes([request])]
