import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.sharding import MeshConfig
from clvr_jax.training.checkpoint import CheckpointConfig, restore_part
from clvr_jax.training.trainer import Task, TrainConfig, TrainState, fit
from clvr_jax.trees import dotted, leaves_by_path

ROOT = Path(__file__).parents[2]
ONE_DEVICE = MeshConfig(devices=1)

CONFIG = TrainConfig(steps=12, learning_rate=0.05, log_every=1, mesh=ONE_DEVICE)


def make_task(scale=1.0):
    """A line fitted to noisy points; the loss draws random numbers too."""

    def loss(params, frozen, batch, key):
        x, y = batch
        noise = 0.1 * jax.random.normal(key, y.shape)
        return jnp.mean((x @ params["w"] * frozen - y + noise) ** 2), {}

    def batches(step):
        rng = np.random.default_rng(step)
        x = rng.normal(size=(8, 3)).astype(np.float32)
        return x, (x @ np.array([1.0, -2.0, 0.5], np.float32))

    def export(ema, folder):
        folder.mkdir()
        np.save(folder / "w.npy", ema["w"])

    return Task("line", {"w": jnp.zeros(3)}, jnp.asarray(scale), loss, batches, export)


def make_blocks_task(rows=6):
    """A stack of two linear blocks under an embedding, as scanned models have them."""

    def loss(params, frozen, batch, key):
        x = params["embedding"][batch]
        for kernel in params["blocks"]["kernel"]:
            x = jnp.tanh(x @ kernel)
        return jnp.mean((x - 1) ** 2), {}

    def export(ema, folder):
        folder.mkdir()
        np.save(folder / "w.npy", ema["blocks"]["kernel"])

    keys = jax.random.split(jax.random.key(0))
    params = {
        "embedding": jax.random.normal(keys[0], (rows, 4)),
        "blocks": {"kernel": 0.1 * jax.random.normal(keys[1], (2, 4, 4))},
    }
    return Task("blocks", params, {}, loss, lambda step: np.arange(rows), export)


