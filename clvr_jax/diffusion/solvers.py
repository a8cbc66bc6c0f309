"""Solvers of the sampling ODE dx / dsigma = velocity(x, sigma)."""

from collections.abc import Callable

import jax

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
"""(latents, scalar sigma) -> velocity of the latents' shape."""


def euler_solve(velocity: Velocity, latents_btd: jax.Array, sigmas: jax.Array) -> jax.Array:
    """Integrates dx/dsigma = velocity(x, sigma) from sigmas[0] down to sigmas[-1].

    Args:
      velocity: (latents_btd, sigma) -> array of the same shape; the guided model.
      latents_btd: start state, noise if sigmas[0] == 1.
      sigmas: (n + 1,) decreasing; one evaluation per interval, n in all.
    Returns: state at sigmas[-1], shape and dtype of latents_btd.
    Source: FlowMatchEulerDiscreteScheduler (diffusers), first order.
    """

    def step(x: jax.Array, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        sigma, next_sigma = interval
        return x + ((next_sigma - sigma) * velocity(x, sigma)).astype(x.dtype), None

    return jax.lax.scan(step, latents_btd, (sigmas[:-1], sigmas[1:]))[0]
