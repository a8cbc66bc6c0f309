"""Solvers for variance-preserving models, which predict noise: Euler, DDIM, LCM. Each is one `lax.scan`.

All take standard normal noise and give latents. In exact arithmetic Euler and DDIM are the same step, x' = x_0 + sigma'
noise, in other coordinates; they differ in the levels that diffusers gives them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from clvr_jax.diffusion.noise_schedule import NoiseSchedule
from clvr_jax.errors import UsageError

Prediction = Callable[[jax.Array, jax.Array], jax.Array]
"""(noisy latents, scalar timestep) -> epsilon or v, as the schedule's prediction_type says, of the latents' shape."""


def euler_noise_solve(
    predict: Prediction, noise: jax.Array, schedule: NoiseSchedule, timesteps: jax.Array
) -> jax.Array:
    """Euler's method in sigma, on latents scaled by 1 / sqrt(alpha).

    Args:
      predict: the guided model.
      noise: (b, ...) standard normal; scaled here to the first noise level.
      schedule: the model's.
      timesteps: (n,) decreasing, see `NoiseSchedule.euler_timesteps`; one evaluation each.
    Returns: latents, shape and dtype of noise.
    Source: EulerDiscreteScheduler (diffusers).
    """
    trained = schedule.sigmas
    sigmas = jnp.append(jnp.interp(timesteps, jnp.arange(len(trained)), trained), 0.0)

    def step(x: jax.Array, level: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        timestep, sigma, next_sigma = level
        alpha = 1 / (sigma**2 + 1)
        scaled = (jnp.sqrt(alpha) * x).astype(x.dtype)
        _, epsilon = _clean_and_noise(predict(scaled, timestep), scaled, alpha, schedule)
        return x + ((next_sigma - sigma) * epsilon).astype(x.dtype), None

    # "leading" does not begin at the last timestep, so that the initial variance includes that of the image, 1.
    start = jnp.sqrt(sigmas[0] ** 2 + 1) if schedule.timestep_spacing == "leading" else sigmas[0]
    start_x = (start * noise).astype(noise.dtype)
    return jax.lax.scan(step, start_x, (jnp.asarray(timesteps), sigmas[:-1], sigmas[1:]))[0]


def ddim_solve(predict: Prediction, noise: jax.Array, schedule: NoiseSchedule, timesteps: jax.Array) -> jax.Array:
    """DDIM without fresh noise (eta 0); arguments as for `euler_noise_solve`, timesteps (n,) integers.

    Source: DDIMScheduler (diffusers).
    """
    timesteps, alphas = jnp.asarray(timesteps), jnp.asarray(schedule.alphas)
    # Not the next entry of `timesteps`: only with "leading" are the two the same.
    next_timesteps = timesteps - schedule.num_train_timesteps // len(timesteps)
    final = 1.0 if schedule.set_alpha_to_one else alphas[0]
    next_alphas = jnp.where(next_timesteps >= 0, alphas[jnp.maximum(next_timesteps, 0)], final)

    def step(x: jax.Array, level: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        timestep, alpha, next_alpha = level
        clean, epsilon = _clean_and_noise(predict(x, timestep), x, alpha, schedule)
        return (jnp.sqrt(next_alpha) * clean + jnp.sqrt(1 - next_alpha) * epsilon).astype(x.dtype), None

    return jax.lax.scan(step, noise, (timesteps, alphas[timesteps], next_alphas))[0]


def lcm_solve(
    predict: Prediction,
    noise: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array,
    *,
    key: jax.Array | None = None,
    step_noise: jax.Array | None = None,
) -> jax.Array:
    """Multistep sampling of a latent consistency model: predict the image, add noise, predict again.

    Args:
      predict, noise, schedule: as for `euler_noise_solve`.
      timesteps: (n,) integers, see `NoiseSchedule.lcm_timesteps`.
      key: for the fresh noise, or
      step_noise: (n - 1, *noise.shape), the fresh noise itself; there is none after the last step.
    Returns: latents, shape and dtype of noise.
    Source: LCMScheduler (diffusers).
    """
    if (key is None) == (step_noise is None):
        raise UsageError("lcm_solve: give either key or step_noise")
    timesteps, alphas = jnp.asarray(timesteps), jnp.asarray(schedule.alphas)
    shape = (len(timesteps) - 1, *noise.shape)
    fresh = step_noise if key is None else jax.random.normal(key, shape, noise.dtype)
    assert fresh is not None
    if fresh.shape != shape:
        raise UsageError(f"lcm_solve: step_noise has shape {fresh.shape}; it must be {shape}")
    # The last step goes to alpha 1, where the noise, zero here, has no weight.
    fresh = jnp.concatenate([fresh, jnp.zeros_like(noise)[None]])
    next_alphas = jnp.append(alphas[timesteps[1:]], 1.0)

    def step(x: jax.Array, level: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        timestep, alpha, next_alpha, added = level
        clean, _ = _clean_and_noise(predict(x, timestep), x, alpha, schedule)
        # The boundary condition of consistency models, with data of deviation 1/2: the identity at timestep 0.
        time = timestep * schedule.timestep_scaling
        denoised = time / jnp.sqrt(time**2 + 0.25) * clean + 0.25 / (time**2 + 0.25) * x
        return (jnp.sqrt(next_alpha) * denoised + jnp.sqrt(1 - next_alpha) * added).astype(x.dtype), None

    return jax.lax.scan(step, noise, (timesteps, alphas[timesteps], next_alphas, fresh))[0]


def _clean_and_noise(
    prediction: jax.Array, x: jax.Array, alpha: jax.Array, schedule: NoiseSchedule
) -> tuple[jax.Array, jax.Array]:
    """(x_0, epsilon) of x = sqrt(alpha) x_0 + sqrt(1 - alpha) epsilon, from epsilon or v."""
    signal, noise = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
    if schedule.prediction_type == "epsilon":
        return (x - noise * prediction) / signal, prediction
    return signal * x - noise * prediction, signal * prediction + noise * x
