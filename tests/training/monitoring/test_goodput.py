"""Goodput of real runs: every second has a category, also of a run that is killed, stopped, or waits for a host."""

import json
import signal
import struct
import time

import pytest

from clvr_jax.training.monitoring.ledger import category, read_ledger
from tests.training.test_interruptions import CLUSTER, SAVE_ONCE, TRAIN, losses, run, start

pytestmark = pytest.mark.slow

MOST_UNNAMED = 0.01
"""Share of the wall time that may be in no category with a name."""


def lines(out):
    return [json.loads(line) for line in (out / "goodput.jsonl").read_text().splitlines()]


def assert_complete(out, began, ended):
    """Compares the account with a clock outside of the processes."""
    ledger, wall = read_ledger(out / "goodput.jsonl"), ended - began
    named = sum(seconds for name, seconds in ledger.seconds.items() if name != "other")
    assert named >= (1 - MOST_UNNAMED) * wall
    assert sum(ledger.seconds.values()) <= 1.001 * wall + 0.02
    return ledger


def tags(out):
    from tensorboardX.proto.event_pb2 import Event

    found = set()
    for file in (out / "tensorboard").iterdir():
        content, at = file.read_bytes(), 0
        while at + 12 < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            found |= {value.tag for value in event.summary.value}
            at += 16 + length
    return found


def test_every_second_has_a_category_also_after_kill_and_sigterm(tmp_path):
    """The first start is killed without a checkpoint: its steps are lost. The second one saves first: nothing is."""
    out, began = tmp_path / "run", time.time()
    process = start(TRAIN, out, "--pause", "0.1", *SAVE_ONCE)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = lines(out)
    assert_complete(out, began, killed[-1]["time"])

    # The resumed run drops the metrics of the killed one before it writes its own.
    process = start(TRAIN, out, "--resume", "--pause", "0.1", *SAVE_ONCE, step=len(losses(out)) + 4)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert "line: until now goodput 0." in said
    assert lines(out)[-1]["end"] == "preempted"

    done = run(TRAIN, out, "--resume", *SAVE_ONCE)
    assert done.returncode == 0, done.stderr
    rows = lines(out)
    assert rows[-1]["end"] == "complete"
    ledger = assert_complete(out, began, rows[-1]["time"])
    steps = [sum(s for name, s in row["seconds"].items() if category(name) == "step") for row in killed[1:]]
    assert ledger.seconds["lost/redone"] == pytest.approx(sum(steps))
    starts = [index for index, row in enumerate(rows) if row.get("event") == "start"]
    gaps = [rows[index]["time"] - rows[index - 1]["time"] for index in starts[1:]]
    assert ledger.seconds["lost/down"] == pytest.approx(sum(gaps), abs=0.01)
    assert f"line: {ledger.summary()[:10]}" in done.stderr  # "goodput 0.", of almost the same moment
    assert ledger.summary().partition(": ")[0].endswith("3 starts")
    assert {"goodput", "goodput/start", "goodput/compile", "goodput/step", "goodput/lost/down"} <= tags(out)


def test_a_slow_process_is_named_and_what_it_costs_is_counted(tmp_path):
    """The batches of process 1 take 0.4 s, those of process 0 nothing."""
    out = tmp_path / "run"
    options = ("--train.steps", "10", "--train.log-every", "5", "--pause", "0.4", "--slow", "1", *SAVE_ONCE)
    done = run(CLUSTER, out, *options)
    assert done.returncode == 0, done.stderr
    assert "process 1 (" in done.stderr
    assert "held the others up for" in done.stderr
    assert "most of it in 'input'" in done.stderr
    rows = lines(out)
    ledger = assert_complete(out, rows[0]["time"], rows[-1]["time"])
    assert ledger.seconds["slow_host"] > 0.5 * 10 * 0.4
    assert rows[0]["processes"] == 2
