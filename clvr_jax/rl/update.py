"""Update: gradients of the loss at sampled timesteps, an optimizer step, and the old policy that follows.

The policies are three trees of weights on one base: `params`, which are trained; `old`, which samples; the base itself
is the reference. LoRA trees are multiplied out inside each program.

Source: DiffusionNFT (arXiv 2509.16117) as PPRL (arXiv 2605.14876) uses it; Flow-GRPO (arXiv 2505.05470).
"""

import dataclasses
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from clvr_jax.rl.algorithms import Predictors, RLAlgorithm
from clvr_jax.rl.algorithms.base import Metrics
from clvr_jax.rl.config import PPRLConfig
from clvr_jax.rl.policy import DiffusionPolicy
from clvr_jax.rl.random_keys import LOSS, TIMESTEPS, RandomSource, sample_keys
from clvr_jax.rl.rollout import repeat_for_samples
from clvr_jax.rl.state import PPRLState
from clvr_jax.training.optimization import step
from clvr_jax.training.optimization.step import GradAccumulator
from clvr_jax.trees import Params


class UpdateBatch(NamedTuple):
    """The input of the loss for the b samples of g groups.

    samples, conditions: of the rollout. sample_weights: (b,), see `RLAlgorithm.sample_weights`. valid_mask: (b,), 1
    where a sample has a reward, else 0. inner_step: int32 scalar, index into the timesteps of each sample, which are in
    random order. source: of the random numbers. The planner has shapes in their place.
    """

    samples: PyTree
    conditions: PyTree
    sample_weights: PyTree
    valid_mask: PyTree
    inner_step: PyTree
    source: RandomSource


def loss_and_grads(
    policy: DiffusionPolicy, config: PPRLConfig, params: Params, base: Params, old: Params, batch: UpdateBatch
) -> GradAccumulator:
    """Computes loss, metrics and gradients for the samples of a microbatch at one of their timesteps, as sums."""
    algorithm = config.make_algorithm(policy)
    conditions = repeat_for_samples(batch.conditions, config.group_size)
    timestep_keys = sample_keys(batch.source, config.group_size, TIMESTEPS)
    orders = jax.vmap(lambda key: jax.random.permutation(key, algorithm.num_train_timesteps))(timestep_keys)
    timestep_index_b = orders[:, batch.inner_step]
    loss_keys = sample_keys(batch.source, config.group_size, LOSS, batch.inner_step)
    old_predictor = policy.predictor(config.policy_weights(base, old), conditions)
    reference = policy.predictor(base, conditions)

    def weighted_loss(params: Params) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        theta = policy.predictor(config.policy_weights(base, params), conditions)
        loss, metrics = algorithm.loss(
            Predictors(theta, old_predictor, reference),
            batch.samples,
            batch.sample_weights,
            batch.valid_mask,
            timestep_index_b,
            loss_keys,
        )
        weight = metrics.pop("weight")
        return loss * weight, (weight, {**metrics, "loss": loss})

    grads, (weight, metrics) = jax.grad(weighted_loss, has_aux=True)(params)
    return GradAccumulator(grads, {name: value * weight for name, value in metrics.items()}, weight)


def apply_gradients(config: PPRLConfig, state: PPRLState, sums: GradAccumulator) -> tuple[PPRLState, Metrics]:
    """Takes one optimizer step on the mean over valid samples; one that is not finite changes only the counters."""
    grads, metrics = sums.mean()
    next_state, norm = step.apply_gradients(state, grads, metrics["loss"], config.optimizer.make(), config.ema_decay)
    return next_state, {**metrics, "grad_norm": norm}


def update_old_policy(algorithm: RLAlgorithm, state: PPRLState) -> PPRLState:
    """Ends an epoch: old <- d old + (1 - d) params."""
    decay = algorithm.old_decay(state.step)
    old = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.old, state.params)
    return dataclasses.replace(state, epoch=state.epoch + 1, old=old)
