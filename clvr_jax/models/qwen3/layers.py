"""The decoder layer of Qwen3, shared by the text encoder (`qwen3`) and the controller (`qwen3_vl`).

Grouped-query attention with a norm of every query and key head, then a SwiGLU MLP, each after an RMSNorm. Rotary
positions are passed as cosines and sines, so that one layer supports one-axis and interleaved multi-axis positions.

Source: Qwen3DecoderLayer (transformers); attribute names are its keys.
"""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.attention import attention
from clvr_jax.sharding import with_logical_constraint

Rotary = tuple[Float[Array, "#b t f"], Float[Array, "#b t f"]]
"""Cosines and sines, each (b or 1, t, head_dim / 2): they rotate channel i of a head with channel i + head_dim / 2."""


class DecoderConfig(Protocol):
    """The configuration of a decoder layer: fields of the configurations of both language models."""

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
        """Number of query heads."""
        ...

    @property
    def num_key_value_heads(self) -> int:
        """Number of key and value heads, a divisor of the number of query heads."""
        ...

    @property
    def head_dim(self) -> int:
        """Channels of one head; even."""
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

    key: Float[Array, "*l b s m h"]
    value: Float[Array, "*l b s m h"]


def empty_cache(
    config: DecoderConfig, layers: int, batch: int, max_len: int, dtype: DTypeLike = jnp.float32
) -> KVCache:
    """Returns a cache of zeros for `layers` decoder layers, layer axis first; masks exclude unwritten entries."""
    shape = (layers, batch, max_len, config.num_key_value_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def inverse_frequencies(head_dim: int, theta: float) -> Float32[np.ndarray, " f"]:
    """Returns the angle of each channel pair for one position, theta ** (-2 i / head_dim), (head_dim / 2,).

    The power is computed in float64 and rounded to float32 before the reciprocal, which gives the float32 values of
    PyTorch. At position 10,000 an error in the last bit would be an error of the angle of up to 6e-4.
    """
    powers = np.power(float(theta), np.arange(0, head_dim, 2) / head_dim).astype(np.float32)
    return np.float32(1) / powers


def rotary_tables(positions_bt: Int[Array, "b t"], head_dim: int, theta: float) -> Rotary:
    """Returns cosines and sines of integer positions (b, t), each (b, t, head_dim / 2) float32."""
    angles = positions_bt.astype(jnp.float32)[..., None] * inverse_frequencies(head_dim, theta)
    return jnp.cos(angles), jnp.sin(angles)


def rotate_halves(x_btnh: Float[Array, "b t n h"], rotary: Rotary) -> Float[Array, "b t n h"]:
    """Rotates channel pairs (i, i + head_dim / 2) by their angles, in float32; returns the dtype of x."""
    cos, sin = (table[:, :, None, :] for table in rotary)
    first, second = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_btnh.dtype)


def causal_mask(
    queries: int,
    keys: int,
    start: Int[Array, ""] | Int[Array, " b"] | int = 0,
    key_mask_bk: Shaped[Array, "b k"] | None = None,
) -> Bool[Array, "_ 1 q k"]:
    """Returns which cache entries each query attends to: those up to its own position that are not masked.

    Args:
      queries: number of new tokens.
      keys: number of leading cache entries to attend to (without a cache, of the tokens).
      start: cache index of the first new token, an integer or (b,) integers.
      key_mask_bk: (b, keys), nonzero at real tokens, 0 at padding.
    Returns: boolean (b or 1, 1, queries, keys).
    """
    query_index = jnp.reshape(jnp.asarray(start), (-1, 1, 1, 1)) + jnp.arange(queries)[:, None]
    mask = jnp.arange(keys) <= query_index
    return mask if key_mask_bk is None else mask & (key_mask_bk != 0)[:, None, None, :]


def _write(cache_bknh: jax.Array, new_btnh: jax.Array, start: jax.Array | int) -> jax.Array:
    """Writes the new entries at start, start + 1, ... of every row; `start` is one integer or one for each row."""
    new_btnh = new_btnh.astype(cache_bknh.dtype)
    if jnp.ndim(start) == 0:
        return jax.lax.dynamic_update_slice_in_dim(cache_bknh, new_btnh, start, axis=1)
    return jax.vmap(lambda row, new, index: jax.lax.dynamic_update_slice_in_dim(row, new, index, axis=0))(
        cache_bknh, new_btnh, jnp.asarray(start)
    )


def attend_past(
    query_b1nh: Float[Array, "b 1 n h"],
    key_b1kh: Float[Array, "b 1 k h"],
    value_b1kh: Float[Array, "b 1 k h"],
    past_key_bksh: Float[Array, "b k s h"],
    past_value_bksh: Float[Array, "b k s h"],
    filled_bs: Bool[Array, "b s"],
) -> Float[Array, "b 1 d"]:
    """Computes attention of one new token to the filled slots of a cache and to itself, (b, 1, heads * head_dim)."""
    b, _, kv_heads, head_dim = key_b1kh.shape
    query_bkgh = query_b1nh.reshape(b, kv_heads, -1, head_dim)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    past_scores_bkgs = jnp.where(filled_bs[:, None, None], dot("bkgh,bksh->bkgs", query_bkgh, past_key_bksh), -jnp.inf)
    own_scores_bkg1 = dot("bkgh,bmkh->bkgm", query_bkgh, key_b1kh)
    scores = jnp.concatenate([past_scores_bkgs, own_scores_bkg1], axis=-1) * head_dim**-0.5
    weights = jax.nn.softmax(scores, axis=-1).astype(query_b1nh.dtype)
    out_bkgh = dot("bkgs,bksh->bkgh", weights[..., :-1], past_value_bksh)
    out_bkgh += weights[..., -1:] * value_b1kh[:, 0, :, None]
    return out_bkgh.astype(query_b1nh.dtype).reshape(b, 1, -1)


