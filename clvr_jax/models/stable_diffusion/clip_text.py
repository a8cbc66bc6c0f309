"""CLIP's text encoder: the only one of Stable Diffusion 1.5, and both of Stable Diffusion XL.

Stable Diffusion 1.5 uses the last hidden state after the final norm. SDXL uses the residual stream before the last
layer of both encoders, without the final norm, and the projected end-of-text feature of the second.

Source: CLIPTextModel, CLIPTextModelWithProjection (transformers); attribute names are its keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.attention import attention
from clvr_jax.models.common.dtypes import Dtypes
from clvr_jax.models.common.layers import scan_blocks, stack_blocks


def quick_gelu(x: Float[Array, " *d"]) -> Float[Array, " *d"]:
    """Returns x sigmoid(1.702 x), OpenAI's approximation of GELU, in the shape and dtype of x."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": partial(jax.nn.gelu, approximate=False),
}

# Configurations written before transformers 4.31 have 2, which is not the end-of-text token.
_LEGACY_EOS = 2


@dataclass(frozen=True)
class CLIPTextConfig:
    """Configuration of a CLIP text encoder, with the field names of the transformers `config.json`.

    eos_token_id: the token whose feature is the pooled output; 2 means the largest id of each text.
    projection_dim: width of the projected pooled output; None for an encoder without `text_projection`.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int | None = None

    def __post_init__(self) -> None:
        positive = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings "
            "layer_norm_eps"
        )
        for name in positive.split() + ["projection_dim"] * (self.projection_dim is not None):
            if getattr(self, name) <= 0:
                raise ClvrError(f"CLIPTextConfig.{name} is {getattr(self, name)}; it must be positive")
        if self.hidden_size % self.num_attention_heads:
            raise ClvrError(
                f"CLIPTextConfig.num_attention_heads {self.num_attention_heads} must divide "
                f"hidden_size {self.hidden_size}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ClvrError(f"CLIPTextConfig.hidden_act is {self.hidden_act!r}; it must be one of {list(ACTIVATIONS)}")
        if not isinstance(self.eos_token_id, int):
            raise ClvrError(f"CLIPTextConfig.eos_token_id is {self.eos_token_id!r}; it must be one token id")

    @classmethod
    def clip_vit_l(cls) -> "CLIPTextConfig":
        """Returns OpenAI's CLIP ViT-L/14: the text encoder of Stable Diffusion 1.5, and the first of SDXL."""
        return cls(hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=_LEGACY_EOS)

    @classmethod
    def open_clip_vit_bigg(cls) -> "CLIPTextConfig":
        """Returns OpenCLIP ViT-bigG/14: the second text encoder of SDXL."""
        return cls(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            hidden_act="gelu",
            eos_token_id=_LEGACY_EOS,
            projection_dim=1280,
        )


class CLIPTextOutput(NamedTuple):
    """The output of the encoder for a batch of texts; field names are those of transformers.

    hidden_states_lbtd: (num_hidden_layers + 1, b, t, hidden_size), 0 the embeddings, k the output of k layers,
      all before the final norm; SDXL uses [-2].
    last_hidden_state_btd: (b, t, hidden_size) after the final norm.
    pooler_output_bd: (b, hidden_size), the last hidden state at the end of each text.
    text_embeds_bp: (b, projection_dim), the pooled output projected; None without `text_projection`.
    """

    hidden_states_lbtd: Float[Array, "l b t d"]
    last_hidden_state_btd: Float[Array, "b t d"]
    pooler_output_bd: Float[Array, "b d"]
    text_embeds_bp: Float[Array, "b p"] | None


