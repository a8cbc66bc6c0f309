"""Edits of running loops, and branches, on the running server."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from clvr_jax.reasoning import Trajectory
from tests.serving.api.test_loops import BODY, events_of
from tests.serving.conftest import PROMPT, wait_until

UNKNOWN = f"loop_{'0' * 24}"


def posted(server, gate, path, body):
    """Sends an edit, and lets the work that the device has begun finish, after which the edit takes effect."""
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, path, json=body)
        wait_until(lambda: server.service.scheduler._changes or waiting.done())
        gate.let_one()
        return waiting.result(60)


def image_of(http, image_id):
    return http.get(f"/v1/images/{image_id}/content").content


@pytest.mark.slow
def test_a_loop_is_edited_rolled_back_and_branched(http, gate, server):
    loop_id = http.post("/v1/loops", json=BODY).json()["id"]
    path = f"/v1/loops/{loop_id}"
    body = {"requirements": ["a red circle", "a blue star"], "instruction": "Draw a red circle."}
    edited = posted(server, gate, f"{path}/plan", body)
    assert (edited.status_code, edited.json()["id"]) == (200, loop_id)
    job = server.service.jobs[loop_id]
    while not job.state.steps:
        gate.let_one()
    assert job.state.steps[0].reasoning == "Draw a red circle."
    refused = posted(server, gate, f"{path}/rollback", {"step": 7})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "step")
    assert posted(server, gate, f"{path}/rollback", {"step": 0}).status_code == 200
    branch = http.post(f"{path}/branch", json={"step": 0, "instruction": "Add a blue star.", "seed": 3})
    assert branch.status_code == 202
    assert branch.json()["parent"] == {"id": loop_id, "step": 0}
    branch_id = branch.json()["id"]
    assert branch.headers["location"] == f"/v1/loops/{branch_id}"
    gate.is_open = True
    events, _ = events_of(http, loop_id)
    kinds = [event["type"] for event in events]
    assert kinds.count("edited") == 2
    assert kinds[-1] == "done"
    by_kind = {event["type"]: event for event in events if event["type"] != "edited"}
    assert by_kind["requirements"]["requirements"] == body["requirements"]

    wait_until(lambda: not server.service.jobs)
    stored = Trajectory.load(server.out / loop_id)
    assert [edit.rollback_to for edit in stored.edits] == [None, 0]
    assert [each.text for each in stored.steps[0].verification.requirements] == body["requirements"]
    assert http.get(path).json()["edits"][0]["instruction"] == "Draw a red circle."

    item = http.get(f"/v1/loops/{branch_id}").json()
    assert (item["status"], item["seed"], item["prompt"]) == ("finished", 3, PROMPT)
    assert item["steps"][1]["reasoning"] == "Add a blue star."
    assert "parent" not in item["request"]
    assert image_of(http, f"{branch_id}_0") == image_of(http, f"{loop_id}_0")
    assert image_of(http, f"{branch_id}_1") != image_of(http, f"{branch_id}_0")
    events, _ = events_of(http, branch_id)
    (found,) = [event for event in events if event["type"] == "branched"]
    assert (found["parent"], found["step"], found["images"]) == (loop_id, 0, 1)

    # The same branch of the loop, which has finished meanwhile, gives the same images.
    again = http.post(f"{path}/branch", json={"step": 0, "instruction": "Add a blue star.", "seed": 3}).json()["id"]
    wait_until(lambda: not server.service.jobs)
    first, second = Trajectory.load(server.out / branch_id), Trajectory.load(server.out / again)
    assert len(first.generated) == len(second.generated) > 1
    for one, other in zip(first.generated, second.generated, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
    assert again in [each["id"] for each in http.get("/v1/loops").json()["data"]]

    for name, value in (("plan", body), ("rollback", {"step": 0})):
        answer = http.post(f"{path}/{name}", json=value)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_running")


@pytest.mark.slow
def test_a_branch_may_have_another_prompt(http, server):
    loop_id = http.post("/v1/loops", json={**BODY, "max_steps": 1}).json()["id"]
    wait_until(lambda: not server.service.jobs)
    body = {"step": 0, "prompt": "a green square", "seed": 2}
    branch = http.post(f"/v1/loops/{loop_id}/branch", json=body).json()
    wait_until(lambda: not server.service.jobs)
    stored = Trajectory.load(server.out / branch["id"])
    assert (stored.prompt, stored.seed, stored.parent.step) == ("a green square", 2, 0)
    assert "green square" in stored.steps[0].verification.requirements[0].text


REFUSED = [
    ("plan", {}, 422, None),
    ("plan", {"requirements": []}, 422, "requirements"),
    ("plan", {"requirements": ["a; b"]}, 422, "requirements"),
    ("plan", {"instruction": " "}, 422, "instruction"),
    ("plan", {"instruction": "Stop.<|terminate|>"}, 422, "instruction"),
    ("plan", {"instruction": "red " * 900}, 422, "instruction"),  # more tokens than the model reads
    ("plan", {"instruction": "x", "unknown": 1}, 422, "unknown"),
    ("rollback", {}, 422, "step"),
    ("rollback", {"step": -1}, 422, "step"),
    ("rollback", {"step": 0}, 422, "step"),  # no image yet
    ("branch", {"step": 0}, 422, "step"),
    ("branch", {"step": 0, "prompt": ""}, 422, "prompt"),
    ("branch", {"step": 0, "prompt": " "}, 422, "prompt"),
]


def test_what_cannot_be_done_is_refused_by_name(http, gate, server):
    loop_id = http.post("/v1/loops", json=BODY).json()["id"]
    wait_until(lambda: server.service.jobs[loop_id].started is not None)
    for name, body, status, param in REFUSED:
        path = f"/v1/loops/{loop_id}/{name}"
        is_tried = (name, body) == ("rollback", {"step": 0})  # by the device thread
        answer = posted(server, gate, path, body) if is_tried else http.post(path, json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param), (name, body, error)
    assert server.service.jobs[loop_id].state.finished("m", {}) is None
    http.post(f"/v1/loops/{loop_id}/cancel")
    gate.is_open = True
    wait_until(lambda: not server.service.jobs)
    no_image = http.post(f"/v1/loops/{loop_id}/branch", json={"step": 0})
    assert (no_image.status_code, no_image.json()["error"]["code"]) == (409, "no_image")
    for name, body in (("plan", {"instruction": "x"}), ("rollback", {"step": 0}), ("branch", {"step": 0})):
        assert http.post(f"/v1/loops/{UNKNOWN}/{name}", json=body).status_code == 404
    one_shot = http.post("/v1/images/generations", json={"prompt": PROMPT, "mode": "one-shot", "seed": 1})
    one_shot_id = one_shot.json()["data"][0]["loop_id"]
    wait_until(lambda: not server.service.jobs)
    answer = http.post(f"/v1/loops/{one_shot_id}/branch", json={"step": 0})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "one_shot")
