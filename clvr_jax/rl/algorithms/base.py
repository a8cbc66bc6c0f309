"""The protocol of an RL algorithm, and the reductions that their losses share."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, Shaped

from clvr_jax.rl.policy import Predictor

Metrics = dict[str, jax.Array]


class Predictors(NamedTuple):
    """The predictions of the policy that is trained, of the old one that sampled, and of the reference."""

    theta: Predictor
    old: Predictor
    reference: Predictor


class RLAlgorithm(Protocol):
    """An RL algorithm: how the old policy samples, and the loss of the trained policy on these samples.

    sample_shape: of what is stored of one sample. num_train_timesteps: number of timesteps at which a sample can be
    learned from. metrics: names of the metrics that `loss` returns beside "weight".
    """

    sample_shape: tuple[int, ...]
    num_train_timesteps: int
    metrics: tuple[str, ...]

    def sample(
        self, predictor: Predictor, noise: Float[Array, "b *d"], key_b: Key[Array, " b"]
    ) -> Float[Array, "b *s"]:
        """Samples the old policy from noise (b, ...), with a key for each sample. Returns: (b, *sample_shape)."""
        ...

    def final_latents(self, samples: Float[Array, "b *s"]) -> Float[Array, "b *d"]:
        """Returns the clean latents (b, ...) of samples (b, *sample_shape)."""
        ...

    def sample_weights(self, advantages: ArrayLike) -> Float[Array, "..."]:
        """Returns the weights of the samples in the loss, from their advantages."""
        ...

    def loss(
        self,
        predictors: Predictors,
        samples: Float[Array, "b *s"],
        sample_weights_b: Float[Array, " b"],
        valid_mask_b: Shaped[Array, " b"],
        timestep_index_b: Int[Array, " b"],
        key_b: Key[Array, " b"],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Computes the loss of theta on samples of the old policy.

        Args:
          predictors: of the three policies; only theta gets a gradient.
          samples: (b, *sample_shape) from `sample`.
          sample_weights_b: from `sample_weights`.
          valid_mask_b: 1 where a sample has a reward, else 0.
          timestep_index_b: in range(num_train_timesteps), the timestep that each sample is learned from.
          key_b: for fresh noise, one for each sample.
        Returns: scalar float32, the mean over valid samples; and metrics, with their number as "weight".
        """
        ...

    def old_decay(self, step: ArrayLike) -> ArrayLike:
        """Returns d of the update old <- d old + (1 - d) theta after an epoch, `step` optimizer steps into the run."""
        ...


def standard_normal(key: PRNGKeyArray | Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b *d"]:
    """Returns standard normal noise (b, ...) from one key, or from (b,) keys, one for each row."""
    if key.ndim == 0:
        return jax.random.normal(key, shape)
    return jax.vmap(lambda own: jax.random.normal(own, shape[1:]))(key)


def mean_per_sample(x: Float[Array, "b *d"]) -> Float[Array, " b"]:
    """Returns the mean over all axes but the first, (b, ...) -> (b,)."""
    return x.reshape(x.shape[0], -1).mean(1)


def masked_mean(
    valid_mask_b: Shaped[Array, " b"],
) -> tuple[Callable[[Float[Array, " b"]], Float[Array, ""]], Float[Array, ""]]:
    """Returns the mean over valid samples as a function of (b,) values, and the number of valid samples."""
    weight = valid_mask_b.astype(jnp.float32).sum()

    def mean(values_b: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(valid_mask_b != 0, values_b, 0.0)) / jnp.maximum(weight, 1)

    return mean, weight


def reference_distance(
    prediction: Float[Array, "b *d"], reference: Float[Array, "b *d"]
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Returns the mean squared distance of predictions, (b,), and the log of the ratio of their norms, (b,).

    Args:
      prediction, reference: (b, ...). The ratio gets no gradient.
    """
    prediction, reference = prediction.astype(jnp.float32), reference.astype(jnp.float32)
    ratio_b = 0.5 * jnp.log(mean_per_sample(jnp.square(prediction)) / mean_per_sample(jnp.square(reference)))
    return mean_per_sample(jnp.square(prediction - reference)), jax.lax.stop_gradient(ratio_b)
