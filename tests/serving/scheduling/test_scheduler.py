"""The scheduler with jobs of one work each, and a device that performs only part of a batch."""

import threading
from concurrent.futures import Future

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.serving.models import StageKey
from clvr_jax.serving.scheduling.limits import Limits
from clvr_jax.serving.scheduling.metrics import Metrics
from clvr_jax.serving.scheduling.scheduler import Scheduler, Task, split_by_job
from tests.serving.conftest import wait_until


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

    def start(perform, *names, **limits):
        scheduler = Scheduler(perform, Limits(window_seconds=0.02, **limits), Metrics())
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


def test_the_parts_of_a_batch_are_performed_at_the_same_time(run):
    both, threads = threading.Barrier(2), {}

    def perform(key, tasks, is_stopping):
        both.wait(60)  # one call after the other would wait in vain
        threads.update({task.work: threading.get_ident() for task in tasks})
        for task in tasks:
            done(task)
        return []

    scheduler, jobs = run(perform, *"abcde", concurrent_calls=2)
    assert [job.result.result(60) for job in jobs] == ["done"] * 5
    assert len(set(threads.values())) == 2
    # A batch is counted once all its jobs have their results. Calls of 3 and 2 works compute 4 and 2 rows.
    wait_until(lambda: 'clvr_rows_total{stage="verify"} 6.0' in scheduler._metrics.text().decode())
    assert 'clvr_batch_size_sum{stage="verify"} 5.0' in scheduler._metrics.text().decode()


def test_a_part_that_fails_leaves_the_others_and_fails_its_bad_job_only(run):
    def perform(key, tasks, is_stopping):
        if any(task.work == "bad" for task in tasks):
            raise ClvrError("bad")
        for task in tasks:
            done(task)
        return []

    _, (bad, *others) = run(perform, "bad", "b", "c", "d", concurrent_calls=2)
    assert [job.result.result(60) for job in others] == ["done"] * 3
    with pytest.raises(ClvrError, match="bad"):
        bad.result.result(60)


def test_a_job_stays_in_one_part_and_small_batches_are_not_split():
    first, second, third = (OneWork(name) for name in "abc")
    tasks = [Task(None, job, number) for number, job in enumerate((first, first, second, first, third))]
    parts = split_by_job(tasks, 2)
    assert [[task.job.id for task in part] for part in parts] == [["a", "a", "a"], ["b", "c"]]
    assert len(split_by_job(tasks, 8)) == 3, "there are three jobs"
    assert split_by_job(tasks, 2, least=4) == [[tasks[0], tasks[1], tasks[3], tasks[2], tasks[4]]]
    assert split_by_job(tasks[:1], 4, least=8) == [tasks[:1]]
