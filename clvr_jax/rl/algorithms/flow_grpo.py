"""Flow-GRPO: a policy gradient for flows, whose sampler is made random so that its steps have likelihoods.

Run from t = 1 to 0, the flow dx = v dt and the random process

    dx = [v + s^2 / (2 t) (x + (1 - t) v)] dt + s dw,        s = eta sqrt(t / (1 - t)),

have the same distribution at every t. A step of it is Gaussian, so theta's ratio to the policy that drew is known:

    ratio = exp(log p_theta - log p_old)        of the step, by the mean log-density over the latent's numbers
    loss = - min(ratio A, clip(ratio, 1 - c, 1 + c) A) + kl_weight KL(theta | reference)

The last interval, which ends at 0, has no noise: it would stay in the picture. So nothing is learned there.

Source: Flow-GRPO (arXiv 2505.05470).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from clvr_jax.diffusion import Velocity, append_dims
from clvr_jax.errors import ClvrError
from clvr_jax.rl.algorithms.diffusion_nft import Policy, distances, mean_b, mean_of_counted, normal


@dataclass(frozen=True)
class GRPOConfig:
    """Configuration of the sampler and the loss of Flow-GRPO."""

    eta: float = 0.7
    """Noise level of the stochastic sampler; it must be positive."""
    clip: float = 1e-4
    """Clip the probability ratio to 1 - clip and 1 + clip; the ratio is close to 1, because it uses the mean
    log-density over the latents."""
    kl_weight: float = 0.04
    """Weight of the KL divergence from the reference policy; 0 switches it off."""
    advantage_clip: float = 5.0
    """Clip advantages to this absolute value."""

    def __post_init__(self) -> None:
        if not self.eta > 0 or not self.clip > 0 or self.kl_weight < 0 or not self.advantage_clip > 0:
            raise ClvrError(f"{self}: eta, clip and advantage_clip must be positive, kl_weight not negative")


def sde_step(
    x: jax.Array, velocity: jax.Array, t: jax.Array, next_t: jax.Array, eta: float
) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of x at `next_t`, given x at t; both in float32.

    Args:
      x, velocity: (b, ...).
      t, next_t: (b,), decreasing; s is infinite at t = 1, where that of `next_t` is taken in its place.
      eta: see `GRPOConfig`.
    Returns: mean (b, ...); deviation (b, 1, ...), 0 where `next_t` is 0.
    """
    x, velocity = x.astype(jnp.float32), velocity.astype(jnp.float32)
    t, next_t = append_dims(t, x), append_dims(next_t, x)
    variance = jnp.where(next_t > 0, eta**2 * t / (1 - jnp.where(t < 1, t, next_t)), 0.0)
    drift = velocity + variance / (2 * t) * (x + (1 - t) * velocity)
    return x + (next_t - t) * drift, jnp.sqrt(variance * (t - next_t))


def sde_path(velocity: Velocity, noise: jax.Array, sigmas: jax.Array, eta: float, key: jax.Array) -> jax.Array:
    """The states of a random roll-out.

    Args:
      velocity: (x, scalar sigma) -> velocity; the guided model.
      noise: (b, ...) state at sigmas[0].
      sigmas: (n + 1,) decreasing, to 0 or not.
      eta: see `GRPOConfig`.
      key: for the noise on the way, or (b,) keys, one for each row.
    Returns: (b, n + 1, ...), the state at each of `sigmas`, in the dtype of noise.
    """

    def step(x: jax.Array, interval: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        number, sigma, next_sigma = interval
        at, end = (jnp.full(len(x), level) for level in (sigma, next_sigma))
        mean, deviation = sde_step(x, velocity(x, sigma), at, end, eta)
        fold = jax.random.fold_in if key.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))
        following = (mean + deviation * normal(fold(key, number), x.shape)).astype(x.dtype)
        return following, following

    intervals = (jnp.arange(len(sigmas) - 1), sigmas[:-1], sigmas[1:])
    states = jax.lax.scan(step, noise, intervals)[1]
    return jnp.concatenate([noise[:, None], jnp.moveaxis(states, 0, 1)], axis=1)


def grpo_loss(
    theta: Policy,
    old: Policy,
    reference: Policy,
    x_t: jax.Array,
    x_next: jax.Array,
    advantages_b: jax.Array,
    counts_b: jax.Array,
    t_b: jax.Array,
    next_t_b: jax.Array,
    config: GRPOConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of theta on steps that old took.

    Args:
      theta, old, reference: the three policies, guided alike if the samples were; only theta gets a gradient. Old's
        density is computed again, not stored: the same program gives the same rounding, and the clip is narrow.
      x_t, x_next: (b, ...) a state of each sample's path, and the next one.
      advantages_b: of each sample, see `group_advantages`.
      counts_b: 1 where a sample counts, 0 where it has no reward.
      t_b, next_t_b: noise levels of the two states, `next_t_b` above 0.
      config: weights of the loss.
    Returns: scalar float32, averaged over the samples that count; and the metrics of `nft_loss` ("policy_loss", "kl",
      "norm_ratio", "weight") with "clipped", the share of samples that the clip keeps from teaching.
    """
    predicted = theta(x_t, t_b)
    fixed, anchor = (jax.lax.stop_gradient(policy(x_t, t_b)) for policy in (old, reference))
    means = [sde_step(x_t, out, t_b, next_t_b, config.eta)[0] for out in (predicted, fixed, anchor)]
    deviation = sde_step(x_t, fixed, t_b, next_t_b, config.eta)[1]

    def distance(one: jax.Array, two: jax.Array) -> jax.Array:
        """(b,) half the mean squared distance, in deviations of the step."""
        return mean_b(jnp.square((one - two) / deviation)) / 2

    new, before, base = means
    following = x_next.astype(jnp.float32)
    ratio_b = jnp.exp(distance(following, before) - distance(following, new))
    bounded_b = jnp.clip(ratio_b, 1 - config.clip, 1 + config.clip)
    gain_b = jnp.minimum(ratio_b * advantages_b, bounded_b * advantages_b)
    kl_b, norm_ratio_b = distances(predicted, anchor)
    mean, weight = mean_of_counted(counts_b)
    loss = config.kl_weight * mean(distance(new, base)) - mean(gain_b)
    clipped_b = (bounded_b * advantages_b < ratio_b * advantages_b).astype(jnp.float32)
    parts = {
        "policy_loss": -mean(gain_b),
        "kl": mean(kl_b),
        "norm_ratio": mean(norm_ratio_b),
        "clipped": mean(clipped_b),
    }
    return loss, {**parts, "weight": weight}
