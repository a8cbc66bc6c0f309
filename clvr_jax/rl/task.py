"""The task that a recipe passes to the RL trainer."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

from clvr_jax.data.trajectories.proxy_steps import ProxyStep, ProxySteps
from clvr_jax.rewards.proxy_prompt_generator import ProxyPromptGenerator
from clvr_jax.rewards.reward import Reward
from clvr_jax.rl.config import PPRLConfig
from clvr_jax.rl.policy import DiffusionPolicy
from clvr_jax.trees import Batch, Params


@dataclasses.dataclass(frozen=True)
class PPRLTask:
    """The model, data and reward of a run.

    name: shown in progress lines. config: of the run. base: weights of the initial model, the reference of the loss.
    frozen: pytree of everything else that the policy reads. policy: the architecture. steps: trajectory steps that
    images are sampled for. data: (steps of one bucket) -> input of `DiffusionPolicy.encode_conditions`, a pytree of
    NumPy arrays with one row for each step. bucket: steps with the same key have data of the same shapes. reward:
    scores the images. save: (weights, trained parameters, directory) -> None, writes the trained model.
    proxy_prompt_generator: writes proxy prompts during training; None uses the dataset's.
    """

    name: str
    config: PPRLConfig
    base: Params
    frozen: Params
    policy: DiffusionPolicy
    steps: ProxySteps
    data: Callable[[Sequence[ProxyStep]], Batch]
    bucket: Callable[[ProxyStep], Hashable]
    reward: Reward
    save: Callable[[Params, Params, Path], None]
    proxy_prompt_generator: ProxyPromptGenerator | None = None

    @property
    def params(self) -> Params:
        """The initial parameters; `recipes.export_run` restores a tree of the same structure."""
        return self.config.init_params(self.base)

    def export(self, params: Params, directory: Path) -> None:
        """Writes the model with trained parameters."""
        self.save(self.config.policy_weights(self.base, params), params, directory)
