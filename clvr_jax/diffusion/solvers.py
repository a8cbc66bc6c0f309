"""Solvers of the sampling ODE dx / dsigma = velocity(x, sigma)."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

Velocity = Callable[[Float[Array, "b *d"], Float[Array, ""]], Float[Array, "b *d"]]
"""(latents, scalar sigma) -> velocity of the latents' shape."""


def euler_solve(
    velocity: Velocity, latents_btd: Float[Array, "b t d"], sigmas: Float[Array | np.ndarray, " n"]
) -> Float[Array, "b t d"]:
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

    # Of NumPy arrays or of JAX arrays: constants are sliced before the program, not in it.
    intervals: PyTree = (sigmas[:-1], sigmas[1:])
    return jax.lax.scan(step, latents_btd, intervals)[0]
