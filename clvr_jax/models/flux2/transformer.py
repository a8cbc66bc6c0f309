"""The FLUX.2 transformer (klein 4B and 9B, dev): predicts the velocity of latent tokens, given text and references.

Double-stream blocks process text and image tokens with separate weights and joint attention. Single-stream blocks
process the concatenation of text and image; their attention and MLP share one input and one output projection. Shift,
scale and gate depend on the timestep and are shared by all blocks of one kind. Reference images are further image
tokens with their own ids (`position_ids`).

Source: FLUX.2 by Black Forest Labs, `Flux2Transformer2DModel` (diffusers); attribute names are its keys.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.attention import attention
from clvr_jax.models.common.layers import scan_blocks, sinusoidal_embedding, stack_blocks
from clvr_jax.models.flux2.position_ids import host_ids, rotary_tables
from clvr_jax.sharding import with_logical_constraint

Rotary = tuple[Float[Array, "n f"], Float[Array, "n f"]]
"""Cosines and sines, each (text + image tokens, head_dim / 2)."""


@dataclass(frozen=True)
class Flux2TransformerConfig:
    """Configuration of a FLUX.2 transformer, with the field names of the diffusers `config.json`."""

    patch_size: int = 1
    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000
    eps: float = 1e-6
    guidance_embeds: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes_dims_rope", tuple(self.axes_dims_rope))
        positive = (
            "patch_size in_channels num_layers num_single_layers attention_head_dim num_attention_heads "
            "joint_attention_dim timestep_guidance_channels mlp_ratio rope_theta eps"
        )
        for name in positive.split():
            if getattr(self, name) <= 0:
                raise ClvrError(f"Flux2TransformerConfig.{name} is {getattr(self, name)}; it must be positive")
        if self.out_channels is not None and self.out_channels <= 0:
            raise ClvrError(f"Flux2TransformerConfig.out_channels is {self.out_channels}; it must be positive or None")
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(d <= 0 or d % 2 for d in self.axes_dims_rope):
            raise ClvrError(
                f"Flux2TransformerConfig.axes_dims_rope {self.axes_dims_rope} must be even numbers that sum to "
                f"attention_head_dim {self.attention_head_dim}"
            )
        if self.timestep_guidance_channels % 2:
            raise ClvrError(
                f"Flux2TransformerConfig.timestep_guidance_channels is {self.timestep_guidance_channels}; "
                "it must be even (cosines and sines)"
            )

    @property
    def inner_dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_dim(self) -> int:
        """Width of one half of the gated MLP."""
        return int(self.inner_dim * self.mlp_ratio)

    @property
    def token_channels(self) -> int:
        """Channels of one output token."""
        return self.patch_size**2 * (self.in_channels if self.out_channels is None else self.out_channels)

    @classmethod
    def klein_4b(cls) -> "Flux2TransformerConfig":
        """Returns FLUX.2 [klein] 4B and its base model (Apache-2.0): 3.876 B parameters."""
        return cls(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        )

    @classmethod
    def klein_9b(cls) -> "Flux2TransformerConfig":
        """Returns FLUX.2 [klein] 9B, its base and KV models (non-commercial license): 9.079 B parameters."""
        return cls(
            num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288, guidance_embeds=False
        )

    @classmethod
    def dev(cls) -> "Flux2TransformerConfig":
        """Returns FLUX.2 [dev] (non-commercial license), which is guidance-distilled."""
        return cls()


class Precision(NamedTuple):
    """Compute and storage dtypes of a module, passed as keyword arguments to its layers."""

    dtype: DTypeLike
    param_dtype: DTypeLike


def _linear(features_in: int, features_out: int, precision: Precision, rngs: nnx.Rngs) -> nnx.Linear:
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
        self.linear_1 = _linear(config.timestep_guidance_channels, config.inner_dim, precision, rngs)
        self.linear_2 = _linear(config.inner_dim, config.inner_dim, precision, rngs)

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
        self.linear = _linear(config.inner_dim, 3 * sets * config.inner_dim, precision, rngs)

    def __call__(self, embedding_bd: Float[Array, "b d"]) -> Float[Array, "b 1 e"]:
        """Maps (b, d) to (b, 1, 3 * sets * d)."""
        return self.linear(jax.nn.silu(embedding_bd))[:, None]


class FeedForward(nnx.Module):
    """Gated MLP; one projection computes gate and value."""

    def __init__(self, config: Flux2TransformerConfig, precision: Precision, rngs: nnx.Rngs) -> None:
        self.linear_in = _linear(config.inner_dim, 2 * config.mlp_dim, precision, rngs)
        self.linear_out = _linear(config.mlp_dim, config.inner_dim, precision, rngs)

    def __call__(self, x_btd: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Maps (b, t, d) to (b, t, d)."""
        return self.linear_out(with_logical_constraint(_swiglu(self.linear_in(x_btd)), "batch", "tokens", "mlp_act"))


