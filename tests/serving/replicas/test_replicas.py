"""Two `clvr serve` processes over one PostgreSQL and one directory: each answers for all loops, and one may die."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from clvr_jax.reasoning import Trajectory
from tests.serving.conftest import PROMPT, wait_until
from tests.serving.test_process import serving

BODIES = [{"prompt": PROMPT, "seed": seed, "max_steps": 2} for seed in range(2)]
LONG = {  # a loop that lasts until a command ends it: an image takes many steps, and none meets all of NEVER
    "prompt": "two red circles above a blue square",
    "seed": 1,
    "max_steps": 16,
    "max_seconds": 600,
    "num_inference_steps": 100,
}
NEVER = [
    "a red circle to the left of a blue square",
    "a blue square to the left of a red circle",
    "a red circle above a blue square",
    "a blue square above a red circle",
]


def events_of(client, loop_id):
    with client.stream("GET", f"/v1/loops/{loop_id}/events") as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def trajectories(out):
    return {path.name: Trajectory.load(path) for path in out.glob("loop_*")}


def started(client, body):
    answer = client.post("/v1/loops", json=body)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def wait_for(client, loop_id, is_true, seconds=1800):
    def asked():
        time.sleep(0.2)
        return is_true(client.get(f"/v1/loops/{loop_id}").json())

    wait_until(asked, seconds)


def check_commands(running, a, b):
    """Sends commands to replica b for loops of replica a, the process `running`; returns one that still runs."""
    accepted, changed, canceled = (started(a, LONG) for _ in range(3))
    answer = b.post(f"/v1/loops/{canceled}/cancel")
    assert (answer.status_code, answer.json()["command"]) == (202, {"kind": "cancel", "state": "received"})
    for each in (accepted, changed):
        edited = b.post(f"/v1/loops/{each}/plan", json={"requirements": NEVER, "instruction": "Draw a red circle."})
        assert edited.status_code == 200, edited.text
    assert b.delete(f"/v1/loops/{changed}").json()["error"]["code"] == "running"
    wait_for(b, canceled, lambda item: item["status"] == "canceled")
    assert b.post(f"/v1/loops/{canceled}/cancel").json()["error"]["code"] == "not_running"

    wait_for(b, accepted, lambda item: item["images"])
    answer = b.post(f"/v1/loops/{accepted}/accept")
    assert (answer.status_code, answer.json()["command"]) == (202, {"kind": "accept", "state": "received"})
    wait_for(b, accepted, lambda item: item["status"] == "finished")
    item = b.get(f"/v1/loops/{accepted}").json()
    assert (item["outcome"], item["images"] < LONG["max_steps"]) == ("stopped", True)
    assert item["image_id"] == f"{accepted}_{item['best']}"

    wait_for(b, changed, lambda item: item["images"])
    refused = b.post(f"/v1/loops/{changed}/rollback", json={"step": 99})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "step")
    returned = b.post(f"/v1/loops/{changed}/rollback", json={"step": 0})
    assert returned.status_code == 200, returned.text
    branched = b.post(f"/v1/loops/{changed}/branch", json={"step": 0, "instruction": "Draw a star."})
    assert (branched.status_code, branched.json()["parent"]) == (202, {"id": changed, "step": 0})
    assert b.post(f"/v1/loops/{branched.json()['id']}/cancel").status_code == 202

    # A replica that does not answer for a while carries the command out when it is back.
    silent = started(a, LONG)
    running.send_signal(signal.SIGSTOP)
    try:
        answer = b.post(f"/v1/loops/{silent}/cancel")
        assert (answer.status_code, answer.json()["command"]) == (202, {"kind": "cancel", "state": "sent"})
        assert answer.json()["status"] in ("queued", "running")
    finally:
        running.send_signal(signal.SIGCONT)
    wait_for(b, silent, lambda item: item["status"] == "canceled")
    return changed


@pytest.mark.slow
def test_two_replicas_answer_for_each_other_and_lose_nothing_when_one_is_killed(tmp_path, postgres_url, monkeypatch):
    monkeypatch.setenv("CLVR_INDEX_URL", postgres_url)
    out = tmp_path / "shared"
    options = ["--lease-seconds", "40", "--max-running", "3"]
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        servers = list(pool.map(lambda _: stack.enter_context(serving(out, *options)), range(2)))
        (dying, a), (staying, b) = servers
        changed = check_commands(dying, a, b)

        # Each replica answers for the loops of the other one.
        ids = [started(client, body) for body in BODIES for client in (a, b)]
        for client in (a, b):
            assert set(ids) <= {each["id"] for each in client.get("/v1/loops").json()["data"]}
        of_a = [changed, *ids[::2]]
        assert b.get(f"/v1/images/{changed}_0/content").content[:4] == b"\x89PNG"
        assert b.get(f"/v1/loops/{changed}/archive").status_code == 400  # while it runs
        assert b.get(f"/v1/loops/{changed}").json()["status"] == "running"
        dying.send_signal(signal.SIGKILL)
        dying.wait()
        wait_for(b, changed, lambda item: "queue_position" in item)  # b runs it now, with what was changed through it
        assert b.post(f"/v1/loops/{changed}/cancel").json()["command"] == {"kind": "cancel", "state": "received"}
        wait_for(b, changed, lambda item: item["status"] == "canceled")
        item = b.get(f"/v1/loops/{changed}").json()
        assert item["edits"][0]["requirements"] == NEVER
        assert item["edits"][1]["rollback_to"] == 0
        for each in ids:
            wait_for(b, each, lambda item: item["status"] == "finished")

        resumed = [each for each in of_a if "resumed" in [event["type"] for event in events_of(b, each)]]
        assert changed in resumed
        for each in [changed, *ids]:
            events = events_of(b, each)
            numbers = [event["id"] for event in events]
            assert numbers == sorted(set(numbers))
            assert [event["type"] for event in events].count("done") == 1
        metrics = b.get("/metrics").text
        assert f"clvr_resumptions_total {len(resumed)}.0" in metrics

        staying.send_signal(signal.SIGTERM)
        assert staying.wait(300) == 0
    saved = trajectories(out)
    assert set(ids) < set(saved)
    # The loops of one seed are equal, whichever replica ran them, and also if they moved in between.
    for first, second in zip(ids[::2], ids[1::2], strict=True):
        one, other = saved[first], saved[second]
        assert [step.reasoning for step in one.steps] == [step.reasoning for step in other.steps]
        assert [step.image.tobytes() for step in one.generated] == [step.image.tobytes() for step in other.generated]


def test_a_replica_whose_database_is_absent_says_so_in_one_line(monkeypatch, capsys, tmp_path):
    from clvr_jax.cli import main

    monkeypatch.setenv("CLVR_INDEX_URL", "postgresql://u:secret@127.0.0.1:1/x")
    assert main(["serve", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "postgresql://u:***@127.0.0.1:1/x: the index cannot be opened" in said
    assert "secret" not in said
