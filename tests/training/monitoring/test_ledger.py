"""The account of a run's wall time: what a line adds, and what a restart takes back."""

import json

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.training.curves import curves
from clvr_jax.training.monitoring.ledger import read_ledger, read_ledgers


def start(time, iteration=0):
    return {"event": "start", "time": time, "iteration": iteration, "processes": 1, "devices": 1}


def spent(time, iteration, end=None, **seconds):
    row = {
        "time": time,
        "iteration": iteration,
        "seconds": {name.replace("_of_", "/"): s for name, s in seconds.items()},
    }
    return row if end is None else {**row, "end": end}


def account(path, *rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return read_ledger(path)


def test_steps_after_the_restored_one_are_lost_and_so_is_the_time_without_a_process(tmp_path):
    """A start is killed after iteration 30, of which 20 are saved, and the next one begins 50 s after its last line."""
    found = account(
        tmp_path / "goodput.jsonl",
        start(100.0),
        spent(110.0, 10, start=4.0, step=6.0),
        spent(120.0, 20, step=8.0, save=2.0),
        spent(130.0, 30, step=7.0, input=3.0),
        start(180.0, iteration=20),
        spent(190.0, 30, start=3.0, step=7.0),
        tail='{"time": 19',
    )
    assert found.seconds == pytest.approx(
        {"start": 7.0, "step": 21.0, "save": 2.0, "input": 3.0, "lost/down": 50.0, "lost/redone": 7.0}
    )
    assert found.wall == pytest.approx(90.0) == sum(found.seconds.values())
    assert found.goodput == pytest.approx(21 / 90)
    assert found.summary() == "goodput 0.23 of 90.0 s, 2 starts: lost 0.63, start 0.08, input 0.03, save 0.02"


@pytest.mark.parametrize(
    ("end", "down"), [("preempted", 50.0), ("failed", 50.0), ("interrupted", 0.0), ("paused", 0.0)]
)
def test_only_the_time_that_nobody_chose_is_lost_between_two_starts(tmp_path, end, down):
    found = account(
        tmp_path / "goodput.jsonl",
        start(100.0),
        spent(110.0, 10, end, step=10.0),
        start(160.0, 10),
        spent(161.0, 11, step=1.0),
    )
    assert found.seconds.get("lost/down", 0.0) == down
    assert found.wall == 11.0 + down
    assert "lost/redone" not in found.seconds


def test_phases_of_a_step_are_lost_with_it_and_add_up_to_its_share(tmp_path):
    rows = [start(0.0), spent(8.0, 1, step=1.0, step_of_sampling=4.0, step_of_update=3.0), spent(10.0, 1, save=2.0)]
    found = account(tmp_path / "goodput.jsonl", *rows)
    assert found.shares() == pytest.approx({"step": 0.8, "step/sampling": 0.4, "step/update": 0.3, "save": 0.2})
    again = account(tmp_path / "goodput.jsonl", *rows, start(10.0), spent(18.0, 1, step=8.0))
    assert again.seconds["lost/redone"] == 8.0
    assert again.seconds["step"] == 8.0
    assert sum(again.seconds.values()) == pytest.approx(again.wall) == 18.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"time": 2.0, "iteration": 1, "seconds": {"stp": 1.0}}, "'stp' is no category of wall time"),
        ({"time": 2.0, "iteration": 1, "seconds": {"step": -1.0}}, "step must be a finite number"),
        ({"time": 2.0, "iteration": -1, "seconds": {}}, "iteration must be an integer"),
        ({"time": 2.0, "iteration": 1}, "lacks seconds"),
    ],
)
def test_a_line_of_another_file_is_an_error_that_names_it(tmp_path, line, message):
    with pytest.raises(ClvrError, match=message) as error:
        account(tmp_path / "goodput.jsonl", start(0.0), line)
    assert "goodput.jsonl:2" in str(error.value)


def test_a_torn_line_is_fine_at_the_end_of_a_start_and_an_error_inside_of_one(tmp_path):
    path = tmp_path / "goodput.jsonl"
    torn = json.dumps(start(0.0)) + '\n{"time": 1\n'
    path.write_text(torn + json.dumps(start(5.0)) + "\n")
    assert [found.starts for found in read_ledgers(path)] == [1, 2]
    path.write_text(torn + json.dumps(spent(5.0, 1, step=5.0)) + "\n")
    with pytest.raises(ClvrError, match=r"goodput\.jsonl:2"):
        list(read_ledgers(path))


def test_curves_have_the_shares_at_each_iteration_the_later_start_counts(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "loss": 0.5}\n')
    account(
        tmp_path / "goodput.jsonl",
        start(0.0),
        spent(10.0, 10, start=5.0, step=5.0),
        spent(20.0, 20, step=10.0),
        start(20.0, iteration=10),
        spent(30.0, 20, step=10.0),
    )
    found = curves([tmp_path], ["goodput", "goodput/lost"])
    (line,) = found["goodput"]
    assert list(line.steps) == [10, 20]
    assert line.values[0] == pytest.approx([0.5, 15 / 30])
    (lost,) = found["goodput/lost"]
    assert lost.values[0][-1] == pytest.approx(10 / 30)
