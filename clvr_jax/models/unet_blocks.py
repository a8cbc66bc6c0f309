"""The blocks of the UNet: resnets that take the timestep's embedding, transformers that look at the text.

Everything is channels-last, (batch, height, width, channels). Source of the arithmetic: diffusers `unet_2d_blocks` and
`Transformer2DModel`; attribute names are its keys.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from clvr_jax.models import autoencoder_blocks
from clvr_jax.models.attention import attention
from clvr_jax.models.autoencoder_blocks import Downsample, Upsample
from clvr_jax.models.layers import scan_blocks, stack_blocks
from clvr_jax.models.rounding import Linear, gelu, silu


class Resnet(autoencoder_blocks.Resnet):
    """The resnet of the autoencoder, moved by the timestep's embedding between its convolutions."""

    def __init__(
        self, features_in: int, features_out: int, groups: int, embedding: int, *, rngs: nnx.Rngs, **options: Any
    ):
        super().__init__(features_in, features_out, groups, rngs=rngs, **options)
        dtypes = {name: options[name] for name in ("dtype", "param_dtype")}
        self.time_emb_proj = Linear(embedding, features_out, rngs=rngs, **dtypes)

    def __call__(self, x_bhwc: jax.Array, embedding_be: jax.Array) -> jax.Array:  # type: ignore[override]
        """(b, h, w, features_in) and (b, embedding) -> (b, h, w, features_out)."""
        return super().__call__(x_bhwc, self.time_emb_proj(silu(embedding_be)))


class Attention(nnx.Module):
    """Multi-head attention of image positions, to each other or to the text."""

    def __init__(self, features: int, context_features: int, heads: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.heads = heads
        self.to_q = Linear(features, features, use_bias=False, rngs=rngs, **dtypes)
        self.to_k = Linear(context_features, features, use_bias=False, rngs=rngs, **dtypes)
        self.to_v = Linear(context_features, features, use_bias=False, rngs=rngs, **dtypes)
        self.to_out = nnx.List([Linear(features, features, rngs=rngs, **dtypes)])

    def __call__(self, x_btd: jax.Array, context_bsd: jax.Array) -> jax.Array:
        """(b, t, features) and (b, s, context_features) -> (b, t, features)."""

        def split(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], self.heads, -1)

        out = attention(split(self.to_q(x_btd)), split(self.to_k(context_bsd)), split(self.to_v(context_bsd)))
        return self.to_out[0](out.reshape(x_btd.shape))


