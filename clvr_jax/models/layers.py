"""Pieces every architecture shares: stacks of equal blocks run by `jax.lax.scan`, and embeddings of numbers."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
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

    def read_body(carry: Any, layer: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        index, x = layer
        block_state, carry = layer_of(state, index, carry)
        return step(nnx.merge(graphdef, block_state), carry, x)

    if _IS_READ_ONLY.get() and _is_half(state):
        depth = len(jax.tree.leaves(state)[0])
        return jax.lax.scan(read_body, carry, (jnp.arange(depth), xs))
    return jax.lax.scan(jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False), carry, (state, xs))


_IS_READ_ONLY: ContextVar[bool] = ContextVar("is_read_only", default=False)


@contextlib.contextmanager
def read_only_weights() -> Iterator[None]:
    """Traces programs inside the context for weights that get no gradients, which saves memory on CPUs.

    Through `layer_of`, the gradient of a stack would be added up in an array of its size at every layer.
    """
    token = _IS_READ_ONLY.set(True)
    try:
        yield
    finally:
        _IS_READ_ONLY.reset(token)


def layer_of(stack: Any, index: jax.Array, carry: Any) -> tuple[Any, Any]:
    """Takes one layer of a stack, inside the loop over layers: its weights, and the carry unchanged.

    XLA's compiler for CPUs has no bfloat16: it would cast the whole stack to float32 in front of the loop, and keep the
    copy, which is twice as large as the weights. A barrier that the carry passes as well ties the cast to the loop,
    where only the layer's part of it is computed. Float32 weights and accelerators need no barrier.
    """
    if _is_half(stack):
        stack, carry = jax.lax.platform_dependent(
            (stack, carry), cpu=jax.lax.optimization_barrier, default=lambda operands: operands
        )
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack), carry


def _is_half(weights: Any) -> bool:
    """Returns whether there are floating-point weights of 16 bits."""
    return any(leaf.dtype.itemsize == 2 for leaf in jax.tree.leaves(weights))


def sinusoidal_embedding(positions_b: jax.Array, features: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """(b,) positions -> (b, features): cosines, then sines, of geometrically spaced frequencies down to 1/10000."""
    half = features // 2
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_b.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1).astype(dtype)
