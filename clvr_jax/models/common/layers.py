"""Layers of all architectures: stacks of equal blocks run by `jax.lax.scan`, and sinusoidal embeddings."""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Real

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.attention import ATTENTION_OUTPUT
from clvr_jax.sharding import active_layout
from clvr_jax.trees import Params

Block = TypeVar("Block", bound=nnx.Module)
Carry = TypeVar("Carry")
Layer = TypeVar("Layer")
Output = TypeVar("Output")
Operands = TypeVar("Operands")

_POLICIES = jax.checkpoint_policies
REMAT: dict[str, Callable[..., bool]] = {
    # The operations between the matrix products are cheaper to compute again than to store.
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
    "attention": _POLICIES.save_only_these_names(ATTENTION_OUTPUT),
    "full": _POLICIES.nothing_saveable,
}
"""Rematerialization policies by what is stored of a block: its matrix products, its attention output, or nothing."""


def stack_blocks(make_block: Callable[[nnx.Rngs], Block], depth: int, rngs: nnx.Rngs) -> Block:
    """Builds `depth` blocks as one module, whose parameters have a leading layer axis."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=(0,), out_axes=0, axis_size=depth)
    def build(block_rngs: nnx.Rngs) -> Block:
        return make_block(block_rngs)

    return build(rngs)


def scan_blocks(
    blocks: Block,
    step: Callable[[Block, Carry, Layer], tuple[Carry, Output]],
    carry: Carry,
    xs: Layer = None,  # type: ignore[assignment]  # without layers' inputs, Layer is None
    *,
    remat: str = "dots",
    layers: slice | None = None,
) -> tuple[Carry, Output]:
    """Runs a stack of `stack_blocks`: `carry, out = step(block, carry, x)` for each layer.

    Args:
      blocks: the stacked module.
      step: pure function of one block, the carry and the slice of `xs` for this layer.
      carry: pytree; the step does not change its shapes and dtypes.
      xs: pytree with a leading layer axis, or None.
      remat: rematerialization policy, a name in `REMAT`.
      layers: runs only these layers of the stack.
    Returns: the final carry, and the outs stacked over layers.
    Raises: ClvrError for an unknown policy.
    """
    if remat not in REMAT:
        raise ClvrError(f"remat {remat!r}: no such policy; choose one of {', '.join(REMAT)}")
    graphdef, state = nnx.split(blocks)
    if layers is not None:
        state = jax.tree.map(lambda leaf: leaf[layers], state)

    def body(carry: Carry, layer: tuple[Params, Layer]) -> tuple[Carry, Output]:
        block_state, x = layer
        return step(nnx.merge(graphdef, block_state), carry, x)

    def read_body(carry: Carry, layer: tuple[jax.Array, Layer]) -> tuple[Carry, Output]:
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
    """Traces programs inside the context for weights without gradients, which saves memory on CPUs.

    With gradients, `layer_of` would accumulate the gradient of the stack in an array of its full size at every layer.
    """
    token = _IS_READ_ONLY.set(True)
    try:
        yield
    finally:
        _IS_READ_ONLY.reset(token)


def layer_of(stack: Operands, index: Int[Array, ""], carry: Carry) -> tuple[Operands, Carry]:
    """Returns the weights of one layer of a stack, inside the loop over layers, and the same carry.

    XLA has no bfloat16 on CPUs: it would cast the whole stack to float32 before the loop and store the copy, which is
    twice as large as the weights. An optimization barrier with the carry makes the cast depend on the iteration, so
    that only one layer is cast at a time. Float32 weights and accelerators need no barrier.
    """
    if _is_half(stack):
        stack, carry = _barrier_on_cpu((stack, carry))
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack), carry


def embed_tokens(embed: nnx.Module, ids: Int[Array, " *t"]) -> Float[Array, "*t d"]:
    """Returns embed(ids); inside `read_only_weights`, a loop of a CPU does not keep a float32 copy of the table.

    Args:
      embed: a module of token embeddings.
      ids: integers of any shape.
    Returns: (..., features).
    """
    graphdef, state = nnx.split(embed)
    if _IS_READ_ONLY.get() and _is_half(state):
        state, ids = _barrier_on_cpu((state, ids))
    embeddings: jax.Array = nnx.merge(graphdef, state)(ids)
    return embeddings


def vocabulary_logits(
    x: Float[Array, "*t d"], weights: Float[Array, "_ _"], *, is_tied: bool
) -> Float32[Array, "*t v"]:
    """Returns the product of final states with the weights of a head, in float32.

    Inside `read_only_weights`, 16-bit weights of a CPU are cast to float32 in parts, a part at a time, like layers in
    `layer_of`: a copy of all of them, which XLA makes before a loop over tokens, is twice as large as they are.

    Args:
      x: (..., features).
      weights: (vocabulary, features) if the head is tied to the embeddings, else (features, vocabulary).
      is_tied: which of the two.
    Returns: (..., vocabulary).
    """
    axis, features = (0, 1) if is_tied else (1, 0)

    def product(x: jax.Array, weights: jax.Array) -> jax.Array:
        contracted = ((x.ndim - 1,), (features,)), ((), ())
        return jax.lax.dot_general(x, weights.astype(x.dtype), contracted, preferred_element_type=jnp.float32)

    def product_in_parts(x: jax.Array, weights: jax.Array) -> jax.Array:
        size = weights.shape[axis] // parts

        def step(x: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
            x, held = jax.lax.optimization_barrier((x, weights))
            return x, product(x, jax.lax.dynamic_slice_in_dim(held, index * size, size, axis))

        logits = jnp.moveaxis(jax.lax.scan(step, x, jnp.arange(parts))[1], 0, -2)
        return logits.reshape(*x.shape[:-1], -1)

    # A vocabulary that is sharded over devices is smaller on each of them, and slices of it would be gathered.
    parts = math.gcd(weights.shape[axis], _VOCABULARY_PARTS) if active_layout() is None else 1
    if not _IS_READ_ONLY.get() or not _is_half(weights) or parts == 1:
        return product(x, weights)
    logits: jax.Array = jax.lax.platform_dependent(x, weights, cpu=product_in_parts, default=product)
    return logits


_VOCABULARY_PARTS = 64
"""At most this many parts: 9 MiB each, in float32, for the 151,936 tokens of Qwen and 1,024 features."""


def _barrier_on_cpu(operands: Operands) -> Operands:
    found: Operands = jax.lax.platform_dependent(
        operands, cpu=jax.lax.optimization_barrier, default=lambda operands: operands
    )
    return found


def _is_half(weights: Params) -> bool:
    """Returns whether there are floating-point weights of 16 bits."""
    return any(leaf.dtype.itemsize == 2 for leaf in jax.tree.leaves(weights))


def sinusoidal_embedding(
    positions_b: Real[Array, " b"], features: int, dtype: DTypeLike = jnp.float32
) -> Float[Array, "b d"]:
    """Returns (b, features): cosines, then sines, of (b,) positions, at frequencies spaced geometrically to 1e-4."""
    half = features // 2
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_b.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1).astype(dtype)
