"""The UNet of SDXL and Stable Diffusion 1.5: predicts the noise (or v) of latents, given a text.

The down blocks reduce the resolution and the up blocks restore it; every layer of an up block also gets the state of a
down block at the same resolution (skip connections). SDXL adds embeddings of the pooled text and of the image size to
that of the timestep; models distilled with guidance (LCM) add an embedding of the guidance scale.

Source: `UNet2DConditionModel` (diffusers); attribute names are its keys.
"""

from dataclasses import dataclass
from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.dtypes import Dtypes
from clvr_jax.models.common.layers import sinusoidal_embedding
from clvr_jax.models.common.torch_numerics import Conv, Linear, silu
from clvr_jax.models.stable_diffusion.unet_blocks import (
    DownBlock,
    MidBlock,
    StageOptions,
    TransformerOptions,
    UpBlock,
    with_batch_sharded,
)

_DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
_UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


@dataclass(frozen=True)
class UNet2DConditionConfig:
    """Configuration of the UNet, with the field names and defaults of diffusers' `unet/config.json`."""

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    # The number of heads, in spite of the name, which diffusers keeps for compatibility with published files.
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None

    def __post_init__(self) -> None:
        widths = self.block_out_channels
        counts = "in_channels out_channels layers_per_block norm_num_groups cross_attention_dim"
        for name in counts.split():
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise ClvrError(f"UNet2DConditionConfig.{name} is {value!r}; it must be one positive integer")
        for name, known in (("down_block_types", _DOWN), ("up_block_types", _UP)):
            kinds = getattr(self, name)
            if len(kinds) != len(widths) or not set(kinds) <= set(known):
                raise ClvrError(f"UNet2DConditionConfig.{name} {kinds} must be {len(widths)} of {', '.join(known)}")
        for name in ("attention_head_dim", "transformer_layers_per_block"):
            values = self._per_block(name)
            if len(values) != len(widths) or not all(isinstance(value, int) and value > 0 for value in values):
                raise ClvrError(
                    f"UNet2DConditionConfig.{name} is {getattr(self, name)!r}; it must be a positive integer or "
                    f"{len(widths)} of them, one for each block"
                )
        divisors = [(width, self.norm_num_groups) for width in widths] + [*zip(widths, self.heads, strict=True)]
        if not widths or widths[0] % 2 or any(width % divisor for width, divisor in divisors):
            raise ClvrError(
                f"UNet2DConditionConfig.block_out_channels {widths} must be multiples of norm_num_groups "
                f"{self.norm_num_groups} and of the numbers of heads {self.heads} (attention_head_dim); the first even"
            )
        additions = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if self.addition_embed_type not in (None, "text_time") or (self.addition_embed_type and not all(additions)):
            raise ClvrError(
                f"UNet2DConditionConfig.addition_embed_type is {self.addition_embed_type!r}; it must be None, or "
                "'text_time' with addition_time_embed_dim and projection_class_embeddings_input_dim"
            )

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads of each block, finest resolution first."""
        return self._per_block("attention_head_dim")

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of transformer blocks after each resnet of a block, finest resolution first."""
        return self._per_block("transformer_layers_per_block")

    @property
    def attentions(self) -> tuple[str, ...]:
        """Paths of all transformers in the module, such as `down_blocks.1.attentions.0`."""
        layers = self.layers_per_block
        counts = {f"down_blocks.{i}": layers * _DOWN[kind] for i, kind in enumerate(self.down_block_types)}
        counts |= {"mid_block": 1}
        counts |= {f"up_blocks.{i}": (layers + 1) * _UP[kind] for i, kind in enumerate(self.up_block_types)}
        return tuple(f"{block}.attentions.{i}" for block, count in counts.items() for i in range(count))

    def _per_block(self, name: str) -> tuple[int, ...]:
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @classmethod
    def sdxl(cls) -> "UNet2DConditionConfig":
        """Returns the base model of SDXL: 2.567 B parameters."""
        return cls(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            cross_attention_dim=2048,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )

    @classmethod
    def sd15(cls) -> "UNet2DConditionConfig":
        """Returns Stable Diffusion 1.5: 0.860 B parameters."""
        return cls(sample_size=64, cross_attention_dim=768)