class Attention(nnx.Module):
    """Causal grouped-query attention with an RMSNorm of each query and key head."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike) -> None:
        d, h, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        query_features, key_features = config.num_attention_heads * h, config.num_key_value_heads * h
        self.head_dim = h

        def linear(features_in: int, features_out: int) -> nnx.Linear:
            return nnx.Linear(
                features_in,
                features_out,
                use_bias=config.attention_bias,
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

    def project(
        self, x_btd: Float[Array, "b t d"], rotary: Rotary
    ) -> tuple[Float[Array, "b t n h"], Float[Array, "b t k h"], Float[Array, "b t k h"]]:
        """Returns queries and keys (normed and rotated) and values of the tokens, each (b, t, heads, head_dim)."""

        def heads(x_bte: jax.Array) -> jax.Array:
            return x_bte.reshape(*x_bte.shape[:2], -1, self.head_dim)

        query = rotate_halves(self.q_norm(heads(self.q_proj(x_btd))), rotary)
        key = rotate_halves(self.k_norm(heads(self.k_proj(x_btd))), rotary)
        return query, key, heads(self.v_proj(x_btd))

    def __call__(
        self,
        x_btd: Float[Array, "b t d"],
        rotary: Rotary,
        mask: Shaped[Array, "b s"] | Bool[Array, "#b _ t s"] | None,
        cache: KVCache | None = None,
        start: Int[Array, ""] | Int[Array, " b"] | int = 0,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """Maps (b, t, hidden_size) to the same shape; arguments and cache as in `DecoderLayer`."""
        b, t, _ = x_btd.shape
        query, key, value = self.project(x_btd, rotary)
        if cache is not None:
            if mask is None:
                raise ClvrError("attention with a cache needs a mask; use causal_mask(queries, keys, start)")
            cache = KVCache(_write(cache.key, key, start), _write(cache.value, value, start))
            # The length of the mask is the number of entries in use, so that a prefill does not attend to empty ones.
            key, value = (entries[:, : mask.shape[-1]].astype(query.dtype) for entries in cache)
        if mask is None or mask.ndim == 2:
            out = attention(query, key, value, key_mask_bk=mask, is_causal=True)
        else:
            out = attention(query, key, value, mask=mask)
        return self.o_proj(out.reshape(b, t, -1)), cache


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike) -> None:
        def linear(features_in: int, features_out: int) -> nnx.Linear:
            return nnx.Linear(
                features_in, features_out, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x_btd: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Maps (b, t, hidden_size) to the same shape."""
        hidden = jax.nn.silu(self.gate_proj(x_btd)) * self.up_proj(x_btd)
        return self.down_proj(with_logical_constraint(hidden, "batch", "tokens", "mlp_act"))


class DecoderLayer(nnx.Module):
    """A decoder layer: attention and MLP, each after an RMSNorm and with a residual connection."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ) -> None:
        d, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.input_layernorm = nnx.RMSNorm(d, epsilon=eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = nnx.RMSNorm(d, epsilon=eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        x_btd: Float[Array, "b t d"],
        rotary: Rotary,
        mask: Shaped[Array, "b s"] | Bool[Array, "#b _ t s"] | None = None,
        cache: KVCache | None = None,
        start: Int[Array, ""] | Int[Array, " b"] | int = 0,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """Applies the layer to t tokens.

        Args:
          x_btd: (b, t, hidden_size).
          rotary: cosines and sines of the tokens' positions.
          mask: None is causal; (b, keys), nonzero at real tokens, is causal without padding, and the new tokens are
            those of its last t keys; a boolean with four axes, broadcastable to (b, heads, t, keys), is the full mask,
            see `causal_mask`. Without a cache of earlier tokens keys = t. A `start` that differs from keys - t requires
            the full mask.
          cache: keys and values of this layer, each (b, max_len, kv_heads, head_dim). The new keys and values are
            written into it, and attention is over its first mask.shape[-1] entries.
          start: cache index of the first new token, one integer or (b,); start + t must not exceed max_len (XLA clamps
            a larger start, which overwrites the last entries).
        Returns: (b, t, hidden_size), and the cache with the new tokens (None without a cache).
        """
        out, cache = self.self_attn(self.input_layernorm(x_btd), rotary, mask, cache, start)
        x_btd = x_btd + out
        x_btd = x_btd + self.mlp(self.post_attention_layernorm(x_btd))
        return with_logical_constraint(x_btd, "batch", "tokens", None), cache
