"""The blocks of the FLUX.2 transformer: double-stream and single-stream blocks, modulation and embeddings.

Double-stream blocks process text and image tokens with separate weights and joint attention. Single-stream blocks
process the concatenation of text and image; their attention and MLP share one input and one output projection.

Source: `Flux2Transformer2DModel` (diffusers); attribute names are its keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from clvr_jax.models.common.layers import sinusoidal_embedding
from clvr_jax.models.flux2.config import Flux2TransformerConfig
from clvr_jax.models.flux2.reference_cache import Attend, KeyValue, attend
from clvr_jax.sharding import with_logical_constraint

Rotary = tuple[Float[Array, "n f"], Float[Array, "n f"]]
"""Cosines and sines, each (text + image tokens, head_dim / 2)."""


class Precision(NamedTuple):
    """Compute and storage dtypes of a module, passed as keyword arguments to its layers."""

    dtype: DTypeLike
    param_dtype: DTypeLike


def linear(features_in: int, features_out: int, precision: Precision, rngs: nnx.Rngs) -> nnx.Linear:
    """Makes a linear layer without bias."""
    return nnx.Linear(features_in, features_out, use_bias=False, **precision._asdict(), rngs=rngs)


def _head_norm(config: Flux2TransformerConfig, precision: Precision, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.attention_head_dim, epsilon=config.eps, **precision._asdict(), rngs=rngs)


def _modulated_norm(x_btd: jax.Array, shift: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Returns (1 + scale) * norm(x) + shift in the dtype of x; the LayerNorm has no weights and float32 statistics."""
    x = x_btd.astype(jnp.float32)
    centered = x - x.mean(-1, keepdims=True)
    normed = centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + eps)
    return (1 + scale) * normed.astype(x_btd.dtype) + shift


