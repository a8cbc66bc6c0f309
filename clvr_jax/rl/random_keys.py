"""Random keys of samples, which depend on the sample alone, so that no batch and no mesh changes an image."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, PyTree

NOISE, TIMESTEPS, LOSS, PATH = range(4)
"""Purposes of random numbers: initial noise, order of timesteps, noise in the loss, noise of a sampled path."""


class RandomSource(NamedTuple):
    """What the random numbers of a microbatch depend on.

    seed, epoch: int32 scalars; data, not constants, so that runs with different seeds share their compiled programs.
    step_number: (g,) int32, the number of each group's trajectory step. The planner has shapes in their place.
    """

    seed: PyTree
    epoch: PyTree
    step_number: PyTree


def sample_keys(source: RandomSource, group_size: int, *purpose: int | Int[Array, ""]) -> Key[Array, " b"]:
    """Returns keys (g * group_size,) from seed, epoch, purpose, the sample's trajectory step and index in the group.

    Args:
      source: of the microbatch.
      group_size: number of samples in each group.
      purpose: one of NOISE, TIMESTEPS, LOSS, PATH, and further integers if it has several draws.
    """
    key = jax.random.fold_in(jax.random.key(source.seed), source.epoch)
    for number in purpose:
        key = jax.random.fold_in(key, number)
    step_numbers = jnp.repeat(source.step_number, group_size)
    indices = jnp.tile(jnp.arange(group_size), len(source.step_number))
    return jax.vmap(lambda step, index: jax.random.fold_in(jax.random.fold_in(key, step), index))(step_numbers, indices)
