"""Classifier-free guidance."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def guided(
    velocity: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    conditional: jax.Array,
    unconditional: jax.Array,
    scale: jax.Array | float,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The guided field u + scale (c - u), both halves in one batch.

    Args:
      velocity: (latents (2 b, ...), sigma, condition (2 b, ...)) -> velocity of the latents' shape.
      conditional, unconditional: conditions of the same shape, (b, ...).
      scale: 1 gives the conditional field (at the price of both).
    Returns: (latents (b, ...), sigma) -> velocity.
    """
    conditions = jnp.concatenate([unconditional, conditional])

    def field(x: jax.Array, sigma: jax.Array) -> jax.Array:
        without, given = jnp.split(velocity(jnp.concatenate([x, x]), sigma, conditions), 2)
        return without + scale * (given - without)

    return field
