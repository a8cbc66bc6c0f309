"""Fits a line; a recipe that starts in no time, for tests that kill it."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from clvr_jax.sharding import with_logical_constraint
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.trainer import Task, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """pause: seconds that a batch takes. slow: the only process whose batches take them; -1 is all. die: process that
    ends without a word at step 10, if any. ballast: random numbers among the parameters that do nothing but make
    checkpoints large."""

    train: TrainConfig = TrainConfig(
        steps=40, learning_rate=0.05, log_every=1, checkpoint=CheckpointConfig(save_interval_minutes=0.0)
    )
    pause: float = 0.0
    slow: int = -1
    die: int = -1
    ballast: int = 0


CONFIG = Config()


def task(config: Config) -> Task:
    """The run as the trainer takes it."""

    def loss(params, frozen, batch, key):
        x, y = batch
        return jnp.mean((x @ params["w"] - y + 0.1 * jax.random.normal(key, y.shape)) ** 2), {}

    def batches(step):
        if config.slow in (-1, jax.process_index()):
            time.sleep(config.pause)
        if step == 10 and config.die == jax.process_index():
            import os

            os._exit(9)
        x = np.random.default_rng(step).normal(size=(8, 8)).astype(np.float32)
        return x, x @ np.linspace(-1, 1, 8, dtype=np.float32)

    def export(ema, folder):
        folder.mkdir(parents=True, exist_ok=True)
        # One process computes alone, with what would be a message to the others in a step.
        w = jax.jit(lambda w: with_logical_constraint(w, "batch"))(ema["w"])
        np.save(folder / "w.npy", np.asarray(w))

    params = {"w": jnp.zeros(8)}
    if config.ballast:
        params["ballast"] = jax.random.normal(jax.random.key(0), (config.ballast,))
    return Task("line", params, {}, loss, batches, export)
