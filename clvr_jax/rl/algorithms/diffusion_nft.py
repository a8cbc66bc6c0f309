"""DiffusionNFT: moves a diffusion policy towards samples with high rewards and away from those with low rewards.

The loss has three policies: theta, which is trained; old, which sampled; a reference that theta stays near. With
x0_theta and x0_old their predictions of the clean sample at x_t, two mixtures are compared with the sample x0 itself:

    x0_plus = beta x0_theta + (1 - beta) x0_old        x0_minus = (1 + beta) x0_old - beta x0_theta
    loss = c [r |x0_plus - x0|^2 / w_plus + (1 - r) |x0_minus - x0|^2 / w_minus] / beta
           + kl_weight |theta - reference|^2

The optimality r in [0, 1] compares the sample with its group, and each w is the mean absolute error of that mixture,
held constant. Without the w the gradient at theta = old is that of flow matching weighted by 2 r - 1, for every beta.
It needs no likelihoods and no stored paths: only clean samples, which get fresh noise.

Everything is a pure function of predictions, so FLUX.2 (a velocity) and SDXL (noise) are trained alike.

Source: DiffusionNFT (arXiv 2509.16117).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, Real, Shaped
from typing_extensions import override

from clvr_jax.diffusion import ForwardProcess
from clvr_jax.errors import ClvrError
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

_MIN_ERROR = 1e-5


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


class DiffusionNFT(RLAlgorithm):
    """DiffusionNFT for one architecture. It samples by the ODE and stores clean latents; its sample weights are r."""

    metrics = ("policy_loss", "kl", "norm_ratio")

    def __init__(self, policy: DiffusionPolicy, config: NFTConfig, decay: Literal["linear", "delayed"]):
        self._policy, self._config, self._decay = policy, config, decay
        self.sample_shape, self.num_train_timesteps = policy.latent_shape, len(policy.timesteps)

    @override
    def sample(
        self, predictor: Predictor, noise: Float[Array, "b *d"], key_b: Key[Array, " b"]
    ) -> Float[Array, "b *s"]:
        return self._policy.solve(predictor, noise)

    @override
    def final_latents(self, samples: Float[Array, "b *s"]) -> Float[Array, "b *d"]:
        return samples

    @override
    def sample_weights(self, advantages: ArrayLike) -> Float[Array, "..."]:
        return optimality(advantages, self._config.advantage_clip)

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
        t_b = jnp.asarray(self._policy.timesteps)[timestep_index_b]
        process = self._policy.forward_process
        return nft_loss(*predictors, samples, sample_weights_b, valid_mask_b, t_b, key_b, process, self._config)

    @override
    def old_decay(self, step: ArrayLike) -> ArrayLike:
        return old_decay(step, self._decay)


def optimality(advantages: ArrayLike, clip: float) -> Float[Array, "..."]:
    """Maps advantages to r in [0, 1]: 0.5 is the group's mean, 0 and 1 are `clip` deviations from it or more."""
    return jnp.clip(jnp.clip(jnp.asarray(advantages), -clip, clip) / (2 * clip) + 0.5, 0, 1)


def nft_loss(
    theta: Predictor,
    old: Predictor,
    reference: Predictor,
    x0: Float[Array, "b *d"],
    optimality_b: Float[Array, " b"],
    valid_mask_b: Shaped[Array, " b"],
    t_b: Real[Array, " b"],
    key: PRNGKeyArray | Key[Array, " b"],
    forward_process: ForwardProcess,
    config: NFTConfig,
) -> tuple[Float[Array, ""], Metrics]:
    """Computes the loss of theta on samples of old.

    Args:
      theta, old, reference: the three policies, with guidance if the samples had it; only theta gets a gradient.
      x0: (b, ...) clean latents of the samples.
      optimality_b: r of each, see `optimality`.
      valid_mask_b: 1 where a sample has a reward, else 0.
      t_b: timesteps of the rollout to learn at.
      key: for the noise; or (b,) keys, one for each sample, whose noise is then the same at every place in the batch.
      forward_process: of this architecture.
      config: weights of the loss.
    Returns: scalar float32, the mean over valid samples; and metrics: "policy_loss", "kl" (mean squared distance to
      the reference), "norm_ratio" (mean log |theta| / |reference|: inflated predictions are a sign of reward hacking),
      and "weight", the number of valid samples.
    """
    noise = standard_normal(key, x0.shape).astype(x0.dtype)
    x_t = forward_process.corrupt(x0, noise, t_b)
    prediction = theta(x_t, t_b)
    of_old, of_reference = (jax.lax.stop_gradient(predictor(x_t, t_b)) for predictor in (old, reference))
    target = x0.astype(jnp.float32)
    x0_theta, x0_old = (forward_process.predict_x0(x_t, each, t_b).astype(jnp.float32) for each in (prediction, of_old))

    def error(mixture: jax.Array) -> jax.Array:
        """Returns the mean squared error, (b,), in units of the mean absolute error."""
        width = jax.lax.stop_gradient(jnp.maximum(mean_per_sample(jnp.abs(mixture - target)), _MIN_ERROR))
        return mean_per_sample(jnp.square(mixture - target)) / width

    beta = config.beta
    positive = error(beta * x0_theta + (1 - beta) * x0_old)
    negative = error((1 + beta) * x0_old - beta * x0_theta)
    policy_b = config.scale * (optimality_b * positive + (1 - optimality_b) * negative) / beta
    kl_b, ratio_b = reference_distance(prediction, of_reference)
    mean, weight = masked_mean(valid_mask_b)
    loss = mean(policy_b) + config.kl_weight * mean(kl_b)
    metrics = {"policy_loss": mean(policy_b), "kl": mean(kl_b), "norm_ratio": mean(ratio_b)}
    return loss, {**metrics, "weight": weight}


def old_decay(step: ArrayLike, kind: Literal["linear", "delayed"] = "linear") -> Float[Array, ""]:
    """Returns d of the update old <- d old + (1 - d) theta after an epoch, `step` optimizer steps into the run.

    linear: min(.001 step, .5), so the old policy follows quickly. delayed: 0 for 75 steps, then it follows more and
    more slowly, up to .999.
    """
    step = jnp.asarray(step, jnp.float32)
    if kind == "linear":
        return jnp.minimum(0.001 * step, 0.5)
    return jnp.where(step < 75, 0.0, jnp.minimum(0.0075 * (step - 75), 0.999))
