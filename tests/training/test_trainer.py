import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.training.trainer import Task, TrainConfig, fit

CONFIG = TrainConfig(steps=12, learning_rate=0.05, log_every=1)


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


def losses(folder):
    return [(row["step"], row["loss"]) for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


def test_a_resumed_run_has_the_losses_and_weights_of_an_undisturbed_one(tmp_path):
    fit(make_task(), CONFIG, tmp_path / "whole")
    fit(make_task(), CONFIG, tmp_path / "parts", stop_after=5)
    assert not (tmp_path / "parts" / "export").exists()
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


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(ClvrError, match="the loss is nan near step 1"):
        fit(make_task(scale=float("nan")), CONFIG, tmp_path / "run")
