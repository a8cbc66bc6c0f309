"""DiffusionNFT: a diffusion policy learns from rewards by moving towards what was good and away from what was bad.

Three policies meet in the loss: theta, which trains; old, which drew the samples; a reference that theta stays near.
With x0_theta and x0_old their guesses of the clean sample at x_t, two mixtures are scored against the sample x0 itself:

    x0_plus = beta x0_theta + (1 - beta) x0_old        x0_minus = (1 + beta) x0_old - beta x0_theta
    loss = c [r |x0_plus - x0|^2 / w_plus + (1 - r) |x0_minus - x0|^2 / w_minus] / beta
           + kl_weight |theta - reference|^2

where r in [0, 1] says how good the sample was among those of its group, and each w is that mixture's own mean absolute
error, held constant. Without the w the gradient at theta = old is that of flow matching weighted by 2 r - 1, whatever
beta is. No likelihoods and no stored chains: only clean samples, noised anew.

Everything is a pure function of predictions, so FLUX.2 (a velocity) and SDXL (noise) train alike.

Source: DiffusionNFT (arXiv 2509.16117).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from clvr_jax.diffusion import ForwardProcess
from clvr_jax.errors import ClvrError

Policy = Callable[[jax.Array, jax.Array], jax.Array]
"""(x_t of (b, ...), timesteps of (b,)) -> what the network predicts, of x_t's shape."""

_LEAST_STD = 1e-4
_LEAST_ERROR = 1e-5


@dataclass(frozen=True)
class NFTConfig:
    """Configuration of the loss of DiffusionNFT."""

    beta: float = 1.0
    """How far the implicit positive and negative policies are from the old one, in units of the current policy's
    change; 1 is safe, and 0.1 learns faster and less stably."""
    scale: float = 5.0
    """Weight of the policy loss."""
    kl_weight: float = 1e-5
    """Weight of the distance to the reference policy; 0 switches it off."""
    advantage_clip: float = 5.0
    """Clip advantages to this absolute value."""

    def __post_init__(self) -> None:
        if not self.beta > 0 or not self.scale > 0 or self.kl_weight < 0 or not self.advantage_clip > 0:
            raise ClvrError(f"{self}: beta, scale and advantage_clip must be positive, kl_weight not negative")


class Advantages(NamedTuple):
    """values (n,): of each sample, 0 where it does not count. counts (n,): whether it does.
    zero_variance: groups whose rewards are all the same, which teach nothing. mean, std (groups,): of each group's
    rewards, in `np.unique` order."""

    values: np.ndarray
    counts: np.ndarray
    zero_variance: int
    mean: np.ndarray
    std: np.ndarray


def group_advantages(
    rewards_n: ArrayLike, groups_n: ArrayLike, spread: Literal["group", "epoch"] = "group"
) -> Advantages:
    """How much better each sample is than its group, in standard deviations.

    Args:
      rewards_n: (n,); NaN or infinite where there is no reward. Such a sample leaves its group: it is not a bad one.
      groups_n: (n,) key of each sample's group, the trajectory step that it was drawn for.
      spread: deviation to divide by, of the group or of all rewards of the epoch.
    Raises: ClvrError if the shapes differ or no sample has a reward.
    """
    rewards, groups = np.asarray(rewards_n, np.float64), np.asarray(groups_n)
    if rewards.shape != groups.shape or rewards.ndim != 1:
        raise ClvrError(f"advantages: rewards have shape {rewards.shape}, groups {groups.shape}; both must be (n,)")
    counts = np.isfinite(rewards)
    if not counts.any():
        raise ClvrError(f"advantages: none of {rewards.size} samples has a reward")
    _, group = np.unique(groups, return_inverse=True)
    size = np.bincount(group, counts)
    known = np.where(counts, rewards, 0.0)
    mean = np.bincount(group, known) / np.maximum(size, 1)
    centered = np.where(counts, rewards - mean[group], 0.0)
    std = np.sqrt(np.bincount(group, centered**2) / np.maximum(size, 1))
    width = std[group] if spread == "group" else rewards[counts].std()
    same = (size > 0) & (std <= 1e-12 * (1 + np.abs(mean)))
    values = np.where(same[group], 0.0, centered / (width + _LEAST_STD))
    return Advantages(values, counts, int(same.sum()), mean, std)


