"""Pieces every architecture shares: attention and stacks of equal blocks run by `jax.lax.scan`."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

Block = TypeVar("Block", bound=nnx.Module)


def attention(
    query_bqnh: jax.Array,
    key_bknh: jax.Array,
    value_bknh: jax.Array,
    *,
    mask: jax.Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> jax.Array:
    """Scaled dot-product attention, softmax in float32.

    Args:
      query_bqnh: (batch, queries, heads, head_dim).
      key_bknh, value_bknh: (batch, keys, kv_heads, head_dim); kv_heads divides heads (grouped queries).
      mask: boolean, broadcastable to (batch, heads, queries, keys), four axes; True may be attended.
      is_causal: query i sees keys 0..i only.
      scale: factor on the logits, 1 / sqrt(head_dim) if None.
    Returns: (batch, queries, heads, head_dim) in the query's dtype.
    """
    b, queries, heads, head_dim = query_bqnh.shape
    keys, kv_heads = key_bknh.shape[1:3]
    # Heads before tokens from the start: on a CPU, half the time of jax.nn.dot_product_attention, which turns the
    # products around instead; on accelerators the compiler chooses the layout.
    query_bmgqh = query_bqnh.reshape(b, queries, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    key_bmkh, value_bmkh = key_bknh.swapaxes(1, 2), value_bknh.swapaxes(1, 2)
    logits = jnp.einsum("bmgqh,bmkh->bmgqk", query_bmgqh, key_bmkh, preferred_element_type=jnp.float32)
    logits = logits * (head_dim**-0.5 if scale is None else scale)
    if is_causal:
        logits = jnp.where(jnp.tri(queries, keys, dtype=bool), logits, -jnp.inf)
    if mask is not None:
        of_groups = (
            mask[:, :, None] if mask.shape[1] == 1 else mask.reshape(-1, kv_heads, heads // kv_heads, *mask.shape[2:])
        )
        # Finite, so that a row that may see nothing (padding) gives an average and not NaN.
        logits = jnp.where(of_groups, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value_bknh.dtype)
    out_bmgqh = jnp.einsum("bmgqk,bmkh->bmgqh", weights, value_bmkh)
    return out_bmgqh.transpose(0, 3, 1, 2, 4).reshape(query_bqnh.shape).astype(query_bqnh.dtype)


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
    remat: bool = False,
    layers: slice | None = None,
) -> tuple[Any, Any]:
    """Runs a stack made by `stack_blocks`: for each layer `carry, out = step(block, carry, x)`.

    Args:
      blocks: the stacked module.
      step: pure function of one block, the carry and this layer's slice of `xs`.
      carry: pytree whose shapes and dtypes the step keeps.
      xs: pytree with the leading layer axis, or None.
      remat: recompute each whole block in the backward pass; without it the projections are kept.
      layers: run only these layers of the stack.
    Returns: (final carry, outs stacked over layers).
    """
    graphdef, state = nnx.split(blocks)
    if layers is not None:
        state = jax.tree.map(lambda leaf: leaf[layers], state)

    def body(carry: Any, layer: tuple[Any, Any]) -> tuple[Any, Any]:
        block_state, x = layer
        return step(nnx.merge(graphdef, block_state), carry, x)

    # Even without remat only the matrix products are kept: what lies between them is cheaper to compute than to store.
    keep = None if remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.lax.scan(jax.checkpoint(body, policy=keep, prevent_cse=False), carry, (state, xs))


def sinusoidal_embedding(positions_b: jax.Array, features: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """(b,) positions -> (b, features): cosines, then sines, of geometrically spaced frequencies down to 1/10000."""
    half = features // 2
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_b.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1).astype(dtype)
