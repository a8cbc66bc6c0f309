"""Reinforcement learning of diffusion policies with proxy prompts (PPRL).

An epoch is `EpochRunner.run`; here it is in six lines:

    rollout = collect_rollout(policy, config, base, state.old, frozen, batch)            # sample
    scores = reward.scores(images_with_proxy_prompts)                                    # score
    advantages = group_advantages(scores.values, groups)                                 # advantages
    sums = loss_and_grads(policy, config, state.params, base, state.old, update_batch)   # update
    state, metrics = apply_gradients(config, state, sums)
    state = update_old_policy(algorithm, state)                                          # old policy

`DiffusionPolicy` is what an architecture has to provide, `RLAlgorithm` what an algorithm has to: DiffusionNFT or
Flow-GRPO. A recipe makes a `PPRLTask` and passes it to `fit`.

Source: arXiv 2605.14876 (PPRL); arXiv 2509.16117 (DiffusionNFT); arXiv 2505.05470 (Flow-GRPO).
"""

from clvr_jax.rl.advantages import Advantages, group_advantages
from clvr_jax.rl.algorithms import DiffusionNFT, FlowGRPO, GRPOConfig, NFTConfig, RLAlgorithm
from clvr_jax.rl.config import PPRLConfig
from clvr_jax.rl.policy import DiffusionPolicy, Predictor
from clvr_jax.rl.random_keys import RandomSource
from clvr_jax.rl.rollout import Rollout, RolloutBatch, collect_rollout
from clvr_jax.rl.state import PPRLState
from clvr_jax.rl.task import PPRLTask
from clvr_jax.rl.trainer import fit
from clvr_jax.rl.update import UpdateBatch, apply_gradients, loss_and_grads, update_old_policy
from clvr_jax.training.optimization.step import GradAccumulator

__all__ = [
    "Advantages",
    "DiffusionNFT",
    "DiffusionPolicy",
    "FlowGRPO",
    "GRPOConfig",
    "GradAccumulator",
    "NFTConfig",
    "PPRLConfig",
    "PPRLState",
    "PPRLTask",
    "Predictor",
    "RLAlgorithm",
    "RandomSource",
    "Rollout",
    "RolloutBatch",
    "UpdateBatch",
    "apply_gradients",
    "collect_rollout",
    "fit",
    "group_advantages",
    "loss_and_grads",
    "update_old_policy",
]
