"""Two `clvr serve` processes over one PostgreSQL and one directory: each answers for all loops, and one may die."""

import json
import signal
from contextlib import ExitStack

import pytest

from clvr_jax.reasoning import Trajectory
from tests.serving.conftest import PROMPT, wait_until
from tests.serving.test_process import serving

BODIES = [{"prompt": PROMPT, "seed": seed, "max_steps": 2} for seed in range(4)]


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


def test_a_replica_whose_database_is_absent_says_so_in_one_line(monkeypatch, capsys, tmp_path):
    from clvr_jax.cli import main

    monkeypatch.setenv("CLVR_INDEX_URL", "postgresql://u:secret@127.0.0.1:1/x")
    assert main(["serve", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "postgresql://u:***@127.0.0.1:1/x: the index cannot be opened" in said
    assert "secret" not in said