class TimestepEmbedding(nnx.Module):
    """Two linear layers with SiLU between them; an optional condition is projected and added to the input."""

    def __init__(
        self, features_in: int, features: int, condition: int | None = None, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]
    ) -> None:
        self.linear_1 = Linear(features_in, features, rngs=rngs, **dtypes)
        self.cond_proj = (
            Linear(condition, features_in, use_bias=False, rngs=rngs, **dtypes) if condition is not None else None
        )
        self.linear_2 = Linear(features, features, rngs=rngs, **dtypes)

    def __call__(
        self, x_bc: Float[Array, "b c"], condition_bd: Float[Array, "b e"] | None = None
    ) -> Float[Array, "b d"]:
        """Maps (b, features_in) and an optional (b, condition) to (b, features)."""
        if self.cond_proj is not None and condition_bd is not None:
            x_bc += self.cond_proj(condition_bd)
        return self.linear_2(silu(self.linear_1(x_bc)))


class UNet2DCondition(nnx.Module):
    """The UNet; it predicts noise or v, whichever the checkpoint was trained for.

    Args:
      config: see the presets of `UNet2DConditionConfig`.
      rngs: random streams for the initial weights.
      dtype: dtype of the computation; norms and softmax are float32 inside.
      param_dtype: dtype of the weights.
      remat: rematerialization policy of the blocks, a name in `layers.REMAT`.
    """

    def __init__(
        self,
        config: UNet2DConditionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: str = "dots",
    ) -> None:
        dtypes: Dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        widths, groups, layers = config.block_out_channels, config.norm_num_groups, config.layers_per_block
        embedding, last = 4 * widths[0], len(widths) - 1
        self.config = config
        self.dtype = dtype

        def options(block: int, attends: bool) -> StageOptions:
            transformer: TransformerOptions = {
                "text_features": config.cross_attention_dim,
                "heads": config.heads[block],
                "depth": config.depths[block],
                "linear": config.use_linear_projection,
            }
            return {
                "groups": groups,
                "embedding": embedding,
                "epsilon": config.norm_eps,
                "transformer": transformer if attends else None,
                "remat": remat,
                **dtypes,
            }

        self.conv_in = Conv(config.in_channels, widths[0], (3, 3), padding=1, rngs=rngs, **dtypes)
        self.time_embedding = TimestepEmbedding(widths[0], embedding, config.time_cond_proj_dim, rngs=rngs, **dtypes)
        self.add_embedding = (
            TimestepEmbedding(config.projection_class_embeddings_input_dim, embedding, rngs=rngs, **dtypes)
            if config.projection_class_embeddings_input_dim is not None and config.addition_embed_type
            else None
        )
        # `skips` are the widths of the states that the down blocks pass to the up blocks.
        width, skips = widths[0], [widths[0]]
        down_blocks, up_blocks = [], []
        for i, kind in enumerate(config.down_block_types):
            widths_in = [width] + [widths[i]] * (layers - 1)
            width = widths[i]
            down_blocks.append(DownBlock(widths_in, width, downsample=i < last, rngs=rngs, **options(i, _DOWN[kind])))
            skips += [width] * (layers + (i < last))
        self.down_blocks = nnx.List(down_blocks)
        self.mid_block = MidBlock(width, rngs=rngs, **options(last, True))
        for i, kind in zip(range(last, -1, -1), config.up_block_types, strict=True):
            widths_in = [own + skips.pop() for own in [width] + [widths[i]] * layers]
            width = widths[i]
            up_blocks.append(UpBlock(widths_in, width, upsample=i > 0, rngs=rngs, **options(i, _UP[kind])))
        self.up_blocks = nnx.List(up_blocks)
        self.conv_norm_out = nnx.GroupNorm(width, groups, epsilon=config.norm_eps, rngs=rngs, **dtypes)
        self.conv_out = Conv(width, config.out_channels, (3, 3), padding=1, rngs=rngs, **dtypes)

    def __call__(
        self,
        latents_bhwc: Float[Array, "b h w c"],
        timestep_b: Real[Array, " b"],
        text_bsd: Float[Array, "b s e"],
        *,
        text_embeds_bd: Float[Array, "b p"] | None = None,
        time_ids_b6: Real[Array, "b 6"] | None = None,
        timestep_cond_bd: Float[Array, "b g"] | None = None,
    ) -> Float[Array, "b h w d"]:
        """Predicts the noise (or v) of latents of any height and width, which may be odd.

        Args:
          latents_bhwc: (b, h, w, in_channels) noisy latents, channels last.
          timestep_b: (b,) in [0, 1000), the training timesteps of the scheduler.
          text_bsd: (b, text tokens, cross_attention_dim).
          text_embeds_bd: (b, d) pooled text; required, with `time_ids_b6`, by SDXL, and an error for other models.
          time_ids_b6: (b, 6) original height and width, top and left of the crop, target height and width, in pixels.
          timestep_cond_bd: (b, time_cond_proj_dim) embedding of the guidance scale; required by models distilled with
            guidance, and an error for others.
        Returns: (b, h, w, out_channels) in the compute dtype.
        Raises: ClvrError if shapes disagree, or a condition is missing or not supported.
        """
        self._check(latents_bhwc, text_bsd, text_embeds_bd, time_ids_b6, timestep_cond_bd)
        sinusoids_bc = sinusoidal_embedding(timestep_b, self.config.block_out_channels[0], self.dtype)
        embedding_be = self.time_embedding(sinusoids_bc, timestep_cond_bd)
        if self.add_embedding is not None and text_embeds_bd is not None and time_ids_b6 is not None:
            sizes = sinusoidal_embedding(time_ids_b6.reshape(-1), self.config.addition_time_embed_dim or 0)
            added = jnp.concatenate([text_embeds_bd, sizes.reshape(len(text_embeds_bd), -1)], axis=-1)
            embedding_be += self.add_embedding(added.astype(self.dtype))

        x_bhwc = self.conv_in(with_batch_sharded(latents_bhwc))
        skips = [x_bhwc]
        for down in self.down_blocks:
            skips += down(skips[-1], embedding_be, text_bsd)
        x_bhwc = self.mid_block(skips[-1], embedding_be, text_bsd)
        for up in self.up_blocks:
            x_bhwc = up(x_bhwc, skips, embedding_be, text_bsd)
        return self.conv_out(silu(self.conv_norm_out(x_bhwc)))

    def _check(
        self,
        latents: jax.Array,
        text: jax.Array,
        text_embeds: jax.Array | None,
        time_ids: jax.Array | None,
        condition: jax.Array | None,
    ) -> None:
        config = self.config
        if latents.ndim != 4 or latents.shape[-1] != config.in_channels:
            raise ClvrError(
                f"latents have shape {latents.shape}; expected (batch, height, width, {config.in_channels})"
            )
        if text.ndim != 3 or text.shape[-1] != config.cross_attention_dim:
            raise ClvrError(f"text has shape {text.shape}; expected (batch, tokens, {config.cross_attention_dim})")
        for name, given, needed in (
            ("text_embeds_bd", text_embeds is not None, self.add_embedding is not None),
            ("time_ids_b6", time_ids is not None, self.add_embedding is not None),
            ("timestep_cond_bd", condition is not None, config.time_cond_proj_dim is not None),
        ):
            if given != needed:
                raise ClvrError(f"this UNet {'needs' if needed else 'does not take'} {name}")
        if text_embeds is not None and time_ids is not None:
            found = text_embeds.shape[-1] + time_ids.shape[-1] * (config.addition_time_embed_dim or 0)
            if found != config.projection_class_embeddings_input_dim:
                raise ClvrError(
                    f"text_embeds {text_embeds.shape} and time_ids {time_ids.shape} embed to {found} features; "
                    f"this UNet takes {config.projection_class_embeddings_input_dim}"
                )
