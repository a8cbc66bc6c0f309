"""Calls of the models that run at the same time give what they give one after the other."""

from types import SimpleNamespace

import numpy as np
import pytest

from clvr_jax.errors import UsageError
from clvr_jax.reasoning.loop.budget import Budget
from clvr_jax.serving.event_log import EventLog
from clvr_jax.serving.jobs import LoopJob, LoopSpec
from clvr_jax.serving.models import ServedModels, check_calls
from clvr_jax.serving.scheduling.limits import Limits
from clvr_jax.serving.scheduling.metrics import Metrics
from clvr_jax.serving.scheduling.scheduler import Scheduler
from tests.serving.conftest import wait_until

SPECS = [
    *(LoopSpec(f"a {color} circle", seed, mode="one-shot") for seed, color in enumerate(("red", "blue", "green"))),
    *(LoopSpec(f"a {color} star", seed, budget=Budget(max_steps=1)) for seed, color in enumerate(("red", "blue"))),
]


def trajectories(pipeline, calls):
    models, ended = ServedModels(pipeline, "shapes-tiny"), {}
    scheduler = Scheduler(models.perform, Limits(concurrent_calls=calls, window_seconds=0.02), Metrics())
    jobs = [
        LoopJob(spec, models, EventLog(None), lambda job, *result: ended.update({job.id: result})) for spec in SPECS
    ]
    scheduler.start()
    scheduler.submit(jobs)
    wait_until(lambda: len(ended) == len(jobs))
    scheduler.drain(0, "interrupted")
    assert not any(ended[job.id][1] for job in jobs)
    return [ended[job.id][0] for job in jobs]


@pytest.mark.slow
def test_images_and_texts_are_those_of_single_calls(server):
    alone, together = trajectories(server.pipeline, 1), trajectories(server.pipeline, 3)
    for first, second in zip(alone, together, strict=True):
        assert [step.reasoning for step in first.steps] == [step.reasoning for step in second.steps]
        images = [[np.asarray(step.image) for step in each.steps if step.image is not None] for each in (first, second)]
        assert images[0]
        assert all(np.array_equal(*pair) for pair in zip(*images, strict=True))


def test_models_on_a_mesh_are_called_once_at_a_time(server):
    assert check_calls(server.pipeline, 3) == 3
    assert 1 <= check_calls(server.pipeline, None) <= 4
    on_mesh = SimpleNamespace(flux=SimpleNamespace(layout=object(), offloader=None), controller=None)
    assert check_calls(on_mesh, None) == check_calls(on_mesh, 1) == 1
    with pytest.raises(UsageError, match="--concurrent-calls 2: must be 1 with --mesh"):
        check_calls(on_mesh, 2)
