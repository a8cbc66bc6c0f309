"""AutoencoderKLFlux2: the convolutional autoencoder of FLUX.2 and the normalised latents its transformer works on.

Images and latents are channels-last here, (batch, height, width, channels); the names of the modules are those of the
PyTorch checkpoint. Source of the arithmetic: diffusers `AutoencoderKLFlux2` and its use in `Flux2KleinPipeline`.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from clvr_jax.errors import ClvrError
from clvr_jax.models.layers import attention

NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class AutoencoderKLFlux2Config:
    """Field names and defaults are those of diffusers' `vae/config.json`; the defaults are FLUX.2's own autoencoder."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    latent_channels: int = 32
    norm_num_groups: int = 32
    sample_size: int = 1024
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    batch_norm_eps: float = 1e-4
    batch_norm_momentum: float = 0.1
    patch_size: tuple[int, int] = (2, 2)

    def __post_init__(self) -> None:
        widths = (*self.block_out_channels, *(self.decoder_block_out_channels or ()))
        wrong = [width for width in widths if width % self.norm_num_groups]
        if not widths or wrong:
            raise ClvrError(
                f"AutoencoderKLFlux2: block_out_channels {widths} must each be a multiple of "
                f"norm_num_groups {self.norm_num_groups}"
            )
        decoder_blocks = self.decoder_block_out_channels
        if decoder_blocks is not None and len(decoder_blocks) != len(self.block_out_channels):
            raise ClvrError("AutoencoderKLFlux2: encoder and decoder must have the same number of blocks")

    @property
    def downscale(self) -> int:
        """Pixels per latent position along one side, before patchifying: 8 for FLUX.2."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def token_pixels(self) -> int:
        """Pixels per transformer token along one side: 16 for FLUX.2. Image sides must be multiples of it."""
        return self.downscale * self.patch_size[0]

    @property
    def token_channels(self) -> int:
        """Channels of one transformer token: 128 for FLUX.2."""
        return self.latent_channels * self.patch_size[0] * self.patch_size[1]


class _Resnet(nnx.Module):
    def __init__(self, features_in: int, features_out: int, groups: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.norm1 = nnx.GroupNorm(features_in, groups, epsilon=NORM_EPS, rngs=rngs, **dtypes)
        self.conv1 = nnx.Conv(features_in, features_out, (3, 3), padding=1, rngs=rngs, **dtypes)
        self.norm2 = nnx.GroupNorm(features_out, groups, epsilon=NORM_EPS, rngs=rngs, **dtypes)
        self.conv2 = nnx.Conv(features_out, features_out, (3, 3), padding=1, rngs=rngs, **dtypes)
        self.conv_shortcut = (
            nnx.Conv(features_in, features_out, (1, 1), rngs=rngs, **dtypes) if features_in != features_out else None
        )

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        hidden = self.conv1(nnx.silu(self.norm1(x_bhwc)))
        hidden = self.conv2(nnx.silu(self.norm2(hidden)))
        return hidden + (x_bhwc if self.conv_shortcut is None else self.conv_shortcut(x_bhwc))


class _Attention(nnx.Module):
    """Single-head attention over all positions, with its own norm and residual."""

    def __init__(self, features: int, groups: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.group_norm = nnx.GroupNorm(features, groups, epsilon=NORM_EPS, rngs=rngs, **dtypes)
        self.to_q = nnx.Linear(features, features, rngs=rngs, **dtypes)
        self.to_k = nnx.Linear(features, features, rngs=rngs, **dtypes)
        self.to_v = nnx.Linear(features, features, rngs=rngs, **dtypes)
        self.to_out = nnx.List([nnx.Linear(features, features, rngs=rngs, **dtypes)])

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        b, h, w, c = x_bhwc.shape
        normed_btc = self.group_norm(x_bhwc).reshape(b, h * w, 1, c)
        out = attention(self.to_q(normed_btc), self.to_k(normed_btc), self.to_v(normed_btc))
        return x_bhwc + self.to_out[0](out.reshape(b, h, w, c))


class _MidBlock(nnx.Module):
    def __init__(self, features: int, groups: int, add_attention: bool, *, rngs: nnx.Rngs, **dtypes: Any):
        self.resnets = nnx.List([_Resnet(features, features, groups, rngs=rngs, **dtypes) for _ in range(2)])
        self.attentions = nnx.List([_Attention(features, groups, rngs=rngs, **dtypes)] if add_attention else [])

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        x_bhwc = self.resnets[0](x_bhwc)
        for attend in self.attentions:
            x_bhwc = attend(x_bhwc)
        return self.resnets[1](x_bhwc)


class _Downsample(nnx.Module):
    def __init__(self, features: int, *, rngs: nnx.Rngs, **dtypes: Any):
        # One row and column of padding at the far edges only, as the PyTorch module pads.
        padding = ((0, 1), (0, 1))
        self.conv = nnx.Conv(features, features, (3, 3), strides=2, padding=padding, rngs=rngs, **dtypes)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        return self.conv(x_bhwc)


class _Upsample(nnx.Module):
    def __init__(self, features: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.conv = nnx.Conv(features, features, (3, 3), padding=1, rngs=rngs, **dtypes)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        b, h, w, c = x_bhwc.shape
        doubled = jnp.broadcast_to(x_bhwc[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
        return self.conv(doubled)


class _Block(nnx.Module):
    """Resnets at one resolution, then a change of resolution or none."""

    def __init__(self, features_in: int, features_out: int, layers: int, groups: int, *, rngs: nnx.Rngs, **dtypes: Any):
        widths = [features_in] + [features_out] * layers
        self.resnets = nnx.List([_Resnet(a, b, groups, rngs=rngs, **dtypes) for a, b in itertools.pairwise(widths)])

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x_bhwc = resnet(x_bhwc)
        return x_bhwc


class _DownBlock(_Block):
    def __init__(self, *args: int, downsample: bool, rngs: nnx.Rngs, **dtypes: Any):
        super().__init__(*args, rngs=rngs, **dtypes)
        self.downsamplers = nnx.List([_Downsample(args[1], rngs=rngs, **dtypes)] if downsample else [])

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        x_bhwc = super().__call__(x_bhwc)
        for downsample in self.downsamplers:
            x_bhwc = downsample(x_bhwc)
        return x_bhwc


class _UpBlock(_Block):
    def __init__(self, *args: int, upsample: bool, rngs: nnx.Rngs, **dtypes: Any):
        super().__init__(*args, rngs=rngs, **dtypes)
        self.upsamplers = nnx.List([_Upsample(args[1], rngs=rngs, **dtypes)] if upsample else [])

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        x_bhwc = super().__call__(x_bhwc)
        for upsample in self.upsamplers:
            x_bhwc = upsample(x_bhwc)
        return x_bhwc


class _Encoder(nnx.Module):
    def __init__(self, config: AutoencoderKLFlux2Config, *, rngs: nnx.Rngs, **dtypes: Any):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nnx.Conv(config.in_channels, widths[0], (3, 3), padding=1, rngs=rngs, **dtypes)
        self.down_blocks = nnx.List(
            [
                _DownBlock(
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
        self.mid_block = _MidBlock(widths[-1], groups, config.mid_block_add_attention, rngs=rngs, **dtypes)
        self.conv_norm_out = nnx.GroupNorm(widths[-1], groups, epsilon=NORM_EPS, rngs=rngs, **dtypes)
        self.conv_out = nnx.Conv(widths[-1], 2 * config.latent_channels, (3, 3), padding=1, rngs=rngs, **dtypes)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        x_bhwc = self.conv_in(x_bhwc)
        for block in self.down_blocks:
            x_bhwc = block(x_bhwc)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x_bhwc))))


class _Decoder(nnx.Module):
    def __init__(self, config: AutoencoderKLFlux2Config, *, rngs: nnx.Rngs, **dtypes: Any):
        widths = (config.decoder_block_out_channels or config.block_out_channels)[::-1]
        groups = config.norm_num_groups
        self.conv_in = nnx.Conv(config.latent_channels, widths[0], (3, 3), padding=1, rngs=rngs, **dtypes)
        self.mid_block = _MidBlock(widths[0], groups, config.mid_block_add_attention, rngs=rngs, **dtypes)
        self.up_blocks = nnx.List(
            [
                _UpBlock(
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

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        x_bhwc = self.mid_block(self.conv_in(x_bhwc))
        for block in self.up_blocks:
            x_bhwc = block(x_bhwc)
        return self.conv_out(nnx.silu(self.conv_norm_out(x_bhwc)))


class RunningStatistics(nnx.Module):
    """Per-channel mean and variance of patchified latents: a batch norm without affine part, in evaluation mode."""

    def __init__(self, features: int):
        self.running_mean = nnx.BatchStat(jnp.zeros(features, jnp.float32))
        self.running_var = nnx.BatchStat(jnp.ones(features, jnp.float32))
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))


def patchify(latents_bhwc: jax.Array, patch: tuple[int, int] = (2, 2)) -> jax.Array:
    """(b, h, w, c) -> (b, h / ph, w / pw, c * ph * pw); channels in the checkpoint's order (c, ph, pw)."""
    b, h, w, c = latents_bhwc.shape
    ph, pw = patch
    split = latents_bhwc.reshape(b, h // ph, ph, w // pw, pw, c)
    return split.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // ph, w // pw, c * ph * pw)


def unpatchify(latents_bhwp: jax.Array, patch: tuple[int, int] = (2, 2)) -> jax.Array:
    """Inverse of `patchify`: (b, h, w, c * ph * pw) -> (b, h * ph, w * pw, c)."""
    b, h, w, p = latents_bhwp.shape
    ph, pw = patch
    split = latents_bhwp.reshape(b, h, w, p // (ph * pw), ph, pw)
    return split.transpose(0, 1, 4, 2, 5, 3).reshape(b, h * ph, w * pw, p // (ph * pw))


class AutoencoderKLFlux2(nnx.Module):
    """Images in [-1, 1] <-> latents.

    `encode` and `decode` work on raw latents, (b, h / 8, w / 8, 32) for FLUX.2. `encode_tokens` and `decode_tokens`
    work on what the transformer sees: patchified, normalised by the running statistics, (b, h / 16, w / 16, 128) there.
    """

    def __init__(
        self,
        config: AutoencoderKLFlux2Config,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config = config
        self.encoder = _Encoder(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.decoder = _Decoder(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        width = config.latent_channels

        def pointwise(features: int) -> nnx.Conv:
            return nnx.Conv(features, features, (1, 1), rngs=rngs, dtype=dtype, param_dtype=param_dtype)

        self.quant_conv = pointwise(2 * width) if config.use_quant_conv else None
        self.post_quant_conv = pointwise(width) if config.use_post_quant_conv else None
        self.bn = RunningStatistics(config.token_channels)

    def moments(self, images_bhwc: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images -> mean and log-variance of the latent posterior, each (b, h / 8, w / 8, latent_channels)."""
        moments = self.encoder(images_bhwc)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def encode(self, images_bhwc: jax.Array) -> jax.Array:
        """Images in [-1, 1] -> the posterior's mode, (b, h / 8, w / 8, latent_channels)."""
        return self.moments(images_bhwc)[0]

    def decode(self, latents_bhwc: jax.Array) -> jax.Array:
        """Raw latents -> images, (b, 8 h, 8 w, out_channels), nominally in [-1, 1] and not clipped."""
        if self.post_quant_conv is not None:
            latents_bhwc = self.post_quant_conv(latents_bhwc)
        return self.decoder(latents_bhwc)

    def encode_tokens(self, images_bhwc: jax.Array) -> jax.Array:
        """Images in [-1, 1] -> normalised tokens on their grid, (b, h / 16, w / 16, token_channels)."""
        tokens = patchify(self.encode(images_bhwc), self.config.patch_size)
        mean, scale = self._normalisation(tokens.dtype)
        return (tokens - mean) / scale

    def decode_tokens(self, tokens_bhwp: jax.Array) -> jax.Array:
        """Normalised tokens on their grid -> images; inverts `encode_tokens` up to what the autoencoder loses."""
        mean, scale = self._normalisation(tokens_bhwp.dtype)
        return self.decode(unpatchify(tokens_bhwp * scale + mean, self.config.patch_size))

    def _normalisation(self, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        scale = jnp.sqrt(self.bn.running_var[...] + self.config.batch_norm_eps)
        return self.bn.running_mean[...].astype(dtype), scale.astype(dtype)
