"""The blocks of the UNet: resnets with an embedding of the timestep, and transformers with attention to the text.

Images are channels-last, (batch, height, width, channels).

Source: `unet_2d_blocks` and `Transformer2DModel` (diffusers); attribute names are its keys.
"""

from collections.abc import Sequence
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from clvr_jax.models.common import autoencoder_blocks
from clvr_jax.models.common.attention import attention
from clvr_jax.models.common.autoencoder_blocks import Downsample, Upsample
from clvr_jax.models.common.dtypes import Dtypes
from clvr_jax.models.common.layers import scan_blocks, stack_blocks
from clvr_jax.models.common.torch_numerics import Linear, gelu, silu
from clvr_jax.sharding import with_logical_constraint


def with_batch_sharded(x_bhwc: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Returns the same image features; a layout shards their batch only.

    Only transformers shard tokens. With rows of images sharded through the convolutions, latents were right on a mesh
    of sequence 4, and wrong by up to 3.3 on fsdp 2 x sequence 2 x tensor 2 (8 CPU devices, jax 0.10). The cause is not
    known.
    """
    return with_logical_constraint(x_bhwc, "batch", None, None, None)


class Resnet(autoencoder_blocks.Resnet):
    """The resnet of the autoencoder, with a projection of the timestep embedding added between its convolutions."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        groups: int,
        embedding: int,
        *,
        epsilon: float,
        rngs: nnx.Rngs,
        **dtypes: Unpack[Dtypes],
    ):
        super().__init__(features_in, features_out, groups, epsilon=epsilon, rngs=rngs, **dtypes)
        self.time_emb_proj = Linear(embedding, features_out, rngs=rngs, **dtypes)

    def __call__(self, x_bhwc: Float[Array, "b h w c"], embedding_be: Float[Array, "b e"]) -> Float[Array, "b h w d"]:  # type: ignore[override]
        """Maps (b, h, w, features_in) and (b, embedding) to (b, h, w, features_out)."""
        return super().__call__(x_bhwc, self.time_emb_proj(silu(embedding_be)))


class Attention(nnx.Module):
    """Multi-head attention of image positions to each other or to the text."""

    def __init__(self, features: int, context_features: int, heads: int, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]):
        self.heads = heads
        self.to_q = Linear(features, features, use_bias=False, rngs=rngs, **dtypes)
        self.to_k = Linear(context_features, features, use_bias=False, rngs=rngs, **dtypes)
        self.to_v = Linear(context_features, features, use_bias=False, rngs=rngs, **dtypes)
        self.to_out = nnx.List([Linear(features, features, rngs=rngs, **dtypes)])

    def __call__(self, x_btd: Float[Array, "b t d"], context_bsd: Float[Array, "b s c"]) -> Float[Array, "b t d"]:
        """Maps (b, t, features) and (b, s, context_features) to (b, t, features)."""

        def split(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], self.heads, -1)

        out = attention(split(self.to_q(x_btd)), split(self.to_k(context_bsd)), split(self.to_v(context_bsd)))
        return self.to_out[0](out.reshape(x_btd.shape))


class GEGLU(nnx.Module):
    """Value times GELU of a gate; one projection computes both."""

    def __init__(self, features_in: int, features_out: int, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]):
        self.proj = Linear(features_in, 2 * features_out, rngs=rngs, **dtypes)

    def __call__(self, x_btd: Float[Array, "b t d"]) -> Float[Array, "b t e"]:
        """Maps (b, t, features_in) to (b, t, features_out)."""
        value, gate = jnp.split(self.proj(x_btd), 2, axis=-1)
        return value * gelu(gate)


