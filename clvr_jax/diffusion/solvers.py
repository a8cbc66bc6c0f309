"""Solvers of the sampling ODE dx / dsigma = velocity(x, sigma)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

Velocity = Callable[[Float[Array, "b *d"], Float[Array, ""]], Float[Array, "b *d"]]
"""(latents, scalar sigma) -> velocity of the latents' shape."""


def euler_solve(
    velocity: Velocity,
    latents_btd: Float[Array, "b t d"],
    sigmas: Float[Array | np.ndarray, " n"],
    bounds: tuple[Int[Array, ""], Int[Array, ""]] | None = None,
) -> Float[Array, "b t d"]:
    """Integrates dx/dsigma = velocity(x, sigma) from sigmas[0] down to sigmas[-1].

    Args:
      velocity: (latents_btd, sigma) -> array of the same shape; the guided model.
      latents_btd: start state, noise if sigmas[0] == 1.
      sigmas: (n + 1,) decreasing; one evaluation per interval, n in all.
      bounds: (first, last) integrates from sigmas[first] to sigmas[last] only. They are values of a running program:
        one compiled program takes all steps or any part of them, and n calls of one step give the same bits as one
        call of n steps, which programs compiled for different numbers of steps need not.
    Returns: state at the last of these sigmas, shape and dtype of latents_btd.
    Source: FlowMatchEulerDiscreteScheduler (diffusers), first order.
    """

    def step(x: jax.Array, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        sigma, next_sigma = interval
        return x + ((next_sigma - sigma) * velocity(x, sigma)).astype(x.dtype), None

    if bounds is not None:
        levels = jnp.asarray(sigmas)
        end: jax.Array = jax.lax.fori_loop(*bounds, lambda k, x: step(x, (levels[k], levels[k + 1]))[0], latents_btd)
        return end

    # Of NumPy arrays or of JAX arrays: constants are sliced before the program, not in it.
    intervals: PyTree = (sigmas[:-1], sigmas[1:])
    return jax.lax.scan(step, latents_btd, intervals)[0]
