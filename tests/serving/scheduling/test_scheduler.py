"""The scheduler with jobs of one work each, and a device that performs only part of a batch."""

import threading
from concurrent.futures import Future

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.serving.models import StageKey
from clvr_jax.serving.scheduling.limits import Limits
from clvr_jax.serving.scheduling.metrics import Metrics
from clvr_jax.serving.scheduling.scheduler import Scheduler, Task


class OneWork:
    """A job of one work. result: "done", or how it was stopped. asked: how often it was asked for its tasks."""

    def __init__(self, name):
        self.id, self.result, self.asked, self._outcome = name, Future(), 0, None

    def tasks(self, elapsed):
        self.asked += 1
        return [] if self._outcome else [Task(StageKey("verify"), self, self.id)]

    def receive(self, work, result, seconds):
        self._outcome = result

    def stop(self, outcome):
        self._outcome = outcome

    def end(self):
        self.result.set_result(self._outcome)

    def fail(self, error):
        self.result.set_exception(error)


@pytest.fixture
def run():
    """Runs jobs, submitted together, on a device that performs batches by a function."""
    schedulers = []

    def start(perform, *names):
        scheduler = Scheduler(perform, Limits(window_seconds=0.02), Metrics())
        schedulers.append(scheduler)
        jobs = [OneWork(name) for name in names]
        scheduler.start()
        scheduler.submit(jobs)
        return scheduler, jobs

    yield start
    for scheduler in schedulers:
        scheduler.drain(0, "interrupted")


def done(task):
    task.job.receive(task.work, "done", 0.0)


def test_a_task_that_was_not_performed_is_performed_later(run):
    batches = []

    def perform(key, tasks, is_stopping):
        batches.append([task.work for task in tasks])
        done(tasks[0])
        return tasks[1:]

    _, jobs = run(perform, "a", "b", "c")
    assert [job.result.result(60) for job in jobs] == ["done"] * 3
    assert batches == [["a", "b", "c"], ["b", "c"], ["c"]]


def test_a_failure_after_others_have_succeeded_fails_one_job_only(run):
    def perform(key, tasks, is_stopping):
        for number, task in enumerate(tasks):
            if task.work == "bad":
                if number == 0:
                    raise ClvrError("bad")
                return tasks[number:]
            done(task)
        return []

    _, (first, bad, last) = run(perform, "first", "bad", "last")
    assert (first.result.result(60), last.result.result(60)) == ("done", "done")
    with pytest.raises(ClvrError, match="bad"):
        bad.result.result(60)


def test_a_job_that_is_stopped_while_it_is_performed_is_not_asked_for_its_work_again(run):
    begun, stopped = threading.Event(), threading.Event()

    def perform(key, tasks, is_stopping):
        begun.set()
        assert stopped.wait(60)
        unwanted = [task for task in tasks if is_stopping(task.job)]
        for task in tasks:
            if task not in unwanted:
                done(task)
        return unwanted

    scheduler, (kept, unwanted) = run(perform, "kept", "unwanted")
    assert begun.wait(60)
    scheduler.stop(unwanted, "canceled")
    stopped.set()
    assert (kept.result.result(60), unwanted.result.result(60)) == ("done", "canceled")
    assert unwanted.asked == 2, "at first, and once it was stopped"
    assert not scheduler.is_stopping(unwanted)
