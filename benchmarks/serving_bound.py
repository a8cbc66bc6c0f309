"""The bound of a server: loops per second of its models when every call is full and nothing else takes time.

Loops are run one after the other, and their works are recorded. Then the works are performed again, those of one key
in batches of a given size, as the server performs them, without requests, queues and waiting.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
from clvr_jax.serving.event_log import EventLog
from clvr_jax.serving.jobs import LoopJob, LoopSpec
from clvr_jax.serving.models import ServedModels, check_calls
from clvr_jax.serving.scheduling.scheduler import Task, split_by_job


class Seconds(NamedTuple):
    """Wall seconds, and processor seconds of all threads."""

    wall: float = 0.0
    cpu: float = 0.0

    def plus(self, other: "Seconds") -> "Seconds":
        """Returns the sum."""
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)


class _Sink:
    """A job of one recorded work, whose result is dropped."""

    def __init__(self, name: str):
        self.id = name

    def tasks(self, elapsed: float) -> Sequence[Task]:
        return ()

    def receive(self, work: Any, result: Any, seconds: float) -> None:
        pass

    def progress(self, work: Any, done: int, steps: int) -> None:
        pass

    def stop(self, outcome: str) -> None:
        pass

    def end(self) -> None:
        pass

    def fail(self, error: BaseException) -> None:
        raise error


def device_bound(model: str, specs: Sequence[LoopSpec], sizes: Sequence[int] = (1, 8)) -> None:
    """Prints the seconds of each stage by the size of its batches, and specs per second of all stages together."""
    pipeline = ClosedLoopPipeline.from_pretrained(model)
    models, calls = ServedModels(pipeline, model), check_calls(pipeline, None)
    recorded = _record(models, specs)
    totals: dict[int, Seconds] = {}
    with ThreadPoolExecutor(calls) as pool:
        for size in sizes:
            for is_measured in (False, True):  # the first time compiles
                by_stage: dict[str, Seconds] = defaultdict(Seconds)
                for key, works in recorded.items():
                    taken = _timed(partial(_replay, models, key, works, size, calls, pool))
                    by_stage[key.stage] = by_stage[key.stage].plus(taken)
                if is_measured:
                    _print(recorded, by_stage, size)
            totals[size] = Seconds(*map(sum, zip(*by_stage.values(), strict=True)))
    single, full = totals[sizes[0]].wall, totals[sizes[-1]].wall
    print(
        f"models alone, {calls} calls at the same time: {len(specs) / single:.2f} per second in batches of {sizes[0]}, "
        f"{len(specs) / full:.2f} in batches of {sizes[-1]}, {single / full:.2f}x",
        flush=True,
    )


def _record(models: ServedModels, specs: Sequence[LoopSpec]) -> dict[Any, list[Task]]:
    """Runs each loop by itself; returns all works by key, as tasks of jobs that drop their results."""
    found: dict[Any, list[Task]] = defaultdict(list)
    for spec in specs:
        job = LoopJob(spec, models, EventLog(None), lambda *_: None)
        while tasks := job.tasks(0.0):
            for task in tasks:
                found[task.key].append(Task(task.key, _Sink(str(len(found[task.key]))), task.work))
                models.perform(task.key, [task])
    return found


def _replay(
    models: ServedModels, key: Any, works: Sequence[Task], size: int, calls: int, pool: ThreadPoolExecutor
) -> None:
    for start in range(0, len(works), size):
        parts = split_by_job(works[start : start + size], calls)
        list(pool.map(lambda part: models.perform(key, part), parts))


def _timed(call: Callable[[], None]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def _print(recorded: dict[Any, list[Task]], by_stage: dict[str, Seconds], size: int) -> None:
    works: dict[str, int] = defaultdict(int)
    for key, tasks in recorded.items():
        works[key.stage] += len(tasks)
    parts = [
        f"{stage} {count} x {1000 * taken.wall / count:.0f} ms ({1000 * taken.cpu / count:.0f} CPU)"
        for stage, taken in by_stage.items()
        if (count := works[stage])
    ]
    print(f"batches of {size}: {', '.join(parts)}", flush=True)
