"""The decoder layer of Qwen3, shared by the text encoder (`qwen3`) and the controller (`qwen3_vl`).

Grouped-query attention with a norm on every query and key head, rotary positions handed in as cosines and sines (so one
layer serves plain and interleaved multi-axis positions), SwiGLU MLP, RMSNorm before each.

Source: Qwen3DecoderLayer (transformers); attribute names are its keys.
"""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from numpy.typing import NDArray

from clvr_jax.errors import ClvrError
from clvr_jax.models.attention import attention
from clvr_jax.sharding import with_logical_constraint

Rotary = tuple[jax.Array, jax.Array]
"""Cosines and sines, each (b or 1, t, head_dim / 2): channel i of a head turns with channel i + head_dim / 2."""


class DecoderSizes(Protocol):
    """What a decoder layer needs to know; both language-model configurations have these fields."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        ...

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP."""
        ...

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        ...

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads, a divisor of the query heads."""
        ...

    @property
    def head_dim(self) -> int:
        """Channels of one head, even."""
        ...

    @property
    def rms_norm_eps(self) -> float:
        """Added to the mean square in every norm."""
        ...

    @property
    def attention_bias(self) -> bool:
        """Whether the four attention projections have biases."""
        ...


class KVCache(NamedTuple):
    """Keys (rotated) and values of past tokens: (b, max_len, kv_heads, head_dim), for a stack (layers, b, ...)."""

    key: jax.Array
    value: jax.Array


def empty_cache(sizes: DecoderSizes, layers: int, batch: int, max_len: int, dtype: DTypeLike = jnp.float32) -> KVCache:
    """A cache for `layers` decoder layers, layer axis first, all zero: entries count only once a mask admits them."""
    shape = (layers, batch, max_len, sizes.num_key_value_heads, sizes.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def inverse_frequencies(head_dim: int, theta: float) -> NDArray[np.float32]:
    """(head_dim / 2,) angular step of each channel pair per position: theta ** (-2 i / head_dim).

    The power is taken exactly and rounded before its reciprocal is: that is how PyTorch's float32 steps come out, and
    at position 10,000 one wrong last digit is an angle wrong by up to 6e-4.
    """
    powers = np.power(float(theta), np.arange(0, head_dim, 2) / head_dim).astype(np.float32)
    return np.float32(1) / powers


def rotary_tables(positions_bt: jax.Array, head_dim: int, theta: float) -> Rotary:
    """Cosines and sines for integer positions (b, t), each (b, t, head_dim / 2) float32."""
    angles = positions_bt.astype(jnp.float32)[..., None] * inverse_frequencies(head_dim, theta)
    return jnp.cos(angles), jnp.sin(angles)


def rotate_halves(x_btnh: jax.Array, rotary: Rotary) -> jax.Array:
    """Turns channel pairs (i, i + head_dim / 2) by their angle; float32 inside, dtype of x outside."""
    cos, sin = (table[:, :, None, :] for table in rotary)
    first, second = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_btnh.dtype)


def causal_mask(queries: int, keys: int, start: jax.Array | int = 0, key_mask_bk: jax.Array | None = None) -> jax.Array:
    """Which cache entries each query may see: those up to its own, less the masked ones.

    Args:
      queries: number of new tokens.
      keys: number of leading cache entries considered (without a cache, the tokens themselves).
      start: cache index of the first new token, an integer or (b,) integers.
      key_mask_bk: (b, keys), nonzero where a key is a real token.
    Returns: boolean (b or 1, 1, queries, keys).
    """
    query_index = jnp.reshape(jnp.asarray(start), (-1, 1, 1, 1)) + jnp.arange(queries)[:, None]
    mask = jnp.arange(keys) <= query_index
    return mask if key_mask_bk is None else mask & (key_mask_bk != 0)[:, None, None, :]


def _write(cache_bknh: jax.Array, new_btnh: jax.Array, start: jax.Array | int) -> jax.Array:
    """Puts the new entries at start, start + 1, ... of every row; `start` is one integer or one per row."""
    new_btnh = new_btnh.astype(cache_bknh.dtype)
    if jnp.ndim(start) == 0:
        return jax.lax.dynamic_update_slice_in_dim(cache_bknh, new_btnh, start, axis=1)
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=0))(
        cache_bknh, new_btnh, jnp.asarray(start)
    )


def attend_past(
    query_b1nh: jax.Array,
    key_b1kh: jax.Array,
    value_b1kh: jax.Array,
    past_key_bksh: jax.Array,
    past_value_bksh: jax.Array,
    seen_bs: jax.Array,
) -> jax.Array:
    """Attention of one new token to the seen slots of a cache and to itself: (b, 1, heads * head_dim)."""
    b, _, kv_heads, head_dim = key_b1kh.shape
    query_bkgh = query_b1nh.reshape(b, kv_heads, -1, head_dim)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    past_scores_bkgs = jnp.where(seen_bs[:, None, None], dot("bkgh,bksh->bkgs", query_bkgh, past_key_bksh), -jnp.inf)
    own_scores_bkg1 = dot("bkgh,bmkh->bkgm", query_bkgh, key_b1kh)
    scores = jnp.concatenate([past_scores_bkgs, own_scores_bkg1], axis=-1) * head_dim**-0.5
    weights = jax.nn.softmax(scores, axis=-1).astype(query_b1nh.dtype)
    out_bkgh = dot("bkgs,bksh->bkgh", weights[..., :-1], past_value_bksh)
    out_bkgh += weights[..., -1:] * value_b1kh[:, 0, :, None]
    return out_bkgh.astype(query_b1nh.dtype).reshape(b, 1, -1)


class Attention(nnx.Module):
    """Causal grouped-query attention with RMSNorm on each query and key head."""

    def __init__(self, sizes: DecoderSizes, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike) -> None:
        d, h, eps = sizes.hidden_size, sizes.head_dim, sizes.rms_norm_eps
        query_features, key_features = sizes.num_attention_heads * h, sizes.num_key_value_heads * h
        self.head_dim = h

        def linear(features_in: int, features_out: int) -> nnx.Linear:
            return nnx.Linear(
                features_in,
                features_out,
                use_bias=sizes.attention_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.q_proj = linear(d, query_features)
        self.k_proj = linear(d, key_features)
        self.v_proj = linear(d, key_features)
        self.o_proj = linear(query_features, d)
        self.q_norm = nnx.RMSNorm(h, epsilon=eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.k_norm = nnx.RMSNorm(h, epsilon=eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def project(self, x_btd: jax.Array, rotary: Rotary) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys (both normed and rotated) and values of the tokens, each (b, t, heads, head_dim)."""

        def heads(x_bte: jax.Array) -> jax.Array:
            return x_bte.reshape(*x_bte.shape[:2], -1, self.head_dim)

        query = rotate_halves(self.q_norm(heads(self.q_proj(x_btd))), rotary)
        key = rotate_halves(self.k_norm(heads(self.k_proj(x_btd))), rotary)
        return query, key, heads(self.v_proj(x_btd))

    def __call__(
        self,
        x_btd: jax.Array,
        rotary: Rotary,
        mask: jax.Array | None,
        cache: KVCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache | None]:
        """See `DecoderLayer`."""
        b, t, _ = x_btd.shape
        query, key, value = self.project(x_btd, rotary)
        if cache is not None:
            if mask is None:
                raise ClvrError("attention with a cache needs a mask; make one with causal_mask(queries, keys, start)")
            cache = KVCache(_write(cache.key, key, start), _write(cache.value, value, start))
            # The mask says how much of the cache is in use, so that a prefill does not attend to empty entries.
            key, value = (entries[:, : mask.shape[-1]].astype(query.dtype) for entries in cache)
        if mask is None or mask.ndim == 2:
            out = attention(query, key, value, key_mask_bk=mask, is_causal=True)
        else:
            out = attention(query, key, value, mask=mask)
        return self.o_proj(out.reshape(b, t, -1)), cache


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, sizes: DecoderSizes, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike) -> None:
        def linear(features_in: int, features_out: int) -> nnx.Linear:
            return nnx.Linear(
                features_in, features_out, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.gate_proj = linear(sizes.hidden_size, sizes.intermediate_size)
        self.up_proj = linear(sizes.hidden_size, sizes.intermediate_size)
        self.down_proj = linear(sizes.intermediate_size, sizes.hidden_size)

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        """(b, t, hidden_size) -> (b, t, hidden_size)."""
        hidden = jax.nn.silu(self.gate_proj(x_btd)) * self.up_proj(x_btd)
        return self.down_proj(with_logical_constraint(hidden, "batch", "tokens", "mlp_act"))


class DecoderLayer(nnx.Module):
    """Attention and MLP, each after an RMSNorm and added to the residual stream."""

    def __init__(
        self,
        sizes: DecoderSizes,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ) -> None:
        d, eps = sizes.hidden_size, sizes.rms_norm_eps
        self.self_attn = Attention(sizes, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.mlp = MLP(sizes, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.input_layernorm = nnx.RMSNorm(d, epsilon=eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = nnx.RMSNorm(d, epsilon=eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        x_btd: jax.Array,
        rotary: Rotary,
        mask: jax.Array | None = None,
        cache: KVCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache | None]:
        """Runs t tokens through the layer.

        Args:
          x_btd: (b, t, hidden_size).
          rotary: cosines and sines of the tokens' positions.
          mask: None is plain causal; (b, t), nonzero at real tokens, is causal without padding; boolean, broadcastable
            to (b, heads, t, keys), see `causal_mask`, says it all, and only that goes with a cache that is in use.
          cache: this layer's past, (b, max_len, kv_heads, head_dim) each. The new keys and values are written into it,
            and attention sees its first mask.shape[-1] entries.
          start: cache index of the first new token, one integer or (b,); start + t must not exceed max_len (a traced
            start beyond it is clamped by XLA and overwrites the end).
        Returns: (b, t, hidden_size) and the cache with the new tokens in it (None if none was given).
        """
        out, cache = self.self_attn(self.input_layernorm(x_btd), rotary, mask, cache, start)
        x_btd = x_btd + out
        x_btd = x_btd + self.mlp(self.post_attention_layernorm(x_btd))
        return with_logical_constraint(x_btd, "batch", "tokens", None), cache
