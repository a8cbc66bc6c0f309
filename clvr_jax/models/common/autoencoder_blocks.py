"""Blocks of convolutional autoencoders: resnets, a mid block with attention, encoder and decoder.

Images and latents are channels-last, (batch, height, width, channels); attribute names are the keys of the PyTorch
checkpoints. The UNet uses the resnet, the downsampling and the upsampling too.

Source: `AutoencoderKL`, `ResnetBlock2D`, `Downsample2D` and `Upsample2D` (diffusers).
"""

import itertools
from dataclasses import dataclass
from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.attention import attention
from clvr_jax.models.common.dtypes import Dtypes
from clvr_jax.models.common.torch_numerics import Linear, silu
from clvr_jax.sharding import with_logical_constraint

NORM_EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderConfig:
    """Configuration that the autoencoders of diffusers have in common, with the defaults of `AutoencoderKL`."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        for widths in (self.block_out_channels, self.decoder_widths):
            if not widths or any(width % self.norm_num_groups for width in widths):
                raise ClvrError(
                    f"{type(self).__name__}: block_out_channels {widths} must each be a multiple of "
                    f"norm_num_groups {self.norm_num_groups}"
                )
        if len(self.decoder_widths) != len(self.block_out_channels):
            raise ClvrError(f"{type(self).__name__}: encoder and decoder must have the same number of blocks")

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Widths of the decoder's blocks, finest first as in `block_out_channels`."""
        return self.block_out_channels

    @property
    def downscale(self) -> int:
        """Pixels for each latent position along one side; 8 for the published models."""
        found: int = 2 ** (len(self.block_out_channels) - 1)
        return found


class Resnet(nnx.Module):
    """A residual block: two convolutions, each after a group norm and SiLU."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        groups: int,
        *,
        epsilon: float = NORM_EPS,
        rngs: nnx.Rngs,
        **dtypes: Unpack[Dtypes],
    ):
        self.norm1 = nnx.GroupNorm(features_in, groups, epsilon=epsilon, rngs=rngs, **dtypes)
        self.conv1 = nnx.Conv(features_in, features_out, (3, 3), padding=1, rngs=rngs, **dtypes)
        self.norm2 = nnx.GroupNorm(features_out, groups, epsilon=epsilon, rngs=rngs, **dtypes)
        self.conv2 = nnx.Conv(features_out, features_out, (3, 3), padding=1, rngs=rngs, **dtypes)
        self.conv_shortcut = (
            nnx.Conv(features_in, features_out, (1, 1), rngs=rngs, **dtypes) if features_in != features_out else None
        )

    def __call__(
        self, x_bhwc: Float[Array, "b h w c"], shift_bc: Float[Array, "b d"] | None = None
    ) -> Float[Array, "b h w d"]:
        """Maps (b, h, w, features_in) to (b, h, w, features_out); adds `shift_bc` between the convolutions."""
        hidden = self.conv1(silu(self.norm1(x_bhwc)))
        if shift_bc is not None:
            hidden += shift_bc[:, None, None, :]
        hidden = self.conv2(silu(self.norm2(hidden)))
        return hidden + (x_bhwc if self.conv_shortcut is None else self.conv_shortcut(x_bhwc))


class Attention(nnx.Module):
    """Single-head attention over all positions, with a norm and a residual connection."""

    def __init__(self, features: int, groups: int, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]):
        self.group_norm = nnx.GroupNorm(features, groups, epsilon=NORM_EPS, rngs=rngs, **dtypes)
        self.to_q = Linear(features, features, rngs=rngs, **dtypes)
        self.to_k = Linear(features, features, rngs=rngs, **dtypes)
        self.to_v = Linear(features, features, rngs=rngs, **dtypes)
        self.to_out = nnx.List([Linear(features, features, rngs=rngs, **dtypes)])

    def __call__(self, x_bhwc: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Maps (b, h, w, features) to the same shape."""
        b, h, w, c = x_bhwc.shape
        # Attention may shard the queries, but the convolutions before and after it must not be partitioned by rows.
        x_bhwc = with_logical_constraint(x_bhwc, "batch", None, None, None)
        normed_btc = self.group_norm(x_bhwc).reshape(b, h * w, 1, c)
        out = attention(self.to_q(normed_btc), self.to_k(normed_btc), self.to_v(normed_btc))
        out = with_logical_constraint(self.to_out[0](out.reshape(b, h, w, c)), "batch", None, None, None)
        return x_bhwc + out


