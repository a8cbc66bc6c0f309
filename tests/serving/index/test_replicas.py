"""Two `clvr serve` processes over one PostgreSQL and one directory: each answers for all loops, and one may die."""

import json
import signal
from contextlib import ExitStack

import pytest

from clvr_jax.reasoning import Trajectory
from tests.serving.conftest import PROMPT, wait_until
from tests.serving.test_process import serving

BODIES = [{"prompt": PROMPT, "seed": seed, "max_steps": 2} for seed in range(4)]
STAYING = {  # loops of this prompt are rarely accepted, and last long enough for a command to find them
    "prompt": "an orange cross in the center, a black triangle at the top left, a green circle at the bottom right, "
    "three green squares, a cyan square over the green circle, a blue square to the left of the green circle, and a "
    "black square to the left of the cyan square",
    "max_steps": 16,
    "max_seconds": 600,
    "num_inference_steps": 100,
}


def events_of(client, loop_id):
    with client.stream("GET", f"/v1/loops/{loop_id}/events") as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def trajectories(out):
    return {path.name: Trajectory.load(path) for path in out.glob("loop_*")}


@pytest.mark.slow
def test_every_accepted_request_is_answered_once_when_a_replica_is_killed(tmp_path, postgres_url, monkeypatch):
    monkeypatch.setenv("CLVR_INDEX_URL", postgres_url)
    out = tmp_path / "shared"
    options = ["--lease-seconds", "10", "--max-running", "2"]
    with ExitStack() as stack:
        dying, a = stack.enter_context(serving(out, *options))
        staying, b = stack.enter_context(serving(out, *options))

        # Each replica answers for the loops of the other one.
        started = [client.post("/v1/loops", json=body) for body in BODIES for client in (a, b)]
        assert [each.status_code for each in started] == [202] * len(started)
        ids = [each.json()["id"] for each in started]
        listed = [{each["id"] for each in client.get("/v1/loops").json()["data"]} for client in (a, b)]
        assert listed == [set(ids), set(ids)]
        of_a = ids[::2]
        wait_until(lambda: any(b.get(f"/v1/loops/{each}").json()["images"] for each in of_a), 900)
        seen = next(item for item in (b.get(f"/v1/loops/{each}").json() for each in of_a) if item["images"])
        assert b.get(f"/v1/images/{seen['image_id']}/content").content[:4] == b"\x89PNG"
        assert b.get(f"/v1/loops/{seen['id']}/archive").status_code in (200, 400)  # 400 while it runs
        before = {each: b.get(f"/v1/loops/{each}").json()["status"] for each in of_a}
        assert set(before.values()) & {"running", "queued"}

        dying.send_signal(signal.SIGKILL)
        dying.wait()
        wait_until(lambda: all(b.get(f"/v1/loops/{each}").json()["status"] == "finished" for each in ids), 1800)
        resumed = [each for each in of_a if "resumed" in [event["type"] for event in events_of(b, each)]]
        assert resumed
        for each in ids:
            events = events_of(b, each)
            numbers = [event["id"] for event in events]
            assert numbers == sorted(set(numbers))
            assert [event["type"] for event in events].count("done") == 1
        metrics = b.get("/metrics").text
        assert f"clvr_resumptions_total {len(resumed)}.0" in metrics

        staying.send_signal(signal.SIGTERM)
        assert staying.wait(300) == 0
    saved = trajectories(out)
    assert sorted(saved) == sorted(ids)
    # The loops of one seed are equal, whichever replica ran them, and also if they moved in between.
    for first, second in zip(ids[::2], ids[1::2], strict=True):
        one, other = saved[first], saved[second]
        assert [step.reasoning for step in one.steps] == [step.reasoning for step in other.steps]
        assert [step.image.tobytes() for step in one.generated] == [step.image.tobytes() for step in other.generated]


@pytest.mark.slow
def test_a_loop_is_controlled_through_any_replica_and_handed_back_at_the_end(tmp_path, postgres_url, monkeypatch):
    monkeypatch.setenv("CLVR_INDEX_URL", postgres_url)
    out = tmp_path / "shared"
    with ExitStack() as stack:
        first, a = stack.enter_context(serving(out, "--drain-seconds", "0"))
        _, b = stack.enter_context(serving(out))
        canceled = a.post("/v1/loops", json=STAYING).json()["id"]
        canceling = b.post(f"/v1/loops/{canceled}/cancel")
        assert canceling.status_code == 202
        wait_until(lambda: b.get(f"/v1/loops/{canceled}").json()["status"] == "canceled", 900)
        assert b.post(f"/v1/loops/{canceled}/cancel").json()["error"]["code"] == "not_running"
        changed = a.post("/v1/loops", json=STAYING).json()["id"]
        edited = b.post(f"/v1/loops/{changed}/plan", json={"requirements": ["a dog", "a cat", "a bird"]})
        assert edited.status_code == 200, edited.text
        assert b.delete(f"/v1/loops/{changed}").json()["error"]["code"] == "running"
        wait_until(lambda: b.get(f"/v1/loops/{changed}").json()["images"], 900)
        refused = b.post(f"/v1/loops/{changed}/rollback", json={"step": 99})
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "step")
        assert b.post(f"/v1/loops/{changed}/rollback", json={"step": 0}).status_code == 200
        branched = b.post(f"/v1/loops/{changed}/branch", json={"step": 0, "instruction": "Add a star."})
        assert (branched.status_code, branched.json()["parent"]) == (202, {"id": changed, "step": 0})
        assert b.post(f"/v1/loops/{branched.json()['id']}/cancel").status_code == 202
        accepted = a.post("/v1/loops", json=STAYING).json()["id"]
        wait_until(lambda: b.get(f"/v1/loops/{accepted}").json()["images"], 900)
        assert b.post(f"/v1/loops/{accepted}/accept").status_code == 202
        wait_until(lambda: b.get(f"/v1/loops/{accepted}").json()["status"] == "finished", 900)

        first.send_signal(signal.SIGTERM)
        assert first.wait(300) == 0
        # Replica b resumes it at once, without waiting for a lease to expire, and its edits are not lost.
        wait_until(lambda: b.post(f"/v1/loops/{changed}/cancel").status_code == 202, 300)
        kinds = [event["type"] for event in events_of(b, changed)]
        assert "edited" in kinds
        assert kinds[-1] == "done"
        item = b.get(f"/v1/loops/{changed}").json()
        assert {"requirements": ["a dog", "a cat", "a bird"]}.items() <= item["edits"][0].items()
        assert item["edits"][1]["rollback_to"] == 0


def test_a_replica_whose_database_is_absent_says_so_in_one_line(monkeypatch, capsys, tmp_path):
    from clvr_jax.cli import main

    monkeypatch.setenv("CLVR_INDEX_URL", "postgresql://u:secret@127.0.0.1:1/x")
    assert main(["serve", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "postgresql://u:***@127.0.0.1:1/x: the index cannot be opened" in said
    assert "secret" not in said