def losses(folder):
    return [(row["step"], row["loss"]) for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


def test_a_run_by_muon_resumes_as_one_by_adamw_does(tmp_path):
    config = dataclasses.replace(CONFIG, muon_learning_rate=0.05)
    fit(make_blocks_task(), config, tmp_path / "whole")
    fit(make_blocks_task(), config, tmp_path / "parts", stop_after=5)
    fit(make_blocks_task(), config, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_muon_trains_the_matrices_of_scanned_blocks_and_adamw_the_rest():
    task = make_blocks_task()
    config = TrainConfig(steps=10, learning_rate=0.3, muon_learning_rate=0.1, warmup=0, weight_decay=0.0)
    keys = jax.random.split(jax.random.key(1))
    gradients = {
        "embedding": jax.random.normal(keys[0], (6, 4)),
        "blocks": {"kernel": 2.0 * jnp.eye(4) + 0.5 * jax.random.normal(keys[1], (2, 4, 4))},  # of full rank
    }
    optimizer = config.optimizer()
    state = optimizer.init(task.params)
    _, state = optimizer.update(jax.tree.map(jnp.zeros_like, gradients), state, task.params)  # a rate of zero
    updates, _ = optimizer.update(gradients, state, task.params)
    for update in updates["blocks"]["kernel"]:
        # Newton-Schulz brings singular values near one, not to it: Jordan et al., 2024, say 0.68 to 1.13.
        ratios = np.linalg.svd(update, compute_uv=False) / (0.1 * 0.2 * np.sqrt(4))
        assert np.all((ratios > 0.5) & (ratios < 1.3))
    entries = np.abs(updates["embedding"])
    np.testing.assert_allclose(entries, entries.mean(), rtol=1e-3)  # AdamW's first steps have one size everywhere


def test_a_resumed_run_has_the_losses_and_weights_of_an_undisturbed_one(tmp_path, monkeypatch):
    fit(make_task(), CONFIG, tmp_path / "whole")
    fit(make_task(), CONFIG, tmp_path / "parts", stop_after=5)
    assert not (tmp_path / "parts" / "export").exists()
    with monkeypatch.context() as patch:
        patch.delattr(TrainState, "create")  # the state at step 0 is not computed again
        fit(make_task(), CONFIG, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = (np.load(tmp_path / name / "export" / "w.npy") for name in ("whole", "parts"))
    assert np.array_equal(whole, parts)
    truth = np.array([1.0, -2.0, 0.5])
    assert np.linalg.norm(whole - truth) < np.linalg.norm(truth)  # it moved from zero towards the line


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    fit(make_task(), CONFIG, tmp_path / "run", stop_after=2)
    with pytest.raises(UsageError, match="already holds step 2; add --resume"):
        fit(make_task(), CONFIG, tmp_path / "run")


def test_steps_that_are_not_finite_are_skipped_and_too_many_in_a_row_end_the_run(tmp_path):
    task = make_task()

    def bad_at(steps):
        def batches(step):
            x, y = task.batches(step)
            return x, np.where(step in steps, np.nan, y).astype(np.float32)

        return dataclasses.replace(task, batches=batches)

    state = fit(bad_at({3, 4}), CONFIG, tmp_path / "some")
    assert int(state.skipped) == 2
    assert np.isfinite(state.params["w"]).all()
    rows = [json.loads(line) for line in (tmp_path / "some" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, *[2] * 8]
    config = dataclasses.replace(CONFIG, max_nonfinite_steps=4)
    with pytest.raises(ClvrError, match="of 4 steps in a row are not finite, up to step 7"):
        fit(bad_at(set(range(3, 12))), config, tmp_path / "many")


def test_the_position_of_an_input_is_saved_with_the_state(tmp_path):
    class Rows:
        """Batches of a dataset, read one after the other."""

        def __init__(self):
            self.step = 0

        def __next__(self):
            self.step += 1
            return make_task().batches(7 * self.step)

        def state(self):
            return {"step": self.step}

        def restore(self, state):
            self.step = state["step"]

    def task():
        return dataclasses.replace(make_task(), batches=Rows())

    fit(task(), CONFIG, tmp_path / "whole")
    fit(task(), CONFIG, tmp_path / "parts", stop_after=5)
    fit(task(), CONFIG, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(tmp_path):
    def on(devices, **options):
        config = dataclasses.replace(CONFIG, mesh=MeshConfig(devices=devices))
        return fit(make_blocks_task(rows=8), config, tmp_path / "run", **options)

    on(8, stop_after=4)
    on(4, stop_after=8, resume=True)
    state = on(8, resume=True)
    alone = fit(make_blocks_task(rows=8), CONFIG, tmp_path / "alone")
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state.params)} == {8}
    for found, expected in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_the_average_is_read_back_without_the_optimizer(tmp_path):
    state = fit(make_task(), CONFIG, tmp_path, stop_after=5)
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state.ema)
    ema, step = restore_part(tmp_path / "checkpoints", "ema", wanted)
    assert step == 5
    assert np.array_equal(ema["w"], state.ema["w"])
    with pytest.raises(ClvrError, match="not a checkpoint of this model"):
        restore_part(tmp_path / "checkpoints", "ema", {"v": wanted["w"]})
    with pytest.raises(ClvrError, match="holds no checkpoint"):
        restore_part(tmp_path / "nothing", "ema", wanted)


@pytest.mark.slow
def test_a_profile_is_written_even_of_a_run_that_ends_in_it(tmp_path):
    # The profiler crashed a worker that had run many other tests, so it gets a process of its own.
    run = f"from tests.training.test_trainer import profile_runs; profile_runs({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", run], cwd=ROOT, check=True, timeout=200)


def profile_runs(directory):
    for stop_after in (None, 4):
        out = Path(directory) / str(stop_after)
        fit(make_task(), dataclasses.replace(CONFIG, steps=7, profile=3), out, stop_after=stop_after)
        assert list((out / "profile").rglob("*.xplane.pb"))
        jax.profiler.start_trace(str(out / "again"))  # an error while another trace is open
        jax.profiler.stop_trace()


def test_a_run_that_is_asked_to_stop_logs_and_saves_its_last_step_whatever_the_intervals(tmp_path):
    task = make_task()

    def batches(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return task.batches(step)

    config = dataclasses.replace(CONFIG, log_every=100, checkpoint=CheckpointConfig(save_interval_minutes=1000.0))
    state = fit(dataclasses.replace(task, batches=batches), config, tmp_path)
    (row,) = losses(tmp_path)
    assert row[0] == int(state.step) < 6
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(row[0])]


def test_checkpoints_keep_the_names_of_their_arrays():
    """Checkpoints of earlier versions are found by them."""
    state = TrainState.create({"w": jnp.zeros(3)}, CONFIG.optimizer())
    names = {dotted(path).split(".")[0] for path in leaves_by_path(state)}
    assert names == {"step", "params", "ema", "opt_state", "skipped", "skipped_in_a_row"}