class MidBlock(nnx.Module):
    """A resnet, optional attention and a resnet, at the coarsest resolution."""

    def __init__(self, features: int, groups: int, add_attention: bool, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]):
        self.resnets = nnx.List([Resnet(features, features, groups, rngs=rngs, **dtypes) for _ in range(2)])
        self.attentions = nnx.List([Attention(features, groups, rngs=rngs, **dtypes)] if add_attention else [])

    def __call__(self, x_bhwc: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Maps (b, h, w, features) to the same shape."""
        x_bhwc = self.resnets[0](x_bhwc)
        for attend in self.attentions:
            x_bhwc = attend(x_bhwc)
        return self.resnets[1](x_bhwc)


class Downsample(nnx.Module):
    """A convolution that halves both sides."""

    # Autoencoders pad one row at the bottom and one column at the right; the UNet pads all four sides (`padding=1`).
    BOTTOM_RIGHT = ((0, 1), (0, 1))

    def __init__(
        self,
        features: int,
        padding: int | tuple[tuple[int, int], ...] = BOTTOM_RIGHT,
        *,
        rngs: nnx.Rngs,
        **dtypes: Unpack[Dtypes],
    ):
        self.conv = nnx.Conv(features, features, (3, 3), strides=2, padding=padding, rngs=rngs, **dtypes)

    def __call__(self, x_bhwc: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Maps (b, h, w, c) to (b, h / 2, w / 2, c); odd sides are rounded down, with padding=1 up."""
        return self.conv(x_bhwc)


class Upsample(nnx.Module):
    """Nearest-neighbor upsampling by 2 along both sides, then a convolution."""

    def __init__(self, features: int, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]):
        self.conv = nnx.Conv(features, features, (3, 3), padding=1, rngs=rngs, **dtypes)

    def __call__(
        self, x_bhwc: Float[Array, "b h w c"], size: tuple[int, int] | None = None
    ) -> Float[Array, "b h2 w2 c"]:
        """Maps (b, h, w, c) to (b, 2 h, 2 w, c), or to `size` where the finer grid has odd sides."""
        b, h, w, c = x_bhwc.shape
        doubled = jnp.broadcast_to(x_bhwc[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
        if size is not None:
            doubled = doubled[:, : size[0], : size[1]]
        return self.conv(doubled)


class Block(nnx.Module):
    """Resnets at one resolution."""

    def __init__(
        self, features_in: int, features_out: int, layers: int, groups: int, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]
    ):
        widths = [features_in] + [features_out] * layers
        self.resnets = nnx.List([Resnet(a, b, groups, rngs=rngs, **dtypes) for a, b in itertools.pairwise(widths)])

    def __call__(self, x_bhwc: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """Maps (b, h, w, features_in) to (b, h, w, features_out)."""
        for resnet in self.resnets:
            x_bhwc = resnet(x_bhwc)
        return x_bhwc


class DownBlock(Block):
    """Resnets, then optional downsampling by 2."""

    def __init__(self, *args: int, downsample: bool, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]):
        super().__init__(*args, rngs=rngs, **dtypes)
        self.downsamplers = nnx.List([Downsample(args[1], rngs=rngs, **dtypes)] if downsample else [])

    def __call__(self, x_bhwc: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Maps (b, h, w, features_in) to (b, h, w, features_out), or to half of both sides."""
        x_bhwc = super().__call__(x_bhwc)
        for downsample in self.downsamplers:
            x_bhwc = downsample(x_bhwc)
        return x_bhwc


class UpBlock(Block):
    """Resnets, then optional upsampling by 2."""

    def __init__(self, *args: int, upsample: bool, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]):
        super().__init__(*args, rngs=rngs, **dtypes)
        self.upsamplers = nnx.List([Upsample(args[1], rngs=rngs, **dtypes)] if upsample else [])

    def __call__(self, x_bhwc: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Maps (b, h, w, features_in) to (b, h, w, features_out), or to twice both sides."""
        x_bhwc = super().__call__(x_bhwc)
        for upsample in self.upsamplers:
            x_bhwc = upsample(x_bhwc)
        return x_bhwc


class Encoder(nnx.Module):
    """The encoder: images to mean and log-variance of the latent posterior, before `quant_conv`."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nnx.Conv(config.in_channels, widths[0], (3, 3), padding=1, rngs=rngs, **dtypes)
        self.down_blocks = nnx.List(
            [
                DownBlock(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block,
                    groups,
                    downsample=i < len(widths) - 1,
                    rngs=rngs,
                    **dtypes,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention, rngs=rngs, **dtypes)
        self.conv_norm_out = nnx.GroupNorm(widths[-1], groups, epsilon=NORM_EPS, rngs=rngs, **dtypes)
        self.conv_out = nnx.Conv(widths[-1], 2 * config.latent_channels, (3, 3), padding=1, rngs=rngs, **dtypes)

    def __call__(self, x_bhwc: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Maps (b, h, w, in_channels) to (b, h / 8, w / 8, 2 * latent_channels)."""
        x_bhwc = self.conv_in(x_bhwc)
        for block in self.down_blocks:
            x_bhwc = block(x_bhwc)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x_bhwc))))