class GEGLU(nnx.Module):
    """Value times GELU of a gate; both come from one projection."""

    def __init__(self, features_in: int, features_out: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.proj = Linear(features_in, 2 * features_out, rngs=rngs, **dtypes)

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        """(b, t, features_in) -> (b, t, features_out)."""
        value, gate = jnp.split(self.proj(x_btd), 2, axis=-1)
        return value * gelu(gate)


class FeedForward(nnx.Module):
    """Gated MLP, four times as wide inside."""

    def __init__(self, features: int, *, rngs: nnx.Rngs, **dtypes: Any):
        # The second place is PyTorch's dropout: it has no weights, but it counts in the keys.
        widen = GEGLU(features, 4 * features, rngs=rngs, **dtypes)
        self.net = nnx.List([widen, nnx.Dropout(0.0), Linear(4 * features, features, rngs=rngs, **dtypes)])

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        """(b, t, features) -> the same."""
        return self.net[2](self.net[0](x_btd))


class TransformerBlock(nnx.Module):
    """Self-attention, attention to the text, MLP; each after a LayerNorm, each with its residual."""

    def __init__(self, features: int, text_features: int, heads: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.norm1, self.norm2, self.norm3 = (
            nnx.LayerNorm(features, epsilon=1e-5, rngs=rngs, **dtypes) for _ in range(3)
        )
        self.attn1 = Attention(features, features, heads, rngs=rngs, **dtypes)
        self.attn2 = Attention(features, text_features, heads, rngs=rngs, **dtypes)
        self.ff = FeedForward(features, rngs=rngs, **dtypes)

    def __call__(self, x_btd: jax.Array, text_bsd: jax.Array) -> jax.Array:
        """(b, t, features) and (b, s, text_features) -> (b, t, features)."""
        normed_btd = self.norm1(x_btd)
        x_btd += self.attn1(normed_btd, normed_btd)
        x_btd += self.attn2(self.norm2(x_btd), text_bsd)
        return x_btd + self.ff(self.norm3(x_btd))


class Transformer(nnx.Module):
    """A stack of transformer blocks between two projections, over all positions of the image, with a residual."""

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
        **dtypes: Any,
    ):
        def projection() -> Linear | nnx.Conv:
            # On channels-last images a 1 x 1 convolution is a Linear; only its kernel has two axes more.
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

    def __call__(self, x_bhwc: jax.Array, text_bsd: jax.Array) -> jax.Array:
        """(b, h, w, features) and (b, s, text_features) -> (b, h, w, features)."""

        def step(block: TransformerBlock, x_btd: jax.Array, _: None) -> tuple[jax.Array, None]:
            return block(x_btd, text_bsd), None

        b, h, w, c = x_bhwc.shape
        tokens_btd = self.proj_in(self.norm(x_bhwc)).reshape(b, h * w, c)
        tokens_btd, _ = scan_blocks(self.transformer_blocks, step, tokens_btd, remat=self.remat)
        return x_bhwc + self.proj_out(tokens_btd.reshape(b, h, w, c))


class Stage(nnx.Module):
    """Resnets at one resolution, each followed by a transformer if `transformer` says how to build them.

    Args:
      widths_in: channels that enter each resnet.
      width: channels that leave each.
      transformer: keyword arguments of `Transformer`, or None for resnets alone.
      transformers: number of transformers, as many as resnets unless said otherwise.
      remat: what the backward pass keeps of each block, see `layers.REMAT`; of a resnet nothing unless "dots".
    """

    def __init__(
        self,
        widths_in: Sequence[int],
        width: int,
        *,
        groups: int,
        embedding: int,
        epsilon: float,
        transformer: dict[str, Any] | None,
        transformers: int | None = None,
        remat: str,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        count = 0 if transformer is None else len(widths_in) if transformers is None else transformers
        self.remat = remat
        self.resnets = nnx.List(
            [Resnet(wide, width, groups, embedding, epsilon=epsilon, rngs=rngs, **dtypes) for wide in widths_in]
        )
        self.attentions = nnx.List(
            [
                Transformer(width, groups=groups, remat=remat, rngs=rngs, **dtypes, **(transformer or {}))
                for _ in range(count)
            ]
        )

    def layer(self, i: int, x_bhwc: jax.Array, embedding_be: jax.Array, text_bsd: jax.Array) -> jax.Array:
        """Resnet number `i` and its transformer, if it has one."""
        resnet = nnx.remat(Resnet.__call__) if self.remat != "dots" else Resnet.__call__
        x_bhwc = resnet(self.resnets[i], x_bhwc, embedding_be)
        return self.attentions[i](x_bhwc, text_bsd) if i < len(self.attentions) else x_bhwc


class DownBlock(Stage):
    """A stage, then half the resolution unless it is the last."""

    def __init__(self, widths_in: Sequence[int], width: int, *, downsample: bool, rngs: nnx.Rngs, **options: Any):
        super().__init__(widths_in, width, rngs=rngs, **options)
        dtypes = {name: options[name] for name in ("dtype", "param_dtype")}
        self.downsamplers = nnx.List([Downsample(width, 1, rngs=rngs, **dtypes)] if downsample else [])

    def __call__(self, x_bhwc: jax.Array, embedding_be: jax.Array, text_bsd: jax.Array) -> list[jax.Array]:
        """Returns the state after every layer and after the change of resolution; the last goes on."""
        states = []
        for i in range(len(self.resnets)):
            x_bhwc = self.layer(i, x_bhwc, embedding_be, text_bsd)
            states.append(x_bhwc)
        return states + [downsample(x_bhwc) for downsample in self.downsamplers]


class MidBlock(Stage):
    """Resnet, transformer, resnet, at the coarsest resolution."""

    def __init__(self, width: int, **options: Any):
        super().__init__((width, width), width, transformers=1, **options)

    def __call__(self, x_bhwc: jax.Array, embedding_be: jax.Array, text_bsd: jax.Array) -> jax.Array:
        """(b, h, w, c) -> the same."""
        for i in range(len(self.resnets)):
            x_bhwc = self.layer(i, x_bhwc, embedding_be, text_bsd)
        return x_bhwc


class UpBlock(Stage):
    """A stage whose every resnet also takes a state of the way down, then twice the resolution unless the last."""

    def __init__(self, widths_in: Sequence[int], width: int, *, upsample: bool, rngs: nnx.Rngs, **options: Any):
        super().__init__(widths_in, width, rngs=rngs, **options)
        dtypes = {name: options[name] for name in ("dtype", "param_dtype")}
        self.upsamplers = nnx.List([Upsample(width, rngs=rngs, **dtypes)] if upsample else [])

    def __call__(
        self, x_bhwc: jax.Array, skips: list[jax.Array], embedding_be: jax.Array, text_bsd: jax.Array
    ) -> jax.Array:
        """Takes its states off the end of `skips`; the next one there says how large the finer grid was."""
        for i in range(len(self.resnets)):
            x_bhwc = self.layer(i, jnp.concatenate([x_bhwc, skips.pop()], axis=-1), embedding_be, text_bsd)
        for upsample in self.upsamplers:
            _, height, width, _ = skips[-1].shape
            x_bhwc = upsample(x_bhwc, (height, width))
        return x_bhwc
