"""Rollout: the old policy samples a group of images for each trajectory step of a microbatch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped

from clvr_jax.rl.algorithms.base import standard_normal
from clvr_jax.rl.config import PPRLConfig
from clvr_jax.rl.policy import DiffusionPolicy
from clvr_jax.rl.random_keys import NOISE, PATH, RandomSource, sample_keys
from clvr_jax.sharding import with_logical_constraint
from clvr_jax.trees import Params


class RolloutBatch(NamedTuple):
    """The input of a rollout. data: (g, ...) for `DiffusionPolicy.encode_conditions`. source: of its random numbers."""

    data: PyTree
    source: RandomSource


class Rollout(NamedTuple):
    """The result of a rollout.

    samples: (b, ...), which the update learns from, see `RLAlgorithm.sample`. images: (b, h, w, 3) uint8. conditions:
    pytree with one row for each group.
    """

    samples: jax.Array
    images: jax.Array
    conditions: PyTree


def collect_rollout(
    policy: DiffusionPolicy, config: PPRLConfig, base: Params, old: Params, frozen: Params, batch: RolloutBatch
) -> Rollout:
    """Samples `group_size` images for each group with the old policy.

    Args:
      policy, config: of the run.
      base: weights of the initial model. old: parameters of the old policy. frozen: what else the policy reads.
      batch: of g groups; b = g * group_size.
    """
    conditions = policy.encode_conditions(frozen, batch.data)
    predictor = policy.predictor(config.policy_weights(base, old), repeat_for_samples(conditions, config.group_size))
    noise_keys, path_keys = (sample_keys(batch.source, config.group_size, purpose) for purpose in (NOISE, PATH))
    noise = shard_rows(standard_normal(noise_keys, (config.microbatch_size, *policy.latent_shape)))
    algorithm = config.make_algorithm(policy)
    samples = algorithm.sample(predictor, noise, path_keys)
    images = jnp.round(255 * policy.decode(frozen, algorithm.final_latents(samples))).astype(jnp.uint8)
    return Rollout(samples, images, conditions)


def repeat_for_samples(conditions: PyTree, group_size: int) -> PyTree:
    """Repeats the conditions of groups (g, ...) for their samples (g * group_size, ...)."""
    return jax.tree.map(lambda leaf: shard_rows(jnp.repeat(leaf, group_size, axis=0)), conditions)


def shard_rows(x: Shaped[Array, "b *d"]) -> Shaped[Array, "b *d"]:
    """Shards an array (b, ...) by rows."""
    return with_logical_constraint(x, "batch", *[None] * (x.ndim - 1))
