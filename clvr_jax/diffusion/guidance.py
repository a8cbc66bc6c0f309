"""Classifier-free guidance."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Condition = TypeVar("Condition")


def classifier_free_guidance(
    velocity: Callable[[Float[Array, "2*b *d"], Float[Array, ""], Condition], Float[Array, "2*b *d"]],
    conditional: Condition,
    unconditional: Condition,
    scale: Float[Array, ""] | float,
) -> Callable[[Float[Array, "b *d"], Float[Array, ""]], Float[Array, "b *d"]]:
    """Returns the guided prediction u + scale (c - u), with both predictions computed in one batch.

    Args:
      velocity: (latents (2 b, ...), sigma, condition (2 b, ...)) -> velocity of the latents' shape.
      conditional, unconditional: conditions of the same shape (b, ...), or pytrees of them.
      scale: 1 is the conditional prediction, at the cost of both.
    Returns: (latents (b, ...), sigma) -> velocity.
    """
    conditions = jax.tree.map(lambda *halves: jnp.concatenate(halves), unconditional, conditional)

    def guided_velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
        unconditioned, conditioned = jnp.split(velocity(jnp.concatenate([x, x]), sigma, conditions), 2)
        return unconditioned + scale * (conditioned - unconditioned)

    return guided_velocity