class JointAttention(nnx.Module):
    """Attention over [text, image], with separate projections and head norms for each stream."""

    def __init__(self, config: Flux2TransformerConfig, precision: Precision, rngs: nnx.Rngs) -> None:
        d = config.inner_dim
        self.head_dim = config.attention_head_dim
        self.to_q, self.to_k, self.to_v = (_linear(d, d, precision, rngs) for _ in range(3))
        self.norm_q, self.norm_k = (_head_norm(config, precision, rngs) for _ in range(2))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (_linear(d, d, precision, rngs) for _ in range(3))
        self.norm_added_q, self.norm_added_k = (_head_norm(config, precision, rngs) for _ in range(2))
        self.to_out = nnx.List([_linear(d, d, precision, rngs)])
        self.to_add_out = _linear(d, d, precision, rngs)

    def __call__(
        self,
        image_btd: Float[Array, "b t d"],
        text_btd: Float[Array, "b s d"],
        rotary: Rotary,
        mask_bt: Bool[Array, "b s+t"] | None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b s d"]]:
        """Returns the attention output of image and text, (b, t, d) each; mask_bt: `key_mask_bk` of `attention`."""

        def heads(x_btd: jax.Array) -> jax.Array:
            return x_btd.reshape(*x_btd.shape[:2], -1, self.head_dim)

        query = self.norm_q(heads(self.to_q(image_btd)))
        key = self.norm_k(heads(self.to_k(image_btd)))
        text_query = self.norm_added_q(heads(self.add_q_proj(text_btd)))
        text_key = self.norm_added_k(heads(self.add_k_proj(text_btd)))
        value = heads(jnp.concatenate([self.add_v_proj(text_btd), self.to_v(image_btd)], axis=1))
        query = _rotate(jnp.concatenate([text_query, query], axis=1), rotary)
        key = _rotate(jnp.concatenate([text_key, key], axis=1), rotary)
        out = attention(query, key, value, key_mask_bk=mask_bt)
        out = out.reshape(*out.shape[:2], -1)
        text = text_btd.shape[1]
        return self.to_out[0](out[:, text:]), self.to_add_out(out[:, :text])


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
        mask_bt: Bool[Array, "b s+t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b s d"]]:
        """Returns image and text. Modulations: (b, 1 or t, 6 d): shift, scale, gate of attention, then of the MLP."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(image_modulation, 6, axis=-1)
        text_shift, text_scale, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate = jnp.split(
            text_modulation, 6, axis=-1
        )
        image_out, text_out = self.attn(
            _modulated_norm(image_btd, shift, scale, self.eps),
            _modulated_norm(text_btd, text_shift, text_scale, self.eps),
            rotary,
            mask_bt,
        )
        image_btd += gate * image_out
        image_btd += mlp_gate * self.ff(_modulated_norm(image_btd, mlp_shift, mlp_scale, self.eps))
        text_btd += text_gate * text_out
        text_btd += text_mlp_gate * self.ff_context(_modulated_norm(text_btd, text_mlp_shift, text_mlp_scale, self.eps))
        return image_btd, text_btd


class ParallelSelfAttention(nnx.Module):
    """Attention and gated MLP in parallel, with one projection for q, k, v and MLP input, and one for both outputs."""

    def __init__(self, config: Flux2TransformerConfig, precision: Precision, rngs: nnx.Rngs) -> None:
        d = config.inner_dim
        self.head_dim = config.attention_head_dim
        self.to_qkv_mlp_proj = _linear(d, 3 * d + 2 * config.mlp_dim, precision, rngs)
        self.norm_q, self.norm_k = (_head_norm(config, precision, rngs) for _ in range(2))
        self.to_out = _linear(d + config.mlp_dim, d, precision, rngs)

    def __call__(
        self, x_btd: Float[Array, "b t d"], rotary: Rotary, mask_bt: Bool[Array, "b t"] | None
    ) -> Float[Array, "b t d"]:
        """Maps (b, t, d) to (b, t, d); mask_bt: `key_mask_bk` of `attention`."""
        b, t, d = x_btd.shape
        projected = self.to_qkv_mlp_proj(x_btd)
        query, key, value, hidden = jnp.split(projected, (d, 2 * d, 3 * d), axis=-1)
        query, key, value = (x.reshape(b, t, -1, self.head_dim) for x in (query, key, value))
        query = _rotate(self.norm_q(query), rotary)
        key = _rotate(self.norm_k(key), rotary)
        out = attention(query, key, value, key_mask_bk=mask_bt).reshape(b, t, d)
        return self.to_out(jnp.concatenate([out, _swiglu(hidden)], axis=-1))


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
        mask_bt: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Maps (b, t, d) to (b, t, d). Modulation: (b, 1 or t, 3 d), shift, scale and gate."""
        shift, scale, gate = jnp.split(modulation, 3, axis=-1)
        return x_btd + gate * self.attn(_modulated_norm(x_btd, shift, scale, self.eps), rotary, mask_bt)


