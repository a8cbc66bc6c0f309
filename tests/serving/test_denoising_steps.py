"""Accept and cancel between the denoising steps of an image, and the events of the steps."""

import pytest

from clvr_jax.reasoning.trajectories.trajectory import Trajectory
from tests.serving.api.test_loops import events_of
from tests.serving.conftest import PROMPT, wait_until

# With a limit on NFE the first candidate shows what one costs, and the second is generated in a work of its own.
TWO_CANDIDATES = {"prompt": PROMPT, "seed": 1, "num_inference_steps": 50, "candidates": 2, "max_nfe": 500}


def steps_of(events, image):
    return [each["done"] for each in events if each["type"] == "denoising_step" and each["step"] == image]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "status", "outcome"), [("accept", "finished", "stopped"), ("cancel", "canceled", "canceled")]
)
def test_it_takes_effect_before_the_next_denoising_step(http, server, held_step, action, status, outcome):
    loop_id = http.post("/v1/loops", json=TWO_CANDIDATES).json()["id"]
    assert held_step.reached.wait(300)
    assert http.post(f"/v1/loops/{loop_id}/{action}").status_code == 202
    held_step.released.set()
    events, _ = events_of(http, loop_id)
    assert steps_of(events, 0) == list(range(1, 51))
    assert steps_of(events, 1) == [1, 2]
    assert [each["step"] for each in events if each["type"] == "image"] == [0]
    assert (events[-1]["type"], events[-1]["status"]) == ("done", status)
    stored = Trajectory.load(server.out / loop_id)
    assert (stored.outcome, stored.best, len(stored.generated)) == (outcome, 0, 1)


def test_other_images_of_the_batch_are_not_changed(http, server, gate, held_step):
    """A canceled image leaves a batch that goes on with the others."""
    body = {"prompt": PROMPT, "mode": "one-shot"}
    first = http.post("/v1/loops", json={**body, "mode": "loop", "max_steps": 1}).json()["id"]
    wait_until(lambda: gate.is_holding)  # the loop has the device; the others wait for it together
    ids = [http.post("/v1/loops", json={**body, "seed": seed}).json()["id"] for seed in (6, 7)]
    gate.let_one()
    wait_until(lambda: gate.is_holding)
    assert all(server.service.jobs[each].started for each in ids)
    gate.is_open = True
    assert held_step.reached.wait(300)
    assert http.post(f"/v1/loops/{ids[0]}/cancel").status_code == 202
    held_step.released.set()
    wait_until(lambda: not server.service.jobs)
    items = [http.get(f"/v1/loops/{each}").json() for each in ids]
    assert [(item["status"], item["images"]) for item in items] == [("canceled", 0), ("finished", 1)]
    assert [steps_of(events_of(http, each)[0], 0) for each in ids] == [[1, 2], [1, 2, 3, 4]]
    assert http.get(f"/v1/loops/{first}").json()["status"] == "finished"
    alone = http.post("/v1/loops", json={**body, "seed": 7}).json()["id"]
    wait_until(lambda: not server.service.jobs)
    images = [http.get(f"/v1/images/{each}_0/content").content for each in (ids[1], alone)]
    assert images[0] == images[1]


def test_each_step_of_each_image_is_an_event(http):
    loop_id = http.post("/v1/loops", json={"prompt": PROMPT, "seed": 1, "max_steps": 2, "candidates": 2}).json()["id"]
    events, _ = events_of(http, loop_id)
    steps = next(each for each in events if each["type"] == "generation_started")["num_inference_steps"]
    images = [each["step"] for each in events if each["type"] == "image"]
    assert images == [0, 1]
    found = [(each["step"], each["done"]) for each in events if each["type"] == "denoising_step"]
    assert found == [(image, done) for image in images for done in range(1, steps + 1)]
    assert {each["num_inference_steps"] for each in events if each["type"] == "denoising_step"} == {steps}
