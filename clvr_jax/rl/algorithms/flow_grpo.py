"""Flow-GRPO: a policy gradient for flows, whose sampler is stochastic so that its steps have likelihoods.

From t = 1 to 0, the flow dx = v dt and the stochastic process

    dx = [v + s^2 / (2 t) (x + (1 - t) v)] dt + s dw,        s = eta sqrt(t / (1 - t)),

have the same distribution at every t. A step of it is Gaussian, so the probability ratio of theta and old is known:

    ratio = exp(log p_theta - log p_old)        of the step, by the mean log-density over the latents
    loss = - min(ratio A, clip(ratio, 1 - c, 1 + c) A) + kl_weight KL(theta | reference)

The last interval, which ends at 0, has no noise: it would remain in the image. So nothing is learned there.

Source: Flow-GRPO (arXiv 2505.05470).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int, Key, PRNGKeyArray, Shaped
from typing_extensions import override

from clvr_jax.diffusion import FlowProcess, Velocity, append_dims
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.rl.algorithms.base import (
    Metrics,
    Predictors,
    RLAlgorithm,
    masked_mean,
    mean_per_sample,
    reference_distance,
    standard_normal,
)
from clvr_jax.rl.policy import DiffusionPolicy, Predictor


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


class FlowGRPO(RLAlgorithm):
    """Flow-GRPO for one architecture. It samples by the SDE and stores the sampled path; only for velocities."""

    metrics = ("policy_loss", "kl", "norm_ratio", "clipped")

    def __init__(self, policy: DiffusionPolicy, config: GRPOConfig):
        if not isinstance(policy.forward_process, FlowProcess):
            raise UsageError("Flow-GRPO: this model predicts no velocity; train it with --train.algorithm nft")
        if len(policy.timesteps) < 2:
            raise UsageError("Flow-GRPO: learns from all steps of the rollout but the last; it needs two or more")
        self._config, self._sigmas = config, np.append(policy.timesteps, 0).astype(np.float32)
        self.sample_shape = (len(self._sigmas), *policy.latent_shape)
        self.num_train_timesteps = len(policy.timesteps) - 1

    @override
    def sample(
        self, predictor: Predictor, noise: Float[Array, "b *d"], key_b: Key[Array, " b"]
    ) -> Float[Array, "b *s"]:
        sigmas = jnp.asarray(self._sigmas)
        return sample_path(
            lambda x, sigma: predictor(x, jnp.full(len(x), sigma)), noise, sigmas, self._config.eta, key_b
        )

    @override
    def final_latents(self, samples: Float[Array, "b *s"]) -> Float[Array, "b *d"]:
        return samples[:, -1]

    @override
    def sample_weights(self, advantages: ArrayLike) -> Float[Array, "..."]:
        """Returns the advantages, clipped."""
        return jnp.clip(jnp.asarray(advantages), -self._config.advantage_clip, self._config.advantage_clip)

    @override
    def loss(
        self,
        predictors: Predictors,
        samples: Float[Array, "b *s"],
        sample_weights_b: Float[Array, " b"],
        valid_mask_b: Shaped[Array, " b"],
        timestep_index_b: Int[Array, " b"],
        key_b: Key[Array, " b"],
    ) -> tuple[Float[Array, ""], Metrics]:
        rows, sigmas = jnp.arange(len(samples)), jnp.asarray(self._sigmas)
        x_t, x_next = samples[rows, timestep_index_b], samples[rows, timestep_index_b + 1]
        levels = sigmas[timestep_index_b], sigmas[timestep_index_b + 1]
        return grpo_loss(*predictors, x_t, x_next, sample_weights_b, valid_mask_b, *levels, self._config)

    @override
    def old_decay(self, step: ArrayLike) -> ArrayLike:
        """Returns 0: the policy that samples is the one that is trained."""
        return 0.0


def sde_step(
    x: Float[Array, "b *d"],
    velocity: Float[Array, "b *d"],
    t: Float[Array, " b"],
    next_t: Float[Array, " b"],
    eta: float,
) -> tuple[Float32[Array, "b *d"], Float32[Array, "b *ones"]]:
    """Returns mean and standard deviation of x at `next_t`, given x at t; both in float32.

    Args:
      x, velocity: (b, ...).
      t, next_t: (b,), decreasing; s is infinite at t = 1, where its value at `next_t` is used.
      eta: see `GRPOConfig`.
    Returns: mean (b, ...); deviation (b, 1, ...), 0 where `next_t` is 0.
    """
    x, velocity = x.astype(jnp.float32), velocity.astype(jnp.float32)
    t, next_t = append_dims(t, x), append_dims(next_t, x)
    variance = jnp.where(next_t > 0, eta**2 * t / (1 - jnp.where(t < 1, t, next_t)), 0.0)
    drift = velocity + variance / (2 * t) * (x + (1 - t) * velocity)
    return x + (next_t - t) * drift, jnp.sqrt(variance * (t - next_t))


def sample_path(
    velocity: Velocity,
    noise: Float[Array, "b *d"],
    sigmas: Float[Array, " n"],
    eta: float,
    key: PRNGKeyArray | Key[Array, " b"],
) -> Float[Array, "b n *d"]:
    """Samples the stochastic process, and returns all states of its path.

    Args:
      velocity: (x, scalar sigma) -> velocity, with guidance.
      noise: (b, ...) state at sigmas[0].
      sigmas: (n + 1,) decreasing, to 0 or not.
      eta: see `GRPOConfig`.
      key: for the noise of the steps, or (b,) keys, one for each row.
    Returns: (b, n + 1, ...), the state at each of `sigmas`, in the dtype of noise.
    """

    def step(x: jax.Array, interval: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, sigma, next_sigma = interval
        t, next_t = (jnp.full(len(x), level) for level in (sigma, next_sigma))
        mean, deviation = sde_step(x, velocity(x, sigma), t, next_t, eta)
        fold = jax.random.fold_in if key.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))
        x_next = (mean + deviation * standard_normal(fold(key, index), x.shape)).astype(x.dtype)
        return x_next, x_next

    intervals = (jnp.arange(len(sigmas) - 1), sigmas[:-1], sigmas[1:])
    states = jax.lax.scan(step, noise, intervals)[1]
    return jnp.concatenate([noise[:, None], jnp.moveaxis(states, 0, 1)], axis=1)


def grpo_loss(
    theta: Predictor,
    old: Predictor,
    reference: Predictor,
    x_t: Float[Array, "b *d"],
    x_next: Float[Array, "b *d"],
    advantages_b: Float[Array, " b"],
    valid_mask_b: Shaped[Array, " b"],
    t_b: Float[Array, " b"],
    next_t_b: Float[Array, " b"],
    config: GRPOConfig,
) -> tuple[Float[Array, ""], Metrics]:
    """Computes the loss of theta on steps that old sampled.

    Args:
      theta, old, reference: the three policies, with guidance if the samples had it; only theta gets a gradient. The
        density of old is computed again, not stored: the same program rounds alike, and the clip is narrow.
      x_t, x_next: (b, ...) a state of each sample's path, and the next one.
      advantages_b: of each sample, see `rl.advantages`.
      valid_mask_b: 1 where a sample has a reward, else 0.
      t_b, next_t_b: noise levels of the two states, `next_t_b` above 0.
      config: weights of the loss.
    Returns: scalar float32, the mean over valid samples; and the metrics of `nft_loss` ("policy_loss", "kl",
      "norm_ratio", "weight") with "clipped", the share of samples whose gradient the clip removes.
    """
    prediction = theta(x_t, t_b)
    of_old, of_reference = (jax.lax.stop_gradient(predictor(x_t, t_b)) for predictor in (old, reference))
    mean_theta, mean_old, mean_reference = (
        sde_step(x_t, each, t_b, next_t_b, config.eta)[0] for each in (prediction, of_old, of_reference)
    )
    deviation = sde_step(x_t, of_old, t_b, next_t_b, config.eta)[1]

    def distance(one: jax.Array, two: jax.Array) -> jax.Array:
        """Returns half the mean squared distance, (b,), in deviations of the step."""
        return mean_per_sample(jnp.square((one - two) / deviation)) / 2

    sampled = x_next.astype(jnp.float32)
    ratio_b = jnp.exp(distance(sampled, mean_old) - distance(sampled, mean_theta))
    clipped_ratio_b = jnp.clip(ratio_b, 1 - config.clip, 1 + config.clip)
    objective_b = jnp.minimum(ratio_b * advantages_b, clipped_ratio_b * advantages_b)
    kl_b, norm_ratio_b = reference_distance(prediction, of_reference)
    mean, weight = masked_mean(valid_mask_b)
    loss = config.kl_weight * mean(distance(mean_theta, mean_reference)) - mean(objective_b)
    is_clipped_b = (clipped_ratio_b * advantages_b < ratio_b * advantages_b).astype(jnp.float32)
    metrics = {
        "policy_loss": -mean(objective_b),
        "kl": mean(kl_b),
        "norm_ratio": mean(norm_ratio_b),
        "clipped": mean(is_clipped_b),
    }
    return loss, {**metrics, "weight": weight}