class FeedForward(nnx.Module):
    """Gated MLP with four times the width in its hidden layer."""

    def __init__(self, features: int, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]):
        # The second entry is the dropout of PyTorch, which has no weights but an index in the keys.
        widen = GEGLU(features, 4 * features, rngs=rngs, **dtypes)
        self.net = nnx.List([widen, nnx.Dropout(0.0), Linear(4 * features, features, rngs=rngs, **dtypes)])

    def __call__(self, x_btd: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Maps (b, t, features) to the same shape."""
        out: jax.Array = self.net[2](self.net[0](x_btd))
        return out


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the text and MLP, each after a LayerNorm and with a residual connection."""

    def __init__(self, features: int, text_features: int, heads: int, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]):
        self.norm1, self.norm2, self.norm3 = (
            nnx.LayerNorm(features, epsilon=1e-5, rngs=rngs, **dtypes) for _ in range(3)
        )
        self.attn1 = Attention(features, features, heads, rngs=rngs, **dtypes)
        self.attn2 = Attention(features, text_features, heads, rngs=rngs, **dtypes)
        self.ff = FeedForward(features, rngs=rngs, **dtypes)

    def __call__(self, x_btd: Float[Array, "b t d"], text_bsd: Float[Array, "b s c"]) -> Float[Array, "b t d"]:
        """Maps (b, t, features) and (b, s, text_features) to (b, t, features)."""
        normed_btd = self.norm1(x_btd)
        x_btd += self.attn1(normed_btd, normed_btd)
        x_btd += self.attn2(self.norm2(x_btd), text_bsd)
        return x_btd + self.ff(self.norm3(x_btd))


class Transformer(nnx.Module):
    """A stack of transformer blocks over all image positions, between two projections, with a residual connection."""

    def __init__(
        self,
        features: int,
        text_features: int,
        *,
        groups: int,
        heads: int,
        depth: int,
        linear: bool,
        remat: str,
        rngs: nnx.Rngs,
        **dtypes: Unpack[Dtypes],
    ):
        def projection() -> Linear | nnx.Conv:
            # On channels-last images a 1 x 1 convolution is a linear layer whose kernel has two more axes.
            if linear:
                return Linear(features, features, rngs=rngs, **dtypes)
            return nnx.Conv(features, features, (1, 1), rngs=rngs, **dtypes)

        self.remat = remat
        self.norm = nnx.GroupNorm(features, groups, epsilon=1e-6, rngs=rngs, **dtypes)
        self.proj_in = projection()
        self.transformer_blocks = stack_blocks(
            lambda block_rngs: TransformerBlock(features, text_features, heads, rngs=block_rngs, **dtypes), depth, rngs
        )
        self.proj_out = projection()

    def __call__(self, x_bhwc: Float[Array, "b h w c"], text_bsd: Float[Array, "b s d"]) -> Float[Array, "b h w c"]:
        """Maps (b, h, w, features) and (b, s, text_features) to (b, h, w, features)."""

        def step(block: TransformerBlock, x_btd: jax.Array, _: None) -> tuple[jax.Array, None]:
            return with_logical_constraint(block(x_btd, text_bsd), "batch", "tokens", None), None

        b, h, w, c = x_bhwc.shape
        is_linear = isinstance(self.proj_in, Linear)
        hidden_bhwc = self.proj_in(self.norm(x_bhwc))
        tokens_btd = (hidden_bhwc if is_linear else with_batch_sharded(hidden_bhwc)).reshape(b, h * w, c)
        tokens_btd = with_logical_constraint(tokens_btd, "batch", "tokens", None)
        tokens_btd, _ = scan_blocks(self.transformer_blocks, step, tokens_btd, remat=self.remat)
        hidden_bhwc = tokens_btd.reshape(b, h, w, c)
        return x_bhwc + with_batch_sharded(self.proj_out(hidden_bhwc if is_linear else with_batch_sharded(hidden_bhwc)))


class TransformerOptions(TypedDict):
    """The keyword arguments of `Transformer` that one block of a UNet has for all of its transformers."""

    text_features: int
    heads: int
    depth: int
    linear: bool


class StageOptions(Dtypes):
    """The keyword arguments of `Stage` that its subclasses pass on."""

    groups: int
    embedding: int
    epsilon: float
    transformer: TransformerOptions | None
    remat: str


