"""The toy of `pprl_toy` as a recipe, for processes of their own."""

import dataclasses
from pathlib import Path

from clvr_jax.rl import trainer
from clvr_jax.rl.update import PPRLConfig
from tests.rl.pprl_toy import changed, judged_on_the_mesh, make_task

fit = trainer.fit


@dataclasses.dataclass(frozen=True)
class Config:
    """dataset: of trajectories with proxy prompts. judge: folder of a Qwen3-VL; none if it is empty."""

    train: PPRLConfig = dataclasses.field(default_factory=changed)
    dataset: Path = Path()
    judge: str = ""


CONFIG = Config()


def task(config):
    """The run as `fit` takes it."""
    reward = judged_on_the_mesh(config.judge) if config.judge else None
    return make_task(config.dataset, config.train, reward)
