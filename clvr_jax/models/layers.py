"""Pieces every architecture shares: stacks of equal blocks run by `jax.lax.scan`, and embeddings of numbers."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from clvr_jax.errors import ClvrError
from clvr_jax.models.attention import ATTENTION_OUTPUT

Block = TypeVar("Block", bound=nnx.Module)

_POLICIES = jax.checkpoint_policies
REMAT: dict[str, Any] = {
    # What lies between the matrix products is cheaper to compute than to store.
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
    "attention": _POLICIES.save_only_these_names(ATTENTION_OUTPUT),
    "full": _POLICIES.nothing_saveable,
}
"""What the backward pass keeps of each block, most first: its matrix products, what attention returned, nothing."""


def stack_blocks(make_block: Callable[[nnx.Rngs], Block], depth: int, rngs: nnx.Rngs) -> Block:
    """Builds `depth` blocks as one module whose every parameter has a leading layer axis."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=(0,), out_axes=0, axis_size=depth)
    def build(block_rngs: nnx.Rngs) -> Block:
        return make_block(block_rngs)

    return build(rngs)


def scan_blocks(
    blocks: nnx.Module,
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    remat: str = "dots",
    layers: slice | None = None,
) -> tuple[Any, Any]:
    """Runs a stack made by `stack_blocks`: for each layer `carry, out = step(block, carry, x)`.

    Args:
      blocks: the stacked module.
      step: pure function of one block, the carry and this layer's slice of `xs`.
      carry: pytree whose shapes and dtypes the step keeps.
      xs: pytree with the leading layer axis, or None.
      remat: what the backward pass keeps of each block, a name in `REMAT`.
      layers: run only these layers of the stack.
    Returns: (final carry, outs stacked over layers).
    Raises: ClvrError for an unknown policy.
    """
    if remat not in REMAT:
        raise ClvrError(f"remat {remat!r}: no such policy; there are {', '.join(REMAT)}")
    graphdef, state = nnx.split(blocks)
    if layers is not None:
        state = jax.tree.map(lambda leaf: leaf[layers], state)

    def body(carry: Any, layer: tuple[Any, Any]) -> tuple[Any, Any]:
        block_state, x = layer
        return step(nnx.merge(graphdef, block_state), carry, x)

    return jax.lax.scan(jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False), carry, (state, xs))


def sinusoidal_embedding(positions_b: jax.Array, features: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """(b,) positions -> (b, features): cosines, then sines, of geometrically spaced frequencies down to 1/10000."""
    half = features // 2
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_b.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1).astype(dtype)
