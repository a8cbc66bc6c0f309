import dataclasses
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


def make_blocks_task():
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
        "embedding": jax.random.normal(keys[0], (6, 4)),
        "blocks": {"kernel": 0.1 * jax.random.normal(keys[1], (2, 4, 4))},
    }
    return Task("blocks", params, {}, loss, lambda step: np.arange(6), export)


def losses(folder):
    return [(row["step"], row["loss"]) for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


def test_a_run_by_muon_resumes_as_one_by_adamw_does(tmp_path):
    config = dataclasses.replace(CONFIG, muon_learning_rate=0.05)
    fit(make_blocks_task(), config, tmp_path / "whole")
    fit(make_blocks_task(), config, tmp_path / "parts", stop_after=5)
    fit(make_blocks_task(), config, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


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
