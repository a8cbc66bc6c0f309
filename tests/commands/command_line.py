"""A prompt, a recipe that learns a vector in no time, and the reader of errors, for tests of commands."""

PROMPT = "a red circle left of a blue star"
RECIPE = '''
"""Learns a vector. Second sentence."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from clvr_jax.sharding import MeshConfig
from clvr_jax.training.trainer import Task, TrainConfig

ONE_DEVICE = MeshConfig(devices=1)


@dataclasses.dataclass(frozen=True)
class Config:
    """target: what to learn."""

    train: TrainConfig = TrainConfig(steps=4, learning_rate=0.1, log_every=1, mesh=ONE_DEVICE)
    target: float = 3.0


CONFIG = Config()


def task(config):
    def loss(params, frozen, batch, key):
        return jnp.mean((params["x"] - batch) ** 2), {}

    def export(ema, folder):
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "x.npy", np.asarray(ema["x"]))

    batches = lambda step: np.full(3, config.target, np.float32)
    return Task("vector", {"x": jnp.zeros(3)}, {}, loss, batches, export)
'''


def complaint(capsys) -> str:
    """The one line on stderr; nothing may stand on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("clvr: ")
    return lines[0]