class Decoder(nnx.Module):
    """The decoder: latents to images."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]):
        widths, groups = config.decoder_widths[::-1], config.norm_num_groups
        self.conv_in = nnx.Conv(config.latent_channels, widths[0], (3, 3), padding=1, rngs=rngs, **dtypes)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention, rngs=rngs, **dtypes)
        self.up_blocks = nnx.List(
            [
                UpBlock(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block + 1,
                    groups,
                    upsample=i < len(widths) - 1,
                    rngs=rngs,
                    **dtypes,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = nnx.GroupNorm(widths[-1], groups, epsilon=NORM_EPS, rngs=rngs, **dtypes)
        self.conv_out = nnx.Conv(widths[-1], config.out_channels, (3, 3), padding=1, rngs=rngs, **dtypes)

    def __call__(self, x_bhwc: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Maps (b, h, w, latent_channels) to (b, 8 h, 8 w, out_channels)."""
        x_bhwc = self.mid_block(self.conv_in(x_bhwc))
        for block in self.up_blocks:
            x_bhwc = block(x_bhwc)
        return self.conv_out(silu(self.conv_norm_out(x_bhwc)))


class Autoencoder(nnx.Module):
    """An autoencoder of images in [-1, 1]; published models have latents (b, h / 8, w / 8, latent_channels)."""

    def __init__(
        self,
        config: AutoencoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.decoder = Decoder(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        width = config.latent_channels

        def pointwise(features: int) -> nnx.Conv:
            return nnx.Conv(features, features, (1, 1), rngs=rngs, dtype=dtype, param_dtype=param_dtype)

        self.quant_conv = pointwise(2 * width) if config.use_quant_conv else None
        self.post_quant_conv = pointwise(width) if config.use_post_quant_conv else None

    def moments(
        self, images_bhwc: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b h8 w8 d"], Float[Array, "b h8 w8 d"]]:
        """Returns mean and log-variance of the latent posterior of images, each (b, h / 8, w / 8, latent_channels)."""
        moments = self.encoder(images_bhwc)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def encode(self, images_bhwc: Float[Array, "b h w c"]) -> Float[Array, "b h8 w8 d"]:
        """Returns the mode of the posterior of images in [-1, 1], (b, h / 8, w / 8, latent_channels)."""
        return self.moments(images_bhwc)[0]

    def decode(self, latents_bhwc: Float[Array, "b h w c"]) -> Float[Array, "b h8 w8 d"]:
        """Returns the images of raw latents, (b, 8 h, 8 w, out_channels), nominally in [-1, 1] and not clipped."""
        if self.post_quant_conv is not None:
            latents_bhwc = self.post_quant_conv(latents_bhwc)
        return self.decoder(latents_bhwc)