def _times_1000(x_b: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns 1000 x in float32, rounded to `dtype` before and after the product, as PyTorch rounds.

    In bfloat16 the rounding changes a timestep by up to two units of 1000. XLA may remove a pair of casts and keep the
    excess precision; it does not remove `reduce_precision`.
    """
    kind = jnp.finfo(dtype)
    rounded_b = jax.lax.reduce_precision(x_b.astype(jnp.float32), kind.nexp, kind.nmant)
    return jax.lax.reduce_precision(rounded_b * 1000, kind.nexp, kind.nmant)


def _swiglu(x: jax.Array) -> jax.Array:
    gate, value = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gate) * value


def _rotate(x_bsnh: jax.Array, rotary: Rotary) -> jax.Array:
    """Rotates the channel pairs (2 i, 2 i + 1) of each head by their angles; computes in float32."""
    cos, sin = (table[None, :, None, :] for table in rotary)
    pairs = x_bsnh.astype(jnp.float32).reshape(*x_bsnh.shape[:-1], -1, 2)
    real, imag = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([real * cos - imag * sin, imag * cos + real * sin], axis=-1)
    return rotated.reshape(x_bsnh.shape).astype(x_bsnh.dtype)


class TimestepEmbedder(nnx.Module):
    """Two linear layers with SiLU between them, for a sinusoidal embedding."""

    def __init__(self, config: Flux2TransformerConfig, precision: Precision, rngs: nnx.Rngs) -> None:
        self.linear_1 = linear(config.timestep_guidance_channels, config.inner_dim, precision, rngs)
        self.linear_2 = linear(config.inner_dim, config.inner_dim, precision, rngs)

    def __call__(self, x_bc: Float[Array, "b c"]) -> Float[Array, "b d"]:
        """Maps (b, channels) to (b, d)."""
        return self.linear_2(jax.nn.silu(self.linear_1(x_bc)))


class TimestepGuidanceEmbeddings(nnx.Module):
    """Embedding of the timestep and, for guidance-distilled models, of the guidance scale."""

    def __init__(self, config: Flux2TransformerConfig, precision: Precision, rngs: nnx.Rngs) -> None:
        self.channels = config.timestep_guidance_channels
        self.dtype = precision.dtype
        self.timestep_embedder = TimestepEmbedder(config, precision, rngs)
        self.guidance_embedder = TimestepEmbedder(config, precision, rngs) if config.guidance_embeds else None

    def __call__(self, timestep_b: Float[Array, " b"], guidance_b: Float[Array, " b"] | None) -> Float[Array, "b d"]:
        """Maps timestep in [0, 1] and guidance scale, each (b,), to (b, d)."""
        embedding = self.timestep_embedder(self._sinusoids(timestep_b))
        if self.guidance_embedder is not None and guidance_b is not None:
            embedding += self.guidance_embedder(self._sinusoids(guidance_b))
        return embedding

    def _sinusoids(self, x_b: jax.Array) -> jax.Array:
        return sinusoidal_embedding(_times_1000(x_b, self.dtype), self.channels, self.dtype)


class Modulation(nnx.Module):
    """Shift, scale and gate for `sets` sub-blocks, shared by all tokens."""

    def __init__(self, config: Flux2TransformerConfig, sets: int, precision: Precision, rngs: nnx.Rngs) -> None:
        self.linear = linear(config.inner_dim, 3 * sets * config.inner_dim, precision, rngs)

    def __call__(self, embedding_bd: Float[Array, "b d"]) -> Float[Array, "b 1 e"]:
        """Maps (b, d) to (b, 1, 3 * sets * d)."""
        return self.linear(jax.nn.silu(embedding_bd))[:, None]


class FeedForward(nnx.Module):
    """Gated MLP; one projection computes gate and value."""

    def __init__(self, config: Flux2TransformerConfig, precision: Precision, rngs: nnx.Rngs) -> None:
        self.linear_in = linear(config.inner_dim, 2 * config.mlp_dim, precision, rngs)
        self.linear_out = linear(config.mlp_dim, config.inner_dim, precision, rngs)

    def __call__(self, x_btd: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Maps (b, t, d) to (b, t, d)."""
        return self.linear_out(with_logical_constraint(_swiglu(self.linear_in(x_btd)), "batch", "tokens", "mlp_act"))


class JointAttention(nnx.Module):
    """Attention over [text, image], with separate projections and head norms for each stream."""

    def __init__(self, config: Flux2TransformerConfig, precision: Precision, rngs: nnx.Rngs) -> None:
        d = config.inner_dim
        self.head_dim = config.attention_head_dim
        self.to_q, self.to_k, self.to_v = (linear(d, d, precision, rngs) for _ in range(3))
        self.norm_q, self.norm_k = (_head_norm(config, precision, rngs) for _ in range(2))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (linear(d, d, precision, rngs) for _ in range(3))
        self.norm_added_q, self.norm_added_k = (_head_norm(config, precision, rngs) for _ in range(2))
        self.to_out = nnx.List([linear(d, d, precision, rngs)])
        self.to_add_out = linear(d, d, precision, rngs)

    def __call__(
        self,
        image_btd: Float[Array, "b t d"],
        text_btd: Float[Array, "b s d"],
        rotary: Rotary,
        attend: Attend,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b s d"]]:
        """Returns the attention output of image and text, (b, t, d) each."""
        heads = self._heads
        query = self.norm_q(heads(self.to_q(image_btd)))
        key = self.norm_k(heads(self.to_k(image_btd)))
        text_query = self.norm_added_q(heads(self.add_q_proj(text_btd)))
        text_key = self.norm_added_k(heads(self.add_k_proj(text_btd)))
        value = heads(jnp.concatenate([self.add_v_proj(text_btd), self.to_v(image_btd)], axis=1))
        query = _rotate(jnp.concatenate([text_query, query], axis=1), rotary)
        key = _rotate(jnp.concatenate([text_key, key], axis=1), rotary)
        out = attend(query, KeyValue(key, value))
        text = text_btd.shape[1]
        return self.to_out[0](out[:, text:]), self.to_add_out(out[:, :text])

    def references(
        self, x_btd: Float[Array, "b t d"], rotary: Rotary, attend: Attend
    ) -> tuple[Float[Array, "b t d"], KeyValue]:
        """Returns the attention output of reference tokens, and their own keys and values."""
        query = _rotate(self.norm_q(self._heads(self.to_q(x_btd))), rotary)
        key = _rotate(self.norm_k(self._heads(self.to_k(x_btd))), rotary)
        own = KeyValue(key, self._heads(self.to_v(x_btd)))
        return self.to_out[0](attend(query, own)), own

    def _heads(self, x_btd: jax.Array) -> jax.Array:
        return x_btd.reshape(*x_btd.shape[:2], -1, self.head_dim)


class TransformerBlock(nnx.Module):
    """Double-stream block: joint attention, then one MLP for each stream."""

    def __init__(self, config: Flux2TransformerConfig, precision: Precision, rngs: nnx.Rngs) -> None:
        self.eps = config.eps
        self.attn = JointAttention(config, precision, rngs)
        self.ff = FeedForward(config, precision, rngs)
        self.ff_context = FeedForward(config, precision, rngs)

    def __call__(
        self,
        image_btd: Float[Array, "b t d"],
        text_btd: Float[Array, "b s d"],
        image_modulation: Float[Array, "b #t 6*d"],
        text_modulation: Float[Array, "b #s 6*d"],
        rotary: Rotary,
        attend: Attend = attend,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b s d"]]:
        """Returns image and text. Modulations: (b, 1 or t, 6 d): shift, scale, gate of attention, then of the MLP.

        attend: what the queries attend to, their own sequence if not given.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(image_modulation, 6, axis=-1)
        text_shift, text_scale, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate = jnp.split(
            text_modulation, 6, axis=-1
        )
        image_out, text_out = self.attn(
            _modulated_norm(image_btd, shift, scale, self.eps),
            _modulated_norm(text_btd, text_shift, text_scale, self.eps),
            rotary,
            attend,
        )
        image_btd += gate * image_out
        image_btd += mlp_gate * self.ff(_modulated_norm(image_btd, mlp_shift, mlp_scale, self.eps))
        text_btd += text_gate * text_out
        text_btd += text_mlp_gate * self.ff_context(_modulated_norm(text_btd, text_mlp_shift, text_mlp_scale, self.eps))
        return image_btd, text_btd

    def references(
        self,
        x_btd: Float[Array, "b t d"],
        modulation: Float[Array, "b 1 6*d"],
        rotary: Rotary,
        attend: Attend,
    ) -> tuple[Float[Array, "b t d"], KeyValue]:
        """Returns reference tokens after the block, with their keys and values; the text has no part in it.

        modulation: of the image stream. attend: what the queries attend to.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(modulation, 6, axis=-1)
        out, own = self.attn.references(_modulated_norm(x_btd, shift, scale, self.eps), rotary, attend)
        x_btd += gate * out
        return x_btd + mlp_gate * self.ff(_modulated_norm(x_btd, mlp_shift, mlp_scale, self.eps)), own


class ParallelSelfAttention(nnx.Module):
    """Attention and gated MLP in parallel, with one projection for q, k, v and MLP input, and one for both outputs."""

    def __init__(self, config: Flux2TransformerConfig, precision: Precision, rngs: nnx.Rngs) -> None:
        d = config.inner_dim
        self.head_dim = config.attention_head_dim
        self.to_qkv_mlp_proj = linear(d, 3 * d + 2 * config.mlp_dim, precision, rngs)
        self.norm_q, self.norm_k = (_head_norm(config, precision, rngs) for _ in range(2))
        self.to_out = linear(d + config.mlp_dim, d, precision, rngs)

    def __call__(
        self,
        x_btd: Float[Array, "b t d"],
        rotary: Rotary,
        attend: Attend,
    ) -> tuple[Float[Array, "b t d"], KeyValue]:
        """Returns the output, (b, t, d), and the tokens' own keys and values."""
        b, t, d = x_btd.shape
        projected = self.to_qkv_mlp_proj(x_btd)
        query, key, value, hidden = jnp.split(projected, (d, 2 * d, 3 * d), axis=-1)
        query, key, value = (x.reshape(b, t, -1, self.head_dim) for x in (query, key, value))
        own = KeyValue(_rotate(self.norm_k(key), rotary), value)
        out = attend(_rotate(self.norm_q(query), rotary), own)
        return self.to_out(jnp.concatenate([out, _swiglu(hidden)], axis=-1)), own


class SingleTransformerBlock(nnx.Module):
    """Single-stream block over [text, image]."""

    def __init__(self, config: Flux2TransformerConfig, precision: Precision, rngs: nnx.Rngs) -> None:
        self.eps = config.eps
        self.attn = ParallelSelfAttention(config, precision, rngs)

    def __call__(
        self,
        x_btd: Float[Array, "b t d"],
        modulation: Float[Array, "b #t 3*d"],
        rotary: Rotary,
        attend: Attend = attend,
    ) -> tuple[Float[Array, "b t d"], KeyValue]:
        """Returns the tokens after the block, (b, t, d), and their keys and values.

        modulation: (b, 1 or t, 3 d), shift, scale and gate. attend: what the queries attend to, their own sequence if
        not given.
        """
        shift, scale, gate = jnp.split(modulation, 3, axis=-1)
        out, own = self.attn(_modulated_norm(x_btd, shift, scale, self.eps), rotary, attend)
        return x_btd + gate * out, own


class OutputNorm(nnx.Module):
    """LayerNorm with scale and shift from the embedding, in diffusers' order (scale, shift)."""

    def __init__(self, config: Flux2TransformerConfig, precision: Precision, rngs: nnx.Rngs) -> None:
        self.eps = config.eps
        self.linear = linear(config.inner_dim, 2 * config.inner_dim, precision, rngs)

    def __call__(self, x_btd: Float[Array, "b t d"], embedding_bd: Float[Array, "b d"]) -> Float[Array, "b t d"]:
        """Maps (b, t, d) and an embedding (b, d) to (b, t, d)."""
        scale, shift = jnp.split(self.linear(jax.nn.silu(embedding_bd))[:, None], 2, axis=-1)
        return _modulated_norm(x_btd, shift, scale, self.eps)