class CLIPText(nnx.Module):
    """CLIP's text encoder: token ids to hidden states, pooled output and, with `projection_dim`, text embedding.

    Args:
      config: see the presets of `CLIPTextConfig`.
      rngs: random streams for the initial weights.
      dtype: dtype of the computation; norm statistics and softmax are float32 inside.
      param_dtype: dtype of the weights.
    """

    def __init__(
        self,
        config: CLIPTextConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ) -> None:
        dtypes: Dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.text_model = _TextModel(config, rngs=rngs, **dtypes)
        if config.projection_dim is not None:
            self.text_projection = nnx.Linear(
                config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs, **dtypes
            )

    def __call__(self, input_ids_bt: Int[Array, "b t"], clip_skip: int = 0) -> CLIPTextOutput:
        """Encodes texts. Attention is causal, so padding on the right does not change the states of earlier tokens.

        Args:
          input_ids_bt: (b, t) token ids, t at most max_position_embeddings.
          clip_skip: number of last layers that `last_hidden_state_btd` skips, as in diffusers; the final norm is
            applied, and the pooled output always has all layers.
        Raises: ClvrError for a text that is too long, or for more layers to skip than there are.
        """
        config, text_model = self.config, self.text_model
        t = input_ids_bt.shape[1]
        if t > config.max_position_embeddings:
            raise ClvrError(
                f"input_ids have {t} tokens, more than max_position_embeddings {config.max_position_embeddings}"
            )
        if not 0 <= clip_skip <= config.num_hidden_layers:
            raise ClvrError(f"clip_skip is {clip_skip}; it must be in 0..{config.num_hidden_layers}")

        def step(layer: _EncoderLayer, x_btd: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            x_btd = layer(x_btd)
            return x_btd, x_btd

        embedded = text_model.embeddings(input_ids_bt)
        last_btd, outputs_lbtd = scan_blocks(text_model.encoder.layers, step, embedded)
        hidden_states_lbtd = jnp.concatenate([embedded[None], outputs_lbtd])
        normed_btd = text_model.final_layer_norm(last_btd)
        ends_b = _end_of_text(input_ids_bt, config.eos_token_id)
        pooled_bd = normed_btd[jnp.arange(len(ends_b)), ends_b]
        return CLIPTextOutput(
            hidden_states_lbtd=hidden_states_lbtd,
            last_hidden_state_btd=(
                text_model.final_layer_norm(hidden_states_lbtd[-1 - clip_skip]) if clip_skip else normed_btd
            ),
            pooler_output_bd=pooled_bd,
            text_embeds_bp=None if config.projection_dim is None else self.text_projection(pooled_bd),
        )


def _end_of_text(input_ids_bt: jax.Array, eos_token_id: int) -> jax.Array:
    """Returns the index of the first end-of-text token, the largest id of a text, (b,); 0 without one."""
    return jnp.argmax(input_ids_bt if eos_token_id == _LEGACY_EOS else input_ids_bt == eos_token_id, axis=-1)


class _TextModel(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]) -> None:
        self.embeddings = _Embeddings(config, rngs=rngs, **dtypes)
        self.encoder = _Encoder(config, rngs=rngs, **dtypes)
        self.final_layer_norm = _layer_norm(config, rngs=rngs, **dtypes)


class _Embeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]) -> None:
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs, **dtypes)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, config.hidden_size, rngs=rngs, **dtypes)

    def __call__(self, input_ids_bt: jax.Array) -> jax.Array:
        return self.token_embedding(input_ids_bt) + self.position_embedding(jnp.arange(input_ids_bt.shape[1]))


class _Encoder(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]) -> None:
        self.layers = stack_blocks(
            lambda layer_rngs: _EncoderLayer(config, rngs=layer_rngs, **dtypes), config.num_hidden_layers, rngs
        )


class _EncoderLayer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]) -> None:
        self.self_attn = _Attention(config, rngs=rngs, **dtypes)
        self.layer_norm1 = _layer_norm(config, rngs=rngs, **dtypes)
        self.mlp = _MLP(config, rngs=rngs, **dtypes)
        self.layer_norm2 = _layer_norm(config, rngs=rngs, **dtypes)

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        x_btd = x_btd + self.self_attn(self.layer_norm1(x_btd))
        return x_btd + self.mlp(self.layer_norm2(x_btd))


class _Attention(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]) -> None:
        linear = partial(nnx.Linear, config.hidden_size, config.hidden_size, rngs=rngs, **dtypes)
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = linear(), linear(), linear(), linear()

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        b, t, _ = x_btd.shape
        heads = (b, t, self.num_heads, -1)
        query, key, value = (proj(x_btd).reshape(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(query, key, value, is_causal=True).reshape(x_btd.shape))


class _MLP(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]) -> None:
        self.hidden_act = config.hidden_act
        self.fc1 = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs, **dtypes)
        self.fc2 = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs, **dtypes)

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x_btd)))


def _layer_norm(config: CLIPTextConfig, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]) -> nnx.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, is inaccurate for features that are far from zero, and CLIP has a few.
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs, **dtypes
    )
