"""Classifier-free guidance."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Condition = TypeVar("Condition")


def guided(
    velocity: Callable[[jax.Array, jax.Array, Condition], jax.Array],
    conditional: Condition,
    unconditional: Condition,
    scale: jax.Array | float,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The guided field u + scale (c - u), both halves in one batch.

    Args:
      velocity: (latents (2 b, ...), sigma, condition (2 b, ...)) -> velocity of the latents' shape.
      conditional, unconditional: conditions of the same shape, (b, ...), or pytrees of such.
      scale: 1 gives the conditional field (at the price of both).
    Returns: (latents (b, ...), sigma) -> velocity.
    """
    conditions = jax.tree.map(lambda *halves: jnp.concatenate(halves), unconditional, conditional)

    def field(x: jax.Array, sigma: jax.Array) -> jax.Array:
        without, given = jnp.split(velocity(jnp.concatenate([x, x]), sigma, conditions), 2)
        return without + scale * (given - without)

    return field
