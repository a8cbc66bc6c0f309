"""Stable Diffusion 1.5 and XL: the UNet, the autoencoder and CLIP's text encoder."""

from clvr_jax.models.stable_diffusion.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from clvr_jax.models.stable_diffusion.clip_text import CLIPText, CLIPTextConfig
from clvr_jax.models.stable_diffusion.unet_2d_condition import UNet2DCondition, UNet2DConditionConfig

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "CLIPText",
    "CLIPTextConfig",
    "UNet2DCondition",
    "UNet2DConditionConfig",
]
