"""The toy of `pprl_toy` as a recipe, for processes of their own."""

import dataclasses
from pathlib import Path

from clvr_jax import rl
from tests.rl.pprl_toy import changed, judged_on_the_mesh, make_task

fit = rl.fit


@dataclasses.dataclass(frozen=True)
class Config:
    """dataset: of trajectories with proxy prompts. judge: directory of a Qwen3-VL; none if it is empty."""

    train: rl.PPRLConfig = dataclasses.field(default_factory=changed)
    dataset: Path = Path()
    judge: str = ""


CONFIG = Config()


def task(config):
    """The run as `fit` takes it."""
    reward = judged_on_the_mesh(config.judge) if config.judge else None
    return make_task(config.dataset, config.train, reward)
