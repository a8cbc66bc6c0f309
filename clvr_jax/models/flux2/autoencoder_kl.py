"""AutoencoderKLFlux2: the convolutional autoencoder of FLUX.2 and the normalized latent tokens of its transformer.

Images and latents are channels-last, (batch, height, width, channels).

Source: `AutoencoderKLFlux2` and its use in `Flux2KleinPipeline` (diffusers); attribute names are its keys.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from clvr_jax.models.common.autoencoder_blocks import Autoencoder, AutoencoderConfig


@dataclass(frozen=True)
class AutoencoderKLFlux2Config(AutoencoderConfig):
    """Configuration with the field names of diffusers' `vae/config.json`; the defaults are those of FLUX.2."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    latent_channels: int = 32
    sample_size: int = 1024
    batch_norm_eps: float = 1e-4
    batch_norm_momentum: float = 0.1
    patch_size: tuple[int, int] = (2, 2)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Widths of the decoder's blocks, finest first as in `block_out_channels`."""
        return self.decoder_block_out_channels or self.block_out_channels

    @property
    def token_pixels(self) -> int:
        """Pixels for each transformer token along one side, 16 for FLUX.2; image sides must be multiples of it."""
        return self.downscale * self.patch_size[0]

    @property
    def token_channels(self) -> int:
        """Channels of one transformer token, 128 for FLUX.2."""
        return self.latent_channels * self.patch_size[0] * self.patch_size[1]


class RunningStatistics(nnx.Module):
    """Mean and variance of each channel of patchified latents: a batch norm without affine part, in evaluation mode."""

    def __init__(self, features: int):
        self.running_mean = nnx.BatchStat(jnp.zeros(features, jnp.float32))
        self.running_var = nnx.BatchStat(jnp.ones(features, jnp.float32))
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))


def patchify(latents_bhwc: Float[Array, "b h w c"], patch: tuple[int, int] = (2, 2)) -> Float[Array, "b h2 w2 p"]:
    """Maps (b, h, w, c) to (b, h / ph, w / pw, c * ph * pw), with channels in the order (c, ph, pw)."""
    b, h, w, c = latents_bhwc.shape
    ph, pw = patch
    split = latents_bhwc.reshape(b, h // ph, ph, w // pw, pw, c)
    return split.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // ph, w // pw, c * ph * pw)


def unpatchify(latents_bhwp: Float[Array, "b h w p"], patch: tuple[int, int] = (2, 2)) -> Float[Array, "b h2 w2 c"]:
    """Inverts `patchify`: maps (b, h, w, c * ph * pw) to (b, h * ph, w * pw, c)."""
    b, h, w, p = latents_bhwp.shape
    ph, pw = patch
    split = latents_bhwp.reshape(b, h, w, p // (ph * pw), ph, pw)
    return split.transpose(0, 1, 4, 2, 5, 3).reshape(b, h * ph, w * pw, p // (ph * pw))


class AutoencoderKLFlux2(Autoencoder):
    """The autoencoder of images in [-1, 1].

    `encode` and `decode` use raw latents, (b, h / 8, w / 8, 32) for FLUX.2. `encode_tokens` and `decode_tokens` use the
    tokens of the transformer: patchified and normalized by the running statistics, (b, h / 16, w / 16, 128) for FLUX.2.
    """

    def __init__(
        self,
        config: AutoencoderKLFlux2Config,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.config = config
        self.bn = RunningStatistics(config.token_channels)

    def encode_tokens(self, images_bhwc: Float[Array, "b h w c"]) -> Float[Array, "b h16 w16 p"]:
        """Returns the normalized tokens of images in [-1, 1], on their grid, (b, h / 16, w / 16, token_channels)."""
        tokens = patchify(self.encode(images_bhwc), self.config.patch_size)
        mean, scale = self._normalization(tokens.dtype)
        return (tokens - mean) / scale

    def decode_tokens(self, tokens_bhwp: Float[Array, "b h w p"]) -> Float[Array, "b h16 w16 c"]:
        """Returns the images of normalized tokens: the inverse of `encode_tokens`, up to its error."""
        mean, scale = self._normalization(tokens_bhwp.dtype)
        return self.decode(unpatchify(tokens_bhwp * scale + mean, self.config.patch_size))

    def _normalization(self, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        scale = jnp.sqrt(self.bn.running_var[...] + self.config.batch_norm_eps)
        return self.bn.running_mean[...].astype(dtype), scale.astype(dtype)
