"""Group-relative advantages: how much better each sample is than the others of its group."""

from typing import Literal, NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float64

from clvr_jax.errors import ClvrError

_MIN_STD = 1e-4


class Advantages(NamedTuple):
    """The advantages of n samples.

    values (n,): 0 where a sample has no reward. valid_mask (n,): whether it has one. zero_variance: number of groups
    whose rewards are all equal, from which nothing is learned. mean, std (groups,): of each group's rewards, in
    `np.unique` order.
    """

    values: Float64[np.ndarray, " n"]
    valid_mask: Bool[np.ndarray, " n"]
    zero_variance: int
    mean: Float64[np.ndarray, " g"]
    std: Float64[np.ndarray, " g"]


def group_advantages(
    rewards_n: ArrayLike, groups_n: ArrayLike, normalization: Literal["group", "epoch"] = "group"
) -> Advantages:
    """Computes the advantage of each sample over its group, in standard deviations.

    Args:
      rewards_n: (n,); NaN or infinite where there is no reward. Such a sample leaves its group: it is not a bad one.
      groups_n: (n,) key of each sample's group, the trajectory step that it was sampled for.
      normalization: standard deviation to divide by, of the rewards in the group or of all rewards in the epoch.
    Raises: ClvrError if the shapes differ or no sample has a reward.
    """
    rewards, groups = np.asarray(rewards_n, np.float64), np.asarray(groups_n)
    if rewards.shape != groups.shape or rewards.ndim != 1:
        raise ClvrError(f"advantages: rewards have shape {rewards.shape}, groups {groups.shape}; both must be (n,)")
    valid = np.isfinite(rewards)
    if not valid.any():
        raise ClvrError(f"advantages: none of {rewards.size} samples has a reward")
    _, group = np.unique(groups, return_inverse=True)
    size = np.bincount(group, valid)
    known = np.where(valid, rewards, 0.0)
    mean = np.bincount(group, known) / np.maximum(size, 1)
    centered = np.where(valid, rewards - mean[group], 0.0)
    std = np.sqrt(np.bincount(group, centered**2) / np.maximum(size, 1))
    scale = std[group] if normalization == "group" else rewards[valid].std()
    has_zero_variance = (size > 0) & (std <= 1e-12 * (1 + np.abs(mean)))
    values = np.where(has_zero_variance[group], 0.0, centered / (scale + _MIN_STD))
    return Advantages(values, valid, int(has_zero_variance.sum()), mean, std)
