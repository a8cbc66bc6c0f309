"""AutoencoderKL: the convolutional autoencoder of SDXL and Stable Diffusion 1.5.

Source: `AutoencoderKL` and its use in `StableDiffusionXLPipeline` (diffusers); attribute names are its keys.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from clvr_jax.models.common.autoencoder_blocks import Autoencoder, AutoencoderConfig


@dataclass(frozen=True)
class AutoencoderKLConfig(AutoencoderConfig):
    """Configuration of `AutoencoderKL`, with the field names and defaults of diffusers' `vae/config.json`."""

    scaling_factor: float = 0.18215
    shift_factor: float | None = None

    @classmethod
    def sdxl(cls) -> "AutoencoderKLConfig":
        """Returns the configuration of SDXL: the shapes of Stable Diffusion 1.5 with other weights."""
        return cls(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=1024, scaling_factor=0.13025
        )

    @classmethod
    def sd15(cls) -> "AutoencoderKLConfig":
        """Returns the configuration of Stable Diffusion 1.5."""
        return cls(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)


class AutoencoderKL(Autoencoder):
    """The autoencoder of images in [-1, 1].

    `encode` and `decode` use raw latents, (b, h / 8, w / 8, 4) for SDXL. `encode_scaled` and `decode_scaled` use the
    latents of the UNet, which are shifted and scaled to about unit variance.
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

    def encode_scaled(self, images_bhwc: Float[Array, "b h w c"]) -> Float[Array, "b h8 w8 d"]:
        """Returns the scaled latents (posterior mode) of images in [-1, 1], (b, h / 8, w / 8, latent_channels)."""
        return (self.encode(images_bhwc) - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def decode_scaled(self, latents_bhwc: Float[Array, "b h w c"]) -> Float[Array, "b h8 w8 d"]:
        """Returns the images of scaled latents: the inverse of `encode_scaled`, up to the error of the autoencoder."""
        return self.decode(latents_bhwc / self.config.scaling_factor + (self.config.shift_factor or 0.0))
