"""Scaled dot-product attention for all models: plain XLA operations, or the fused kernel of the target platform."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Shaped

from clvr_jax.errors import ClvrError
from clvr_jax.sharding import MeshLayout, active_layout, with_logical_constraint

Implementation = Literal["xla", "splash", "cudnn"]

ATTENTION_OUTPUT = "attention"
"""Checkpoint name of the result of attention, for rematerialization policies."""

_SPLASH_BLOCK = 512
_LANES = 128
# With fewer tokens the blocks of the kernel are mostly padding, and the logits fit into memory without it.
_SPLASH_MIN_TOKENS = 1024


def attention(
    query_bqnh: Float[Array, "b q n h"],
    key_bknh: Float[Array, "b k m h"],
    value_bknh: Float[Array, "b k m h"],
    *,
    mask: Bool[Array, "#b #n #q #k"] | None = None,
    key_mask_bk: Shaped[Array, "b k"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "b q n h"]:
    """Computes scaled dot-product attention, with the softmax in float32.

    Under a layout that shards tokens, heads are sharded instead during attention. If there are too few heads for that,
    each device computes its own queries, with all keys.

    Args:
      query_bqnh: (batch, queries, heads, head_dim).
      key_bknh, value_bknh: (batch, keys, kv_heads, head_dim); kv_heads divides heads (grouped queries).
      mask: boolean with four axes, broadcastable to (batch, heads, queries, keys); True where a query may attend to a
        key. Only "xla" supports it.
      key_mask_bk: (batch, keys), nonzero at keys that all queries may attend to, 0 at padding.
      is_causal: whether a query attends to its own key and earlier ones only. The queries are those of the last keys:
        query i attends to keys 0..i + keys - queries. With fewer queries than keys, "cudnn" does not support it.
      scale: factor on the logits, 1 / sqrt(head_dim) if None.
      implementation: "xla", "splash" (TPU) or "cudnn" (GPU, bfloat16 or float16); None chooses by platform, shapes and
        masks.
    Returns: (batch, queries, heads, head_dim) in the query's dtype. Values at padding are undefined.
    Raises: ClvrError for a mask that the implementation does not support.
    """
    layout = active_layout()
    scale = query_bqnh.shape[-1] ** -0.5 if scale is None else scale
    query_axes = ("batch", _query_axis(layout, query_bqnh.shape, is_causal), "heads", None)
    query_bqnh = with_logical_constraint(query_bqnh, *query_axes)
    key_bknh, value_bknh = (with_logical_constraint(x, "batch", None, "heads", None) for x in (key_bknh, value_bknh))
    continues = is_causal and query_bqnh.shape[1] != key_bknh.shape[1]
    kind = implementation or _choose_implementation(layout, query_bqnh, key_bknh, mask, continues)
    if kind == "xla":
        out = _xla_attention(query_bqnh, key_bknh, value_bknh, mask, key_mask_bk, is_causal, scale)
    elif mask is not None:
        raise ClvrError(f'attention: {kind} supports key_mask_bk and is_causal, not mask; use implementation="xla"')
    elif continues and kind == "cudnn":
        raise ClvrError('attention: cudnn does not support causal queries after earlier keys; use implementation="xla"')
    elif kind == "splash":
        out = _splash(query_bqnh, key_bknh, value_bknh, key_mask_bk, is_causal, scale, layout)
    else:
        lengths = None if key_mask_bk is None else jnp.sum(key_mask_bk != 0, axis=1, dtype=jnp.int32)
        out = jax.nn.dot_product_attention(
            query_bqnh, key_bknh, value_bknh, scale=scale, is_causal=is_causal,
            key_value_seq_lengths=lengths, implementation="cudnn",
        )  # fmt: skip
    result: jax.Array = checkpoint_name(with_logical_constraint(out, *query_axes), ATTENTION_OUTPUT)
    return result


def _query_axis(layout: MeshLayout | None, shape: tuple[int, ...], is_causal: bool) -> str | None:
    """Returns the logical axis of the queries: "tokens" if the heads are not sharded along its mesh axes, else None.

    Causal queries are never sharded, because the kernels take a query's position from its place in the array.
    """
    if layout is None or is_causal:
        return None
    used = layout.spec(("heads",), shape[2:3])[0] or ()
    return None if set(layout.rules.tokens) & {*((used,) if isinstance(used, str) else used)} else "tokens"


def _choose_implementation(
    layout: MeshLayout | None, query: jax.Array, key: jax.Array, mask: jax.Array | None, continues: bool
) -> Implementation:
    platform = layout.platform if layout else jax.default_backend()
    if mask is not None or platform == "cpu":
        return "xla"
    if platform == "tpu":
        queries, keys = query.shape[1], key.shape[1]
        is_large = queries * keys >= _SPLASH_MIN_TOKENS**2 if continues else min(queries, keys) >= _SPLASH_MIN_TOKENS
        return "splash" if is_large else "xla"
    if continues:  # the mask of cuDNN aligns the first query with the first key
        return "xla"
    return "cudnn" if query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] <= 128 else "xla"


def _xla_attention(
    query_bqnh: jax.Array,
    key_bknh: jax.Array,
    value_bknh: jax.Array,
    mask: jax.Array | None,
    key_mask_bk: jax.Array | None,
    is_causal: bool,
    scale: float,
) -> jax.Array:
    b, queries, heads, head_dim = query_bqnh.shape
    keys, kv_heads = key_bknh.shape[1:3]
    # Heads before tokens from the start: on a CPU this takes half the time of jax.nn.dot_product_attention, which
    # transposes the products instead; on accelerators the compiler chooses the layout.
    query_bmgqh = query_bqnh.reshape(b, queries, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    key_bmkh, value_bmkh = key_bknh.swapaxes(1, 2), value_bknh.swapaxes(1, 2)
    logits = jnp.einsum("bmgqh,bmkh->bmgqk", query_bmgqh, key_bmkh, preferred_element_type=jnp.float32) * scale
    if is_causal:
        logits = jnp.where(jnp.tri(queries, keys, keys - queries, dtype=bool), logits, -jnp.inf)
    # Finite, so that a row without any key to attend to (padding) gives an average and not NaN.
    masked = jnp.finfo(jnp.float32).min
    if key_mask_bk is not None:
        logits = jnp.where((key_mask_bk != 0)[:, None, None, None, :], logits, masked)
    if mask is not None:
        grouped_mask = (
            mask[:, :, None] if mask.shape[1] == 1 else mask.reshape(-1, kv_heads, heads // kv_heads, *mask.shape[2:])
        )
        logits = jnp.where(grouped_mask, logits, masked)
    weights = jax.nn.softmax(logits, axis=-1).astype(value_bknh.dtype)
    out_bmgqh = jnp.einsum("bmgqk,bmkh->bmgqh", weights, value_bmkh)
    return out_bmgqh.transpose(0, 3, 1, 2, 4).reshape(query_bqnh.shape).astype(query_bqnh.dtype)


def _splash(
    query_bqnh: jax.Array,
    key_bknh: jax.Array,
    value_bknh: jax.Array,
    key_mask_bk: jax.Array | None,
    is_causal: bool,
    scale: float,
    layout: MeshLayout | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Computes flash attention on TPU, each device for its rows and heads; pads tokens and channels to full blocks."""
    b, queries, heads, head_dim = query_bqnh.shape
    keys = key_bknh.shape[1]
    valid_mask_bk = jnp.ones((b, keys), bool) if key_mask_bk is None else key_mask_bk != 0
    parts = 1
    query_parts = 1
    specs: dict[str, str | tuple[str, ...] | None] = {}
    if layout is not None:
        axis = _query_axis(layout, query_bqnh.shape, is_causal)
        spec = layout.spec(("batch", axis, "heads", None), query_bqnh.shape)
        parts, query_parts = (_shards(layout, spec[dimension]) for dimension in (2, 1))
        specs = {"rows": spec[0], "heads": spec[2], "queries": spec[1]}
    if key_bknh.shape[2] % parts:  # fewer key heads than devices: each device needs the key heads of its queries
        repeats = heads // key_bknh.shape[2]
        key_bknh, value_bknh = (jnp.repeat(x, repeats, axis=2) for x in (key_bknh, value_bknh))

    def padded(x: jax.Array, block: int = _SPLASH_BLOCK) -> jax.Array:
        rows, channels = -x.shape[1] % block, -x.shape[3] % _LANES
        return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, channels))).swapaxes(1, 2)

    query_block = _SPLASH_BLOCK * query_parts  # each device has full blocks
    operands = (padded(query_bqnh * scale, query_block), padded(key_bknh), padded(value_bknh))
    # Tokens of segment 1 attend to each other; padding is in segment 0.
    query_segments = jnp.pad(jnp.ones((b, queries), jnp.int32), ((0, 0), (0, -queries % query_block)))
    key_segments = jnp.pad(valid_mask_bk.astype(jnp.int32), ((0, 0), (0, -keys % _SPLASH_BLOCK)))
    run = functools.partial(
        _splash_local, is_causal=is_causal, earlier_keys=keys - queries if is_causal else 0, interpret=interpret
    )
    if layout is not None and layout.mesh.size > 1:
        spec_queries = jax.sharding.PartitionSpec(specs["rows"], specs["heads"], specs["queries"])
        spec_keys = jax.sharding.PartitionSpec(specs["rows"], specs["heads"])
        spec_segments = jax.sharding.PartitionSpec(specs["rows"], specs["queries"])
        # The kernel is a program for one device, which XLA cannot shard.
        run = jax.shard_map(
            run,
            mesh=layout.mesh,
            in_specs=(spec_queries, spec_keys, spec_keys, spec_segments, jax.sharding.PartitionSpec(specs["rows"])),
            out_specs=spec_queries,
            check_vma=False,
        )
    out_bnqh = run(*operands, query_segments, key_segments)
    return out_bnqh.swapaxes(1, 2)[:, :queries, :, :head_dim].astype(query_bqnh.dtype)


def _shards(layout: MeshLayout, axes: str | tuple[str, ...] | None) -> int:
    """Returns the number of shards of a dimension from its entry in a partition; JAX unpacks a tuple of one axis."""
    return math.prod(layout.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def _splash_local(
    query_bnqh: jax.Array,
    key_bmkh: jax.Array,
    value_bmkh: jax.Array,
    query_segments_bq: jax.Array,
    key_segments_bk: jax.Array,
    *,
    is_causal: bool,
    earlier_keys: int,
    interpret: bool,
) -> jax.Array:
    # Pallas for TPU is slow to import, and only programs for TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, queries, keys = query_bnqh.shape[1], query_bnqh.shape[2], key_bmkh.shape[2]
    shape, block = (queries, keys), _SPLASH_BLOCK
    one = masks.CausalMask(shape, offset=earlier_keys) if is_causal else masks.FullMask(shape)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([one] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION_OUTPUT,
        interpret=interpret,
    )
    out: jax.Array = jax.vmap(lambda q, k, v, a, b: kernel(q, k, v, segment_ids=kernels.SegmentIds(a, b)))(
        query_bnqh, key_bmkh, value_bmkh, query_segments_bq, key_segments_bk
    )
    return out
