"""Solvers for variance-preserving models, which predict noise: Euler, DDIM, LCM. Each is one `lax.scan`.

They map standard normal noise to latents. In exact arithmetic Euler and DDIM take the same step, x' = x_0 + sigma'
noise, in different coordinates; they differ in the noise levels of diffusers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Real

from clvr_jax.diffusion.noise_schedule import NoiseSchedule
from clvr_jax.errors import UsageError

Prediction = Callable[[Float[Array, "b *d"], Real[Array, ""]], Float[Array, "b *d"]]
"""(noisy latents, scalar timestep) -> epsilon or v, as the schedule's prediction_type says, of the latents' shape."""


def euler_noise_solve(
    predict: Prediction,
    noise: Float[Array, "b *d"],
    schedule: NoiseSchedule,
    timesteps: Float[Array | np.ndarray, " n"],
) -> Float[Array, "b *d"]:
    """Samples by Euler's method in sigma, for latents that are scaled by 1 / sqrt(alpha).

    Args:
      predict: the model, with guidance.
      noise: (b, ...) standard normal.
      schedule: of the model.
      timesteps: (n,) decreasing, see `NoiseSchedule.euler_timesteps`; one NFE each.
    Returns: latents, shape and dtype of noise.
    Source: EulerDiscreteScheduler (diffusers).
    """
    trained = schedule.sigmas
    sigmas = jnp.append(jnp.interp(timesteps, jnp.arange(len(trained)), trained), 0.0)

    def step(x: jax.Array, level: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        timestep, sigma, next_sigma = level
        alpha = 1 / (sigma**2 + 1)
        scaled = (jnp.sqrt(alpha) * x).astype(x.dtype)
        _, epsilon = _predict_x0_and_noise(predict(scaled, timestep), scaled, alpha, schedule)
        return x + ((next_sigma - sigma) * epsilon).astype(x.dtype), None

    # "leading" does not start at the last timestep, so the start has the variance of noise and clean image.
    start = jnp.sqrt(sigmas[0] ** 2 + 1) if schedule.timestep_spacing == "leading" else sigmas[0]
    start_x = (start * noise).astype(noise.dtype)
    return jax.lax.scan(step, start_x, (jnp.asarray(timesteps), sigmas[:-1], sigmas[1:]))[0]


def ddim_solve(
    predict: Prediction, noise: Float[Array, "b *d"], schedule: NoiseSchedule, timesteps: Int[Array | np.ndarray, " n"]
) -> Float[Array, "b *d"]:
    """Samples by DDIM without fresh noise (eta 0). Args: see `euler_noise_solve`; timesteps: (n,) integers.

    Source: DDIMScheduler (diffusers).
    """
    timesteps, alphas = jnp.asarray(timesteps), jnp.asarray(schedule.alphas_cumprod)
    # As in diffusers, not the next entry of `timesteps`; the two are equal only for "leading".
    next_timesteps = timesteps - schedule.num_train_timesteps // len(timesteps)
    final = 1.0 if schedule.set_alpha_to_one else alphas[0]
    next_alphas = jnp.where(next_timesteps >= 0, alphas[jnp.maximum(next_timesteps, 0)], final)

    def step(x: jax.Array, level: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        timestep, alpha, next_alpha = level
        x0, epsilon = _predict_x0_and_noise(predict(x, timestep), x, alpha, schedule)
        return (jnp.sqrt(next_alpha) * x0 + jnp.sqrt(1 - next_alpha) * epsilon).astype(x.dtype), None

    return jax.lax.scan(step, noise, (timesteps, alphas[timesteps], next_alphas))[0]


def lcm_solve(
    predict: Prediction,
    noise: Float[Array, "b *d"],
    schedule: NoiseSchedule,
    timesteps: Int[Array | np.ndarray, " n"],
    *,
    key: PRNGKeyArray | None = None,
    step_noise: Float[Array, "n-1 b *d"] | None = None,
) -> Float[Array, "b *d"]:
    """Samples from a latent consistency model: each step predicts the clean image and adds fresh noise.

    Args:
      predict, noise, schedule: see `euler_noise_solve`.
      timesteps: (n,) integers, see `NoiseSchedule.lcm_timesteps`.
      key: random key of the fresh noise; exactly one of key and step_noise is given.
      step_noise: (n - 1, *noise.shape), the fresh noise; the last step adds none.
    Returns: latents, in the shape and dtype of noise.
    Raises: UsageError for both or neither of key and step_noise, or another shape of step_noise.
    Source: LCMScheduler (diffusers).
    """
    if (key is None) == (step_noise is None):
        raise UsageError("lcm_solve: pass exactly one of key and step_noise")
    timesteps, alphas = jnp.asarray(timesteps), jnp.asarray(schedule.alphas_cumprod)
    shape = (len(timesteps) - 1, *noise.shape)
    fresh = step_noise if key is None else jax.random.normal(key, shape, noise.dtype)
    assert fresh is not None
    if fresh.shape != shape:
        raise UsageError(f"lcm_solve: step_noise has shape {fresh.shape}; it must be {shape}")
    # The last step ends at alpha 1, where the noise has weight 0.
    fresh = jnp.concatenate([fresh, jnp.zeros_like(noise)[None]])
    next_alphas = jnp.append(alphas[timesteps[1:]], 1.0)

    def step(x: jax.Array, level: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        timestep, alpha, next_alpha, fresh_noise = level
        x0, _ = _predict_x0_and_noise(predict(x, timestep), x, alpha, schedule)
        # The boundary condition of consistency models, for data with standard deviation 1/2: identity at timestep 0.
        time = timestep * schedule.timestep_scaling
        denoised = time / jnp.sqrt(time**2 + 0.25) * x0 + 0.25 / (time**2 + 0.25) * x
        return (jnp.sqrt(next_alpha) * denoised + jnp.sqrt(1 - next_alpha) * fresh_noise).astype(x.dtype), None

    return jax.lax.scan(step, noise, (timesteps, alphas[timesteps], next_alphas, fresh))[0]


def _predict_x0_and_noise(
    prediction: jax.Array, x: jax.Array, alpha: jax.Array, schedule: NoiseSchedule
) -> tuple[jax.Array, jax.Array]:
    """Returns x_0 and epsilon of x = sqrt(alpha) x_0 + sqrt(1 - alpha) epsilon, from a prediction of epsilon or v."""
    signal, noise = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
    if schedule.prediction_type == "epsilon":
        return (x - noise * prediction) / signal, prediction
    return signal * x - noise * prediction, signal * prediction + noise * x
