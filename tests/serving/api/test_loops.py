"""/v1/loops on the running server: events, control, storage, and what happens under load."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import httpx2
import numpy as np
import pytest
from PIL import Image

from clvr_jax.files.image_io import encode_png
from tests.serving.conftest import LIMITS, PROMPT, wait_until

BODY = {"prompt": PROMPT, "seed": 1, "max_steps": 2}


def events_of(client, loop_id, after=None):
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    with client.stream("GET", f"/v1/loops/{loop_id}/events", headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")], lines


def test_a_loop_reports_all_that_happens_and_is_stored(http, server):
    started = http.post("/v1/loops", json=BODY)
    assert started.status_code == 202
    loop_id = started.json()["id"]
    assert started.headers["location"] == f"/v1/loops/{loop_id}"
    events, lines = events_of(http, loop_id)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["queued", "started"]
    for kind in ("requirements", "plan", "generation_started", "image", "budget", "verification", "best"):
        assert kind in kinds, kind
    assert kinds[-1] == "done"
    assert [event["id"] for event in events] == list(range(len(events)))
    assert [int(line.removeprefix("id: ")) for line in lines if line.startswith("id: ")] == list(range(len(events)))

    item = http.get(f"/v1/loops/{loop_id}").json()
    assert (item["status"], item["prompt"], item["seed"]) == ("finished", PROMPT, 1)
    assert item["outcome"] == events[-1]["outcome"]
    generated = [step for step in item["steps"] if step["image_id"]]
    assert [event["image_id"] for event in events if event["type"] == "image"] == [s["image_id"] for s in generated]
    content = http.get(f"/v1/images/{item['image_id']}/content").content
    assert content == encode_png(server.service.store.trajectory(loop_id).image)
    assert loop_id in [each["id"] for each in http.get("/v1/loops").json()["data"]]

    # Of a finished loop the events come from the disk; those that the client has are not sent again.
    again, _ = events_of(http, loop_id, after=events[-3]["id"])
    assert again == events[-2:]
    assert http.post(f"/v1/loops/{loop_id}/cancel").status_code == 400
    assert http.delete(f"/v1/loops/{loop_id}").json()["deleted"]
    assert http.get(f"/v1/loops/{loop_id}").status_code == 404
    assert http.get(f"/v1/images/{item['image_id']}/content").status_code == 404


def test_a_loop_that_cannot_be_stored_is_listed_as_failed(http, server, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server.service.store, "finish", full_disk)
    loop_id = http.post("/v1/loops", json={**BODY, "max_steps": 1}).json()["id"]
    events, _ = events_of(http, loop_id)
    assert (events[-1]["type"], events[-1]["status"]) == ("done", "failed")
    item = http.get(f"/v1/loops/{loop_id}").json()
    assert (item["status"], item["error"]) == ("failed", "the result cannot be stored")
    assert http.delete(f"/v1/loops/{loop_id}").json()["deleted"]


def test_a_full_queue_answers_429_and_cancel_frees_it(http, gate, server):
    while (answer := http.post("/v1/loops", json=BODY)).status_code == 202:
        pass
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1
    assert http.get("/ready").status_code == 503
    listed = http.get("/v1/loops").json()["data"]
    unfinished = [each for each in listed if each["status"] in ("queued", "running")]
    assert LIMITS.max_queue < len(unfinished) <= LIMITS.max_queue + LIMITS.max_running
    positions = [each["queue_position"] for each in unfinished if each["status"] == "queued"]
    assert sorted(positions) == list(range(len(positions)))
    for each in unfinished:
        assert http.post(f"/v1/loops/{each['id']}/cancel").status_code == 202
    gate.is_open = True
    wait_until(lambda: not server.service.jobs)
    assert {http.get(f"/v1/loops/{each['id']}").json()["status"] for each in unfinished} == {"canceled"}
    assert http.get("/ready").status_code == 200


def test_accept_takes_the_best_image_so_far(http, gate, server):
    loop_id = http.post("/v1/loops", json=BODY).json()["id"]
    assert http.post(f"/v1/loops/{loop_id}/accept").json()["error"]["code"] == "no_image"
    job = server.service.jobs[loop_id]
    while not job.state.steps:
        gate.let_one()
    assert http.get(f"/v1/images/{loop_id}_0/content").headers["content-type"] == "image/png"
    assert http.post(f"/v1/loops/{loop_id}/accept").status_code == 202
    done, gate.is_open = gate.done, True  # the work that may run already is the last
    events, _ = events_of(http, loop_id)
    assert gate.done <= done + 1
    item = http.get(f"/v1/loops/{loop_id}").json()
    assert item["outcome"] in ("stopped", "accepted")
    assert (item["status"], item["best"], item["images"]) == ("finished", 0, 1)
    assert events[-1]["best"] == 0


@pytest.mark.slow
def test_images_do_not_depend_on_their_batch(http, server):
    """Requests of several kinds, alone and then all at once: the same bytes."""
    generator = random.Random(0)
    image = Image.fromarray(np.full((64, 64, 3), 200, np.uint8))
    bodies = [{"prompt": PROMPT, "mode": "one-shot", "seed": seed} for seed in range(6)]

    def made(body):
        response = http.post("/v1/images/generations", json=body)
        assert response.status_code == 200, response.text
        return response.json()["data"][0]["b64_json"]

    def edited(seed):
        files = {"image": ("a.png", encode_png(image))}
        fields = {"prompt": PROMPT, "mode": "one-shot", "seed": str(seed)}
        response = http.post("/v1/images/edits", data=fields, files=files)
        assert response.status_code == 200, response.text
        return response.json()["data"][0]["b64_json"]

    works = [(made, body) for body in bodies] + [(edited, seed) for seed in range(2)]
    alone = [function(value) for function, value in works]
    order = list(range(len(works)))
    generator.shuffle(order)
    with ThreadPoolExecutor(LIMITS.max_running + 2) as pool:
        together = dict(zip(order, pool.map(lambda index: works[index][0](works[index][1]), order), strict=True))
    assert [together[index] for index in range(len(works))] == alone
    assert len(set(alone)) == len(alone)


def test_a_client_that_leaves_ends_its_request(http, gate, server):
    with (
        server.client() as leaving,
        leaving.stream("POST", "/v1/images/generations", json={**BODY, "stream": True}) as response,
    ):
        assert next(response.iter_lines()).startswith(": keepalive")
    with server.client() as leaving, pytest.raises(httpx2.ReadTimeout):
        leaving.post("/v1/images/generations", json=BODY, timeout=1)
    wait_until(lambda: len(server.service.scheduler._stops) == 2)
    gate.is_open = True
    wait_until(lambda: not server.service.jobs)
    latest = http.get("/v1/loops?limit=2").json()["data"]
    assert [each["status"] for each in latest] == ["canceled", "canceled"]