class Stage(nnx.Module):
    """Resnets at one resolution, each followed by an optional transformer.

    Args:
      widths_in: input channels of each resnet.
      width: output channels of all resnets.
      transformer: keyword arguments of `Transformer`; None builds no transformers.
      transformers: number of transformers; None is the number of resnets.
      remat: rematerialization policy, a name in `layers.REMAT`; resnets are recomputed unless it is "dots".
    """

    def __init__(
        self,
        widths_in: Sequence[int],
        width: int,
        *,
        groups: int,
        embedding: int,
        epsilon: float,
        transformer: TransformerOptions | None,
        transformers: int | None = None,
        remat: str,
        rngs: nnx.Rngs,
        **dtypes: Unpack[Dtypes],
    ):
        count = 0 if transformer is None else len(widths_in) if transformers is None else transformers
        self.remat = remat
        self.resnets = nnx.List(
            [Resnet(width_in, width, groups, embedding, epsilon=epsilon, rngs=rngs, **dtypes) for width_in in widths_in]
        )
        self.attentions = nnx.List(
            [Transformer(width, groups=groups, remat=remat, rngs=rngs, **dtypes, **transformer) for _ in range(count)]
            if transformer is not None
            else []
        )

    def layer(
        self,
        i: int,
        x_bhwc: Float[Array, "b h w c"],
        embedding_be: Float[Array, "b e"],
        text_bsd: Float[Array, "b s d"],
    ) -> Float[Array, "b h w c2"]:
        """Applies resnet `i` and its transformer, if it has one."""
        resnet = nnx.remat(Resnet.__call__) if self.remat != "dots" else Resnet.__call__
        x_bhwc = with_batch_sharded(resnet(self.resnets[i], with_batch_sharded(x_bhwc), embedding_be))
        return self.attentions[i](x_bhwc, text_bsd) if i < len(self.attentions) else x_bhwc


class DownBlock(Stage):
    """A stage, then downsampling by 2 unless it is the last block."""

    def __init__(
        self, widths_in: Sequence[int], width: int, *, downsample: bool, rngs: nnx.Rngs, **options: Unpack[StageOptions]
    ):
        super().__init__(widths_in, width, rngs=rngs, **options)
        dtypes = Dtypes(dtype=options["dtype"], param_dtype=options["param_dtype"])
        self.downsamplers = nnx.List([Downsample(width, 1, rngs=rngs, **dtypes)] if downsample else [])

    def __call__(
        self, x_bhwc: Float[Array, "b h w c"], embedding_be: Float[Array, "b e"], text_bsd: Float[Array, "b s d"]
    ) -> list[Float[Array, "b _ _ c2"]]:
        """Returns the state after every layer and after the downsampling; the last is the input of the next block."""
        states = []
        for i in range(len(self.resnets)):
            x_bhwc = self.layer(i, x_bhwc, embedding_be, text_bsd)
            states.append(x_bhwc)
        return states + [downsample(x_bhwc) for downsample in self.downsamplers]


class MidBlock(Stage):
    """A resnet, a transformer and a resnet, at the coarsest resolution."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, **options: Unpack[StageOptions]):
        super().__init__((width, width), width, transformers=1, rngs=rngs, **options)

    def __call__(
        self, x_bhwc: Float[Array, "b h w c"], embedding_be: Float[Array, "b e"], text_bsd: Float[Array, "b s d"]
    ) -> Float[Array, "b h w c"]:
        """Maps (b, h, w, c) to the same shape."""
        for i in range(len(self.resnets)):
            x_bhwc = self.layer(i, x_bhwc, embedding_be, text_bsd)
        return x_bhwc


class UpBlock(Stage):
    """A stage whose resnets also get states of the down blocks, then upsampling by 2 unless it is the last block."""

    def __init__(
        self, widths_in: Sequence[int], width: int, *, upsample: bool, rngs: nnx.Rngs, **options: Unpack[StageOptions]
    ):
        super().__init__(widths_in, width, rngs=rngs, **options)
        dtypes = Dtypes(dtype=options["dtype"], param_dtype=options["param_dtype"])
        self.upsamplers = nnx.List([Upsample(width, rngs=rngs, **dtypes)] if upsample else [])

    def __call__(
        self,
        x_bhwc: Float[Array, "b h w c"],
        skips: list[Float[Array, "b _ _ _"]],
        embedding_be: Float[Array, "b e"],
        text_bsd: Float[Array, "b s d"],
    ) -> Float[Array, "b h2 w2 c2"]:
        """Pops its states from the end of `skips`; the last remaining one has the size of the finer grid."""
        for i in range(len(self.resnets)):
            x_bhwc = self.layer(i, jnp.concatenate([x_bhwc, skips.pop()], axis=-1), embedding_be, text_bsd)
        for upsample in self.upsamplers:
            _, height, width, _ = skips[-1].shape
            x_bhwc = upsample(x_bhwc, (height, width))
        return x_bhwc