class OutputNorm(nnx.Module):
    """LayerNorm with scale and shift from the embedding, in diffusers' order (scale, shift)."""

    def __init__(self, config: Flux2TransformerConfig, precision: Precision, rngs: nnx.Rngs) -> None:
        self.eps = config.eps
        self.linear = _linear(config.inner_dim, 2 * config.inner_dim, precision, rngs)

    def __call__(self, x_btd: Float[Array, "b t d"], embedding_bd: Float[Array, "b d"]) -> Float[Array, "b t d"]:
        """Maps (b, t, d) and an embedding (b, d) to (b, t, d)."""
        scale, shift = jnp.split(self.linear(jax.nn.silu(embedding_bd))[:, None], 2, axis=-1)
        return _modulated_norm(x_btd, shift, scale, self.eps)


class Flux2HiddenStates(NamedTuple):
    """The residual stream after every block, layer axis first."""

    image_lbtd: Float[Array, "l b t d"]
    """(num_layers, b, image tokens, d) after each double-stream block."""
    text_lbtd: Float[Array, "l b s d"]
    """(num_layers, b, text tokens, d) after each double-stream block."""
    joint_lbtd: Float[Array, "m b n d"]
    """(num_single_layers, b, text + image tokens, d) after each single-stream block."""


class Flux2Transformer(nnx.Module):
    """The FLUX.2 transformer. Blocks are stacked along a leading layer axis and run by `lax.scan`.

    Args:
      config: see the presets of `Flux2TransformerConfig`.
      rngs: random streams for the initial weights.
      dtype: dtype of the computation; norms, rotations and softmax are float32 inside.
      param_dtype: dtype of the weights.
      remat: rematerialization policy of the blocks, a name in `layers.REMAT`.
    """

    def __init__(
        self,
        config: Flux2TransformerConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: str = "dots",
    ) -> None:
        precision = Precision(dtype, param_dtype)
        self.config = config
        self.remat = remat
        self.time_guidance_embed = TimestepGuidanceEmbeddings(config, precision, rngs)
        self.double_stream_modulation_img = Modulation(config, 2, precision, rngs)
        self.double_stream_modulation_txt = Modulation(config, 2, precision, rngs)
        self.single_stream_modulation = Modulation(config, 1, precision, rngs)
        self.x_embedder = _linear(config.in_channels, config.inner_dim, precision, rngs)
        self.context_embedder = _linear(config.joint_attention_dim, config.inner_dim, precision, rngs)
        self.transformer_blocks = stack_blocks(
            lambda block_rngs: TransformerBlock(config, precision, block_rngs), config.num_layers, rngs
        )
        self.single_transformer_blocks = stack_blocks(
            lambda block_rngs: SingleTransformerBlock(config, precision, block_rngs), config.num_single_layers, rngs
        )
        self.norm_out = OutputNorm(config, precision, rngs)
        self.proj_out = _linear(config.inner_dim, config.token_channels, precision, rngs)

    def __call__(
        self,
        hidden_states_btc: Float[Array, "b t c"],
        encoder_hidden_states_btd: Float[Array, "b s d"],
        timestep_b: Float[Array, " b"],
        img_ids: Int[np.ndarray, "... t axes"],
        txt_ids: Int[np.ndarray, "... s axes"],
        guidance_b: Float[Array, " b"] | None = None,
        *,
        mask_bt: Bool[Array, "b s+t"] | None = None,
        return_hidden_states: bool = False,
    ) -> Float[Array, "b t p"] | tuple[Float[Array, "b t p"], Flux2HiddenStates]:
        """Predicts the velocity of every image token, references included (the caller drops those).

        Args:
          hidden_states_btc: (b, image tokens, in_channels) noisy latents, then references if any.
          encoder_hidden_states_btd: (b, text tokens, joint_attention_dim).
          timestep_b: (b,) in [0, 1], 1 is noise. Rounded to the compute dtype before it is multiplied by 1000, as
            diffusers does: to eight bits in bfloat16.
          img_ids, txt_ids: (tokens, 4) host arrays, see `position_ids`; a leading axis of equal rows is accepted.
          guidance_b: (b,) guidance scale, required if the model embeds guidance and an error otherwise.
          mask_bt: (b, text + image tokens) boolean, False at padding that no token may attend to. The published models
            are run without it: they attend to all 512 text positions.
          return_hidden_states: also return the residual stream after every block.
        Returns: (b, image tokens, patch_size ** 2 * out_channels) in the compute dtype, or that and the hidden states.
        Raises: ClvrError if shapes disagree, ids are traced, or guidance is missing or not supported.
        """
        self._check(hidden_states_btc, encoder_hidden_states_btd, guidance_b)
        text = encoder_hidden_states_btd.shape[1]
        rotary = self._rotary(hidden_states_btc.shape[1], text, img_ids, txt_ids)

        embedding_bd = self.time_guidance_embed(timestep_b, guidance_b)
        image_modulation = self.double_stream_modulation_img(embedding_bd)
        text_modulation = self.double_stream_modulation_txt(embedding_bd)
        modulation = self.single_stream_modulation(embedding_bd)

        def double(
            block: TransformerBlock, carry: tuple[jax.Array, jax.Array], _: None
        ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array] | None]:
            image, text = block(*carry, image_modulation, text_modulation, rotary, mask_bt)
            carry = (
                with_logical_constraint(image, "batch", "tokens", None),
                with_logical_constraint(text, "batch", "tokens", None),
            )
            return carry, carry if return_hidden_states else None

        def single(block: SingleTransformerBlock, x_btd: jax.Array, _: None) -> tuple[jax.Array, jax.Array | None]:
            x_btd = with_logical_constraint(block(x_btd, modulation, rotary, mask_bt), "batch", "tokens", None)
            return x_btd, x_btd if return_hidden_states else None

        streams = self.x_embedder(hidden_states_btc), self.context_embedder(encoder_hidden_states_btd)
        (image_btd, text_btd), double_states = scan_blocks(self.transformer_blocks, double, streams, remat=self.remat)
        joint_btd = jnp.concatenate([text_btd, image_btd], axis=1)
        joint_btd, joint_states = scan_blocks(self.single_transformer_blocks, single, joint_btd, remat=self.remat)
        velocity = self.proj_out(self.norm_out(joint_btd[:, text:], embedding_bd))
        if double_states is None or joint_states is None:
            return velocity
        image_lbtd, text_lbtd = double_states
        return velocity, Flux2HiddenStates(image_lbtd, text_lbtd, joint_states)

    def _rotary(self, image: int, text: int, img_ids: np.ndarray, txt_ids: np.ndarray) -> Rotary:
        """Returns cosines and sines, each (text + image, head_dim / 2)."""
        axes = self.config.axes_dims_rope
        ids = [host_ids(txt_ids, len(axes), "txt_ids"), host_ids(img_ids, len(axes), "img_ids")]
        if (len(ids[0]), len(ids[1])) != (text, image):
            raise ClvrError(f"ids are for {len(ids[0])} text and {len(ids[1])} image tokens; got {text} and {image}")
        cos, sin = rotary_tables(np.concatenate(ids), axes, self.config.rope_theta)
        return jnp.asarray(cos), jnp.asarray(sin)

    def _check(self, image: jax.Array, text: jax.Array, guidance_b: jax.Array | None) -> None:
        for name, array, features in (
            ("hidden_states", image, self.config.in_channels),
            ("encoder_hidden_states", text, self.config.joint_attention_dim),
        ):
            if array.ndim != 3 or array.shape[-1] != features:
                raise ClvrError(f"{name} has shape {array.shape}; expected (batch, tokens, {features})")
        if self.config.guidance_embeds and guidance_b is None:
            raise ClvrError("this FLUX.2 model embeds a guidance scale; pass guidance_b")
        if not self.config.guidance_embeds and guidance_b is not None:
            raise ClvrError(
                "this FLUX.2 model embeds no guidance scale; omit guidance_b and use classifier_free_guidance"
            )
