"""Ctrl-C in a training run: the first one saves and stops, the second one ends at once."""

import dataclasses
import os
import signal
import threading

import jax
import pytest
from jax.experimental import multihost_utils

from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.graceful_shutdown import GracefulShutdown, graceful_shutdown
from clvr_jax.training.trainer import fit
from tests.training import line_recipe

TRAIN = dataclasses.replace(
    line_recipe.CONFIG.train, checkpoint=CheckpointConfig(save_interval_minutes=1000.0), steps=2000
)


@pytest.fixture(autouse=True)
def _heard_interrupts():
    """A shell starts background jobs with SIGINT ignored, and the suite may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def press_ctrl_c(*_):
    os.kill(os.getpid(), signal.SIGINT)


def saved_steps(out):
    return [int(path.name) for path in (out / "checkpoints").iterdir()]


def test_the_first_ctrl_c_saves_and_the_run_goes_on_from_there(tmp_path, capfd):
    task = line_recipe.task(line_recipe.CONFIG)

    def batches(step):
        if step == 3:
            press_ctrl_c()
        return task.batches(step)

    with pytest.raises(KeyboardInterrupt, match=r"interrupted; line: step \d+ is saved, --resume continues the run"):
        fit(dataclasses.replace(task, batches=batches), TRAIN, tmp_path)
    (step,) = saved_steps(tmp_path)
    assert "press Ctrl-C again to end at once" in capfd.readouterr().err
    assert not (tmp_path / "export").exists()
    state = fit(task, dataclasses.replace(TRAIN, steps=step + 1), tmp_path, resume=True)
    assert int(state.step) == step + 1


def test_a_ctrl_c_inside_a_callback_of_jax_saves_too(tmp_path):
    task = line_recipe.task(line_recipe.CONFIG)

    def loss(params, frozen, batch, key):
        jax.debug.callback(press_ctrl_c)
        return task.loss(params, frozen, batch, key)

    config = dataclasses.replace(TRAIN, steps=1)  # it comes once, and in the last step
    with pytest.raises(KeyboardInterrupt, match="a checkpoint is saved, --resume continues the run"):
        fit(dataclasses.replace(task, loss=loss), config, tmp_path)
    assert saved_steps(tmp_path) == [1]


def test_the_second_ctrl_c_ends_at_once(tmp_path):
    task, ended = line_recipe.task(line_recipe.CONFIG), threading.Event()

    def batches(step):
        while step == 3 and not ended.wait(0.1):  # a batch that never comes
            press_ctrl_c()
        return task.batches(step)

    def run():
        try:
            fit(dataclasses.replace(task, batches=batches), TRAIN, tmp_path)
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run()
    assert saved_steps(tmp_path) == []


def test_sigint_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with graceful_shutdown() as shutdown:
        press_ctrl_c()
        assert not shutdown.should_stop()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_sigterm_is_no_interruption():
    with graceful_shutdown() as shutdown:
        os.kill(os.getpid(), signal.SIGTERM)
        assert shutdown.should_stop()
        assert not shutdown.is_interrupted


def test_processes_number_their_sync_points_without_gaps(monkeypatch):
    """The coordination service picks the number of a future one, which a run with gaps might never reach."""
    numbers = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda n: numbers.append(n) or n == 3)
    shutdown = GracefulShutdown()
    assert [shutdown.should_stop() for _ in range(6)] == [False] * 3 + [True] * 3
    assert numbers == list(range(6))