def optimality(advantages: ArrayLike, clip: float) -> jax.Array:
    """Advantages -> r in [0, 1]: 0.5 is the group's mean, 0 and 1 are `clip` deviations from it or more."""
    return jnp.clip(jnp.clip(jnp.asarray(advantages), -clip, clip) / (2 * clip) + 0.5, 0, 1)


def nft_loss(
    theta: Policy,
    old: Policy,
    reference: Policy,
    x0: jax.Array,
    optimality_b: jax.Array,
    counts_b: jax.Array,
    t_b: jax.Array,
    key: jax.Array,
    forward_process: ForwardProcess,
    config: NFTConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of theta on samples that old drew.

    Args:
      theta, old, reference: the three policies, guided alike if the samples were; only theta gets a gradient.
      x0: (b, ...) clean latents of the samples.
      optimality_b: r of each, see `optimality`.
      counts_b: 1 where a sample counts, 0 where it has no reward.
      t_b: timesteps of the roll-out to learn at.
      key: for the noise; or (b,) keys, one for each sample, whose noise then does not depend on its place.
      forward_process: of this architecture.
      config: weights of the loss.
    Returns: scalar float32, averaged over the samples that count; and metrics: "policy_loss", "kl" (mean squared
      distance to the reference), "norm_ratio" (mean log |theta| / |reference|: inflated predictions are a sign of
      reward hacking), and "weight", the samples that count (see `training.step.Loss`).
    """
    noise = normal(key, x0.shape).astype(x0.dtype)
    x_t = forward_process.corrupt(x0, noise, t_b)
    predicted = theta(x_t, t_b)
    fixed, anchor = (jax.lax.stop_gradient(policy(x_t, t_b)) for policy in (old, reference))
    target = x0.astype(jnp.float32)
    new, before = (forward_process.predict_x0(x_t, out, t_b).astype(jnp.float32) for out in (predicted, fixed))

    def error(mixture: jax.Array) -> jax.Array:
        """(b,) mean squared error in units of the mean absolute one."""
        width = jax.lax.stop_gradient(jnp.maximum(mean_b(jnp.abs(mixture - target)), _LEAST_ERROR))
        return mean_b(jnp.square(mixture - target)) / width

    beta = config.beta
    towards = error(beta * new + (1 - beta) * before)
    away = error((1 + beta) * before - beta * new)
    policy_b = config.scale * (optimality_b * towards + (1 - optimality_b) * away) / beta
    kl_b, ratio_b = distances(predicted, anchor)
    mean, weight = mean_of_counted(counts_b)
    loss = mean(policy_b) + config.kl_weight * mean(kl_b)
    parts = {"policy_loss": mean(policy_b), "kl": mean(kl_b), "norm_ratio": mean(ratio_b)}
    return loss, {**parts, "weight": weight}


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """(b, ...) standard normal; of one key, or of (b,) keys, one for each row."""
    if key.ndim == 0:
        return jax.random.normal(key, shape)
    return jax.vmap(lambda own: jax.random.normal(own, shape[1:]))(key)


def old_decay(step: ArrayLike, kind: Literal["linear", "delayed"] = "linear") -> jax.Array:
    """d of old <- d old + (1 - d) theta after an epoch, `step` optimizer steps into the run.

    linear: min(.001 step, .5), the policy that samples follows quickly. delayed: 0 for 75 steps, then slower and
    slower, up to .999.
    """
    step = jnp.asarray(step, jnp.float32)
    if kind == "linear":
        return jnp.minimum(0.001 * step, 0.5)
    return jnp.where(step < 75, 0.0, jnp.minimum(0.0075 * (step - 75), 0.999))


def distances(predicted: jax.Array, anchor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(b,) mean squared distance of predictions; and log of their norms' ratio, which gets no gradient."""
    predicted, anchor = predicted.astype(jnp.float32), anchor.astype(jnp.float32)
    ratio_b = 0.5 * jnp.log(mean_b(jnp.square(predicted)) / mean_b(jnp.square(anchor)))
    return mean_b(jnp.square(predicted - anchor)), jax.lax.stop_gradient(ratio_b)


def mean_of_counted(counts_b: jax.Array) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """The mean over samples that count, as a function of (b,) values; and how many they are."""
    weight = counts_b.astype(jnp.float32).sum()

    def mean(values_b: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(counts_b != 0, values_b, 0.0)) / jnp.maximum(weight, 1)

    return mean, weight


def mean_b(x: jax.Array) -> jax.Array:
    """(b, ...) -> (b,) mean over all but the first axis."""
    return x.reshape(x.shape[0], -1).mean(1)
