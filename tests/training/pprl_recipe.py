"""The toy of `pprl_toy` as a recipe, for processes of their own."""

import dataclasses
from pathlib import Path

from clvr_jax.training import pprl
from clvr_jax.training.pprl_step import PPRLConfig
from tests.training.pprl_toy import changed, make_task

fit = pprl.fit


@dataclasses.dataclass(frozen=True)
class Config:
    """dataset: of trajectories with proxy prompts."""

    train: PPRLConfig = dataclasses.field(default_factory=changed)
    dataset: Path = Path()


CONFIG = Config()


def task(config):
    """The run as `fit` takes it."""
    return make_task(config.dataset, config.train)
