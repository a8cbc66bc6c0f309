"""Losses as functions of a velocity, an encoder or logits; they know no model.

Convention of flow matching: x_t = (1 - t) x_0 + t noise, t = 1 is noise, velocity = noise - x_0. Noise prediction keeps
that of `NoiseSchedule`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Real

from clvr_jax.diffusion.noise_schedule import NoiseSchedule

Velocity = Callable[[Float[Array, "b t c"], Float[Array, " b"]], Float[Array, "b t c"]]


def sample_timesteps(key: PRNGKeyArray, batch: int, shift: float, *, shuffle: bool = False) -> Float[Array, " batch"]:
    """Samples (batch,) timesteps in (0, 1): uniform, and shifted towards noise as the sampler's schedule is.

    t = shift u / (1 + (shift - 1) u); shift 1 leaves them uniform. They are stratified over the batch, which keeps
    their distribution and lowers the variance of the loss; row i has stratum i unless they are shuffled.
    """
    strata = (jnp.arange(batch) + jax.random.uniform(key, (batch,))) / batch
    if shuffle:
        strata = jax.random.permutation(jax.random.fold_in(key, 1), strata)
    return shift * strata / (1 + (shift - 1) * strata)


def flow_matching_loss(
    velocity: Velocity, x0_btc: Float[Array, "b t c"], key: PRNGKeyArray, shift: float, *, shuffle: bool = False
) -> Float[Array, ""]:
    """Computes the mean squared error of the velocity at random timesteps (rectified flow).

    Args:
      velocity: (x_t of (b, t, c), timesteps of (b,)) -> (b, t, c).
      x0_btc: clean latents.
      key: for noise and timesteps.
      shift: see `sample_timesteps`.
      shuffle: whether the order of the rows says something about them, so that timesteps must not follow it.
    Returns: scalar, float32.
    """
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, x0_btc.shape, x0_btc.dtype)
    t = sample_timesteps(time_key, x0_btc.shape[0], shift, shuffle=shuffle)
    t_b11 = t[:, None, None].astype(x0_btc.dtype)
    predicted = velocity((1 - t_b11) * x0_btc + t_b11 * noise, t)
    return jnp.mean(jnp.square((predicted - (noise - x0_btc)).astype(jnp.float32)))


def noise_prediction_loss(
    predict: Callable[[Float[Array, "b *d"], Int[Array, " b"]], Float[Array, "b *d"]],
    x0: Float[Array, "b *d"],
    key: PRNGKeyArray,
    schedule: NoiseSchedule,
) -> Float[Array, ""]:
    """Computes the mean squared error of the noise or of v = sqrt(alpha) noise - sqrt(1 - alpha) x_0, at random steps.

    Args:
      predict: (noisy latents (b, ...), timesteps (b,) int32) -> (b, ...), the prediction of type
        `schedule.prediction_type`.
      x0: (b, ...) clean latents of about unit variance.
      key: for noise and timesteps; these are uniform over the schedule's, stratified over the batch.
      schedule: noise levels.
    Returns: scalar, float32.
    Source: DDPM (arXiv 2006.11239), v as in arXiv 2202.00512.
    """
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    last = schedule.num_train_timesteps - 1
    # The last stratum ends at 1, which rounding can reach.
    timesteps = sample_timesteps(time_key, x0.shape[0], shift=1.0) * schedule.num_train_timesteps
    timesteps = jnp.minimum(timesteps.astype(jnp.int32), last)
    alpha = jnp.asarray(schedule.alphas_cumprod, x0.dtype)[timesteps].reshape(-1, *[1] * (x0.ndim - 1))
    signal, sigma = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
    target = noise if schedule.prediction_type == "epsilon" else signal * noise - sigma * x0
    predicted = predict(signal * x0 + sigma * noise, timesteps)
    return jnp.mean(jnp.square((predicted - target).astype(jnp.float32)))


def autoencoder_loss(
    moments: Callable[[Float[Array, "b h w c"]], tuple[Float[Array, "b h8 w8 d"], Float[Array, "b h8 w8 d"]]],
    decode: Callable[[Float[Array, "b h8 w8 d"]], Float[Array, "b h w c"]],
    images_bhwc: Float[Array, "b h w c"],
    key: PRNGKeyArray,
    kl_weight: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes the reconstruction error (absolute and squared) plus the weighted KL divergence to a unit normal.

    Args:
      moments: images -> posterior mean and log-variance.
      decode: latents -> images.
      images_bhwc: in [-1, 1].
      key: for the posterior's noise.
      kl_weight: weight of the divergence, in nats for each pixel value.
    Returns: scalar loss and its parts.
    """
    mean, log_variance = moments(images_bhwc)
    latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape, mean.dtype)
    error = decode(latents) - images_bhwc
    absolute, squared = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error))
    divergence = 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance) / images_bhwc.size
    parts = {"absolute": absolute, "squared": squared, "divergence": divergence}
    return absolute + squared + kl_weight * divergence, parts


def next_token_loss(
    logits_btv: Float[Array, "b t v"], tokens_bt: Int[Array, "b t"], weights_bt: Real[Array, "b t"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes the cross entropy of each next token, averaged over the tokens to be learned.

    Args:
      logits_btv: at position i they predict token i + 1.
      tokens_bt: int32.
      weights_bt: 1 at tokens to be learned, 0 elsewhere; the weight of token i is that of predicting it.
    Returns: scalar loss; the share of these tokens whose most likely prediction is right, and their number, which is
      the weight of the loss (see `optimization.step.Loss`).
    """
    logits, targets, weights = logits_btv[:, :-1].astype(jnp.float32), tokens_bt[:, 1:], weights_bt[:, 1:]
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    count = jnp.maximum(weights.sum(), 1)
    right = (jnp.argmax(logits, axis=-1) == targets) * weights
    return -(picked * weights).sum() / count, {"token_accuracy": right.sum() / count, "weight": count}
