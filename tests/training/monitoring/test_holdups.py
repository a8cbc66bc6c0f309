"""One line in the log for what holds a run up: a stalled input, a slow process, steps that are not finite."""

import dataclasses
import time
from concurrent.futures import Future, ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.training.monitoring.clock import Goodput
from clvr_jax.training.monitoring.hosts import Reports, delay
from clvr_jax.training.monitoring.input_wait import InputWait
from clvr_jax.training.monitoring.ledger import CATEGORIES
from clvr_jax.training.trainer import fit
from tests.training import line_recipe


class Computing:
    """An array that the devices compute until some time."""

    def __init__(self, seconds):
        self._ready = time.monotonic() + seconds

    def is_ready(self):
        return time.monotonic() > self._ready


def test_input_is_only_the_time_in_which_the_devices_have_nothing_to_compute():
    wait = InputWait("run")
    wait.computed = [Computing(0.2)]
    with ThreadPoolExecutor(1) as pool, Goodput() as clock, clock.phase("step"):
        wait(pool.submit(time.sleep, 0.5), 0)
        seconds = clock.total()
    assert seconds["input"] == pytest.approx(0.3, abs=0.15)
    assert seconds["step"] == pytest.approx(0.2, abs=0.15)


def test_a_batch_that_is_there_is_not_waited_for_though_the_devices_compute():
    wait, batch = InputWait("run"), Future()
    batch.set_result(None)
    wait.computed = [Computing(60.0)]
    began = time.monotonic()
    wait(batch, 0)
    assert time.monotonic() - began < 5


def test_a_stalled_input_is_named_while_it_stalls_and_again_when_the_time_has_doubled(capfd):
    with ThreadPoolExecutor(1) as pool:
        InputWait("run", seconds=0.2)(pool.submit(time.sleep, 0.7), 11)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("run: step 12: has waited") for line in lines)
    assert "the input has stalled" in lines[0]


def row(**seconds):
    return [seconds.get(name, 0.0) for name in CATEGORIES]


def test_the_process_that_is_outside_of_steps_for_the_longest_time_is_the_slow_one():
    rows = np.array([row(step=20.0), row(step=13.0, input=6.0, log=1.0), row(step=19.0, log=1.0)])
    found = delay(rows, ["a", "b", "c"])
    assert (found.process, found.host, found.category) == (1, "b", "input")
    assert found.seconds == pytest.approx(7.0)
    assert found.is_notable
    line = "run: step 40: process 1 (b) held the others up for 7.0 of the last 20.0 s, most of it in 'input'"
    assert found.report("run", "step 40") == line


def test_waiting_for_another_process_is_nobodys_delay():
    rows = np.array([row(step=10.0, slow_host=9.0, log=0.5), row(step=19.0, log=0.6)])
    assert not delay(rows, ["a", "b"]).is_notable


def test_a_line_is_printed_once_in_its_time():
    reports = Reports(seconds=0.2)
    assert [reports.is_new(key) for key in ("1", "1", "2")] == [True, False, True]
    time.sleep(0.25)
    assert reports.is_new("1")


@pytest.mark.parametrize("log_every", [1, 3])
def test_a_step_that_is_not_finite_is_named(tmp_path, capfd, log_every):
    task = line_recipe.task(line_recipe.CONFIG)

    def batches(step):
        x, y = task.batches(step)
        return (x, np.full_like(y, np.nan)) if step == 4 else (x, y)

    config = dataclasses.replace(line_recipe.CONFIG.train, steps=6, log_every=log_every)
    fit(dataclasses.replace(task, batches=batches), config, tmp_path)
    lines = [line for line in capfd.readouterr().err.splitlines() if "skipped" in line]
    since = "" if log_every == 1 else " of step 4 to 6"
    message = f"line: step 5: loss nan, grad norm nan; 1 optimizer step was skipped{since}, which changed no parameters"
    assert lines == [message]


def test_gradients_that_are_not_finite_are_named_without_the_loss(tmp_path, capfd):
    task = line_recipe.task(line_recipe.CONFIG)

    def loss(params, frozen, batch, key):
        # The gradient of sqrt at 0 is infinite, and times 0 it is nan.
        return jnp.sqrt(jnp.sum(0.0 * params["w"])), {}

    config = dataclasses.replace(line_recipe.CONFIG.train, steps=3, max_nonfinite_steps=2)
    with pytest.raises(ClvrError, match="2 steps in a row are not finite"):
        fit(dataclasses.replace(task, loss=loss), config, tmp_path)
    lines = [line for line in capfd.readouterr().err.splitlines() if "skipped" in line]
    assert lines[0].startswith("line: step 1: grad norm nan; 1 optimizer step was skipped")
