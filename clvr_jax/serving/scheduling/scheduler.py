"""The scheduler: one device thread performs the works of many jobs in shared batches.

Threads of the server only submit jobs and request stops. The device thread asks each job for its next tasks, collects
tasks of one key from all jobs, performs them in one call, and asks again. Only it calls models and changes jobs.

A program of a small model uses one core of a CPU. There a batch can be performed as several calls at the same time, on
threads for which the device thread waits. All tasks of a job are in one of them, so one thread at a time changes a job.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

from clvr_jax.errors import ClvrError
from clvr_jax.serving.scheduling.futures import deliver, deliver_error
from clvr_jax.serving.scheduling.limits import Limits
from clvr_jax.serving.scheduling.metrics import Metrics
from clvr_jax.serving.scheduling.queues import GroupQueues

_log = logging.getLogger("clvr.serving")


class QueueFullError(ClvrError):
    """The queue is full. seconds: after which a client may try again."""

    def __init__(self, waiting: int, seconds: int):
        super().__init__(f"{waiting} requests are waiting already, the limit of this server; try again in {seconds} s")
        self.seconds = seconds


class EndedError(ClvrError):
    """A job that has ended cannot be changed any more."""


class DrainingError(ClvrError):
    """The server is shutting down and takes no further jobs."""


@dataclass(frozen=True)
class Task:
    """A work of a job. Tasks with equal keys can share a batch."""

    key: Hashable
    job: Job
    work: Any


def split_by_job(tasks: Sequence[Task], parts: int, least: int = 1) -> list[list[Task]]:
    """Splits a batch into parts that are performed at the same time.

    Args:
      tasks: at least one; those of one job stay together.
      parts: maximum number of parts.
      least: tasks in a part, on average; fewer parts are made of a smaller batch.
    Returns: parts of similar size, none of them empty.
    """
    by_job: dict[str, list[Task]] = {}
    for task in tasks:
        by_job.setdefault(task.job.id, []).append(task)
    found: list[list[Task]] = [[] for _ in range(max(1, min(parts, len(by_job), len(tasks) // least)))]
    for own in by_job.values():
        min(found, key=len).extend(own)
    return found


class Job(Protocol):
    """What the scheduler runs. All methods are called by the device thread, or by one for which it waits."""

    id: str

    def tasks(self, elapsed: float) -> Sequence[Task]:
        """Returns the next tasks, `elapsed` seconds after the job started; none once it has ended."""
        ...

    def receive(self, work: Any, result: Any, seconds: float) -> None:
        """Stores the result of one of its works, which took `seconds`."""
        ...

    def progress(self, work: Any, done: int, steps: int) -> None:
        """Receives the number of denoising steps that are done while one of its generations is performed."""
        ...

    def stop(self, outcome: str) -> None:
        """Ends the job early; `tasks` returns none afterwards."""
        ...

    def end(self) -> None:
        """Delivers the result."""
        ...

    def fail(self, error: BaseException) -> None:
        """Delivers an error in place of the result."""
        ...


@dataclass
class _Running:
    job: Job
    started: float
    remaining: int = 0


class Scheduler:
    """Runs jobs on its own thread.

    Args:
      perform: (key, tasks, is_stopping) performs the tasks, all of this key; it may raise, and then must have changed
        no job. It returns the tasks that it did not perform, because is_stopping(job) became true or for another
        reason; their jobs are stopped, or asked for their tasks again.
      limits: of running and waiting jobs, and of batches.
      metrics: to count in.
      prepare: called by the device thread before the first job, to compile programs.
    """

    def __init__(
        self,
        perform: Callable[[Any, Sequence[Task], Callable[[Job], bool]], Sequence[Task]],
        limits: Limits,
        metrics: Metrics,
        prepare: Callable[[], None] = lambda: None,
    ):
        self._perform, self._limits, self._metrics, self._prepare = perform, limits, metrics, prepare
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Job, float]] = deque()
        self._running: dict[str, _Running] = {}
        self._queues: GroupQueues[Task] = GroupQueues(limits.max_batch)
        self._stops: dict[str, tuple[Job, str]] = {}
        self._changes: deque[tuple[Job, Callable[[], None], Future[None]]] = deque()
        self._is_draining = self._is_ending = False
        self._average_seconds = 1.0
        self.is_ready = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="clvr-device", daemon=True)
        self._calls = ThreadPoolExecutor(limits.concurrent_calls, "clvr-call")  # starts no thread before it is used

    def start(self) -> None:
        """Starts the device thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the device thread runs."""
        return self._thread.is_alive()

    @property
    def is_full(self) -> bool:
        """Whether a further job would be refused."""
        return self._is_draining or len(self._waiting) >= self._limits.max_queue

    @property
    def num_startable(self) -> int:
        """Number of further jobs that would not have to wait."""
        if not self.is_ready or self._is_draining:
            return 0
        return max(0, self._limits.max_running - len(self._running) - len(self._waiting))

    def check_room(self, count: int) -> None:
        """Raises QueueFullError or DrainingError if this many jobs would not be accepted now."""
        with self._changed:
            if self._is_draining or not self._thread.is_alive():
                raise DrainingError("the server is shutting down; try again later")
            free = max(0, self._limits.max_running - len(self._running)) if self.is_ready else 0
            if len(self._waiting) + count > self._limits.max_queue + free:
                raise QueueFullError(len(self._waiting), self._retry_seconds())

    def submit(self, jobs: Sequence[Job]) -> None:
        """Adds jobs to the queue, all or none. Raises: QueueFullError; DrainingError."""
        with self._changed:
            self.check_room(len(jobs))
            now = time.monotonic()
            self._waiting.extend((job, now) for job in jobs)
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify_all()

    def stop(self, job: Job, outcome: str) -> None:
        """Requests that a job ends before its next work or denoising step; does nothing if it has ended."""
        with self._changed:
            self._stops[job.id] = job, outcome
            self._changed.notify_all()

    def is_stopping(self, job: Job) -> bool:
        """Whether a stop of this job was requested and has not taken effect yet."""
        return job.id in self._stops

    def change(self, job: Job, function: Callable[[], None]) -> Future[None]:
        """Requests that the device thread changes a job between two works, and asks it for its next tasks then.

        Args:
          job: that was submitted.
          function: changes it. If it raises, it must have changed nothing.
        Returns: done when the change is made; with the exception of the function, or EndedError if the job has ended.
        """
        done: Future[None] = Future()
        with self._changed:
            if self.is_alive and not self._is_ending:
                self._changes.append((job, function, done))
                self._changed.notify_all()
            else:
                deliver_error(done, EndedError("the server is shutting down"))
        return done

    def position(self, job: Job) -> int | None:
        """Returns the number of jobs that wait before this one; None if it does not wait."""
        with self._changed:
            return next((index for index, (each, _) in enumerate(self._waiting) if each is job), None)

    def drain(self, seconds: float, outcome: str) -> None:
        """Refuses further jobs, lets running ones continue for some seconds, stops the rest, and ends the thread.

        Args:
          seconds: for the running jobs; waiting ones are stopped at once.
          outcome: of stopped jobs.
        """
        with self._changed:
            self._is_draining = True
            self._stops |= {job.id: (job, outcome) for job, _ in self._waiting}
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._running and not self._waiting, seconds)
            self._stops |= {run.job.id: (run.job, outcome) for run in self._running.values()}
            self._is_ending = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(seconds + 60)  # a batch that runs cannot be interrupted

    def _main(self) -> None:
        try:
            self._prepare()
            with self._changed:
                self.is_ready = True
            while (batch := self._next_batch()) is not None:
                key, tasks = batch
                began = time.monotonic()
                parts = split_by_job(tasks, self._limits.concurrent_calls, self._limits.image_rows)
                self._perform_parts(key, parts)
                seconds = time.monotonic() - began
                self._metrics.observe_batch(key, [len(part) for part in parts], seconds)
        except BaseException as error:
            self.failure = error
            _log.exception("the device thread failed")
            raise
        finally:
            self._calls.shutdown(wait=False)
            self._fail_all()

    def _next_batch(self) -> tuple[Any, list[Task]] | None:
        """Returns the next batch as soon as there is one; None at the end of the server."""
        while True:
            with self._changed:
                stops, self._stops = self._stops, {}
                for job, outcome in stops.values():
                    self._stop(job, outcome)
                while self._changes:
                    self._change(*self._changes.popleft())
                while self._waiting and len(self._running) < self._limits.max_running:
                    self._start(*self._waiting.popleft())
                self._metrics.waiting.set(len(self._waiting))
                now = time.monotonic()
                if batch := self._queues.next_batch(now):
                    return batch
                if self._is_ending and not self._running and not self._waiting:
                    return None
                if not self._stops and not self._changes:
                    self._changed.wait(self._queues.seconds_until_ready(now))

    def _start(self, job: Job, arrived: float) -> None:
        now = time.monotonic()
        self._metrics.queue_seconds.observe(now - arrived)
        self._running[job.id] = _Running(job, now)
        self._metrics.running.set(len(self._running))
        self._advance(self._running[job.id], self._limits.window_seconds)

    def _stop(self, job: Job, outcome: str) -> None:
        run = self._running.get(job.id)
        waiting = next((entry for entry in self._waiting if entry[0] is job), None)
        if run is None and waiting is None:
            return
        if waiting is not None:
            self._waiting.remove(waiting)
            run = self._running[job.id] = _Running(job, time.monotonic())
        assert run is not None
        self._queues.remove(lambda task: task.job is job)
        run.remaining = 0
        job.stop(outcome)
        self._advance(run)

    def _change(self, job: Job, function: Callable[[], None], done: Future[None]) -> None:
        """Changes a job; the tasks that it has not begun are replaced by those that it asks for then."""
        run = self._running.get(job.id)
        if run is None and not any(each is job for each, _ in self._waiting):
            deliver_error(done, EndedError("the loop has ended already"))
            return
        try:
            function()
        except Exception as error:  # noqa: BLE001 - of the one who asked for the change
            deliver_error(done, error)
            return
        if run is not None:
            self._queues.remove(lambda task: task.job is job)
            run.remaining = 0
            self._advance(run)
        deliver(done, None)

    def _advance(self, run: _Running, window: float = 0.0) -> None:
        """Queues the next tasks of a job, or ends it.

        Args:
          run: the job.
          window: seconds that its tasks wait for others. Only new jobs wait, because others arrive with them; while a
            job runs, all others that run are queued whenever the device is free.
        """
        now = time.monotonic()
        try:
            tasks = run.job.tasks(now - run.started)
            if not tasks:
                run.job.end()
        except Exception as error:  # noqa: BLE001 - of one job, which the others must survive
            self._end(run, error)
            return
        if not tasks:
            self._end(run)
        run.remaining = len(tasks)
        for task in tasks:
            self._queues.add(task.key, task, now + window)

    def _end(self, run: _Running, error: BaseException | None = None) -> None:
        if error is not None:
            self._queues.remove(lambda task: task.job is run.job)
            run.job.fail(error)
        self._running.pop(run.job.id, None)
        self._average_seconds = 0.8 * self._average_seconds + 0.2 * (time.monotonic() - run.started)
        self._metrics.running.set(len(self._running))
        self._changed.notify_all()

    def _perform_parts(self, key: Any, parts: Sequence[Sequence[Task]]) -> None:
        """Performs the parts of a batch at the same time."""
        if len(parts) == 1:
            self._perform_safely(key, parts[0])
            return
        calls = [self._calls.submit(self._perform_safely, key, part) for part in parts]
        wait(calls)
        for call in calls:
            call.result()  # raises what is no error of a request

    def _perform_safely(self, key: Any, tasks: Sequence[Task]) -> None:
        """Performs a batch; if it fails, each task by itself, so that one request does not spoil the others."""
        try:
            undone = self._perform(key, tasks, self.is_stopping)
        except Exception as error:  # noqa: BLE001 - of one request, which the others must survive
            if len(tasks) > 1:
                for task in tasks:
                    self._perform_safely(key, [task])
                return
            if not isinstance(error, ClvrError):
                _log.exception("job %s: %s", tasks[0].job.id, key)
            with self._changed:
                run = self._running.get(tasks[0].job.id)
                if run is not None:
                    self._end(run, error)
            return
        with self._changed:
            for task in undone:
                if task.job.id in self._stops:  # only once for several tasks of one job
                    self._stop(*self._stops.pop(task.job.id))
            for task in tasks:
                run = self._running.get(task.job.id)
                if run is not None:  # None if it was stopped, or if another task of the same job failed
                    run.remaining -= 1
                    if run.remaining == 0:
                        self._advance(run)

    def _retry_seconds(self) -> int:
        """Estimates the seconds until a place in the queue is free."""
        return min(600, max(1, math.ceil(self._average_seconds)))

    def _fail_all(self) -> None:
        """Fails the jobs that are left when the device thread ends, so that no client waits forever."""
        with self._changed:
            self._is_draining = self._is_ending = True
            error = self.failure or ClvrError("the server is shutting down")
            jobs = [run.job for run in self._running.values()] + [job for job, _ in self._waiting]
            self._running.clear()
            self._waiting.clear()
            for job in jobs:
                job.fail(error)
            while self._changes:
                deliver_error(self._changes.popleft()[2], EndedError(str(error)))
            self._changed.notify_all()
