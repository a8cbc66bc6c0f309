"""The clock charges every second to one category."""

import json
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.training.monitoring.clock import Goodput, active_goodput, phase, process_began


def read(directory):
    return [json.loads(line) for line in (directory / "goodput.jsonl").read_text().splitlines()]


def test_nested_phases_are_disjoint_and_add_up(tmp_path):
    began = time.time()
    with Goodput() as clock:
        clock.open(tmp_path, 0, resume=False)
        clock.turn("other")
        with phase("step"):
            time.sleep(0.05)
            with phase("input"):
                time.sleep(0.1)
        ledger = clock.record(1)
    wall = time.time() - began
    _, first, last = read(tmp_path)
    assert first["seconds"]["input"] == pytest.approx(0.1, abs=0.05)
    assert first["seconds"]["step"] == pytest.approx(0.05, abs=0.05)
    assert last["end"] == "complete"
    assert ledger.wall == pytest.approx(wall, abs=0.05)
    assert sum(ledger.seconds.values()) == pytest.approx(ledger.wall)


def test_compiling_is_taken_out_of_the_phase_once_however_deep_it_is_nested(tmp_path):
    """A jitted function inside of another one is traced within its tracing; both are reported."""

    @jax.jit
    def inner(x):
        time.sleep(0.2)
        return x + 1

    @jax.jit
    def outer(x):
        time.sleep(0.1)
        return inner(x) * 2

    with Goodput() as clock:
        clock.open(tmp_path, 0, resume=False)
        with phase("step"):
            jax.block_until_ready(outer(jnp.ones(3)))
        seconds = clock.total()
        wall = time.time() - clock.began
    assert seconds["compile"] >= 0.29
    assert sum(seconds.values()) == pytest.approx(wall, abs=0.05)
    assert seconds["step"] < wall - 0.3 + 0.01


def test_threads_and_code_outside_of_a_run_charge_nothing(tmp_path):
    with phase("step"):
        assert active_goodput() is None
    with Goodput() as clock:

        def in_thread():
            with phase("input"):
                jax.block_until_ready(jax.jit(lambda x: x - 7)(jnp.ones(3)))

        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
        assert set(clock.total()) == {"start"}
    assert active_goodput() is None


@pytest.mark.parametrize(
    ("error", "end"), [(KeyboardInterrupt, "interrupted"), (ClvrError, "failed"), (MemoryError, "failed")]
)
def test_an_exception_is_the_end_of_a_start(tmp_path, error, end):
    def run():
        with Goodput() as clock:
            clock.open(tmp_path, 3, resume=False)
            raise error

    with pytest.raises(error):
        run()
    assert read(tmp_path)[-1]["end"] == end


def test_a_damaged_file_is_put_aside_and_does_not_stop_a_resumed_run(tmp_path, capfd):
    (tmp_path / "goodput.jsonl").write_text('{"time": 1, "iteration": 1, "seconds": {"no": 1}}\n')
    with Goodput() as clock:
        assert clock.open(tmp_path, 1, resume=True).starts == 1
    assert [row.get("event") for row in read(tmp_path)] == ["start", None]
    assert (tmp_path / "goodput.jsonl.damaged").exists()
    (line,) = capfd.readouterr().err.splitlines()
    assert "'no' is no category of wall time" in line
    assert "it is goodput.jsonl.damaged now" in line


def test_a_full_disk_is_one_line(tmp_path):
    with Goodput() as clock, Path("/dev/full").open("wb", buffering=0) as full:
        clock.open(tmp_path, 0, resume=False)
        clock._file.close()
        clock._file = full
        with pytest.raises(ClvrError, match=r"/dev/full: cannot be written \(No space left on device\)"):
            clock.record(1)


def test_a_run_that_is_not_resumed_begins_its_account_anew(tmp_path):
    for _ in range(2):
        with Goodput() as clock:
            clock.open(tmp_path, 0, resume=False)
    assert [row.get("event") for row in read(tmp_path)] == ["start", None]


def test_a_program_starts_once():
    process_began()
    assert process_began() == pytest.approx(time.time(), abs=1.0)
