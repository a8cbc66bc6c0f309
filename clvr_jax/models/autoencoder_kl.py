"""AutoencoderKL: the convolutional autoencoder of SDXL and Stable Diffusion 1.5.

Source of the arithmetic: diffusers `AutoencoderKL` and its use in `StableDiffusionXLPipeline`; attribute names are its
keys.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from clvr_jax.models.autoencoder_blocks import Autoencoder, AutoencoderConfig


@dataclass(frozen=True)
class AutoencoderKLConfig(AutoencoderConfig):
    """Field names and defaults are those of diffusers' `vae/config.json`."""

    scaling_factor: float = 0.18215
    shift_factor: float | None = None

    @classmethod
    def sdxl(cls) -> "AutoencoderKLConfig":
        """SDXL's autoencoder, trained anew in the shape of Stable Diffusion's."""
        return cls(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=1024, scaling_factor=0.13025
        )

    @classmethod
    def sd15(cls) -> "AutoencoderKLConfig":
        """The autoencoder of Stable Diffusion 1.5."""
        return cls(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)


class AutoencoderKL(Autoencoder):
    """Images in [-1, 1] <-> latents.

    `encode` and `decode` work on raw latents, (b, h / 8, w / 8, 4) for SDXL. `encode_scaled` and `decode_scaled` work
    on what the UNet sees: shifted and scaled to about unit variance.
    """

    def __init__(
        self,
        config: AutoencoderKLConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        super().__init__(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.config = config

    def encode_scaled(self, images_bhwc: jax.Array) -> jax.Array:
        """Images in [-1, 1] -> the posterior's mode as the UNet sees it, (b, h / 8, w / 8, latent_channels)."""
        return (self.encode(images_bhwc) - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def decode_scaled(self, latents_bhwc: jax.Array) -> jax.Array:
        """What the UNet made -> images; inverts `encode_scaled` up to what the autoencoder loses."""
        return self.decode(latents_bhwc / self.config.scaling_factor + (self.config.shift_factor or 0.0))
