"""FLUX.2: the transformer that predicts velocities, and the autoencoder of its latent tokens."""

from clvr_jax.models.flux2.autoencoder_kl import AutoencoderKLFlux2, AutoencoderKLFlux2Config
from clvr_jax.models.flux2.config import Flux2TransformerConfig
from clvr_jax.models.flux2.reference_cache import ReferenceCache
from clvr_jax.models.flux2.transformer import Flux2Transformer

__all__ = [
    "AutoencoderKLFlux2",
    "AutoencoderKLFlux2Config",
    "Flux2Transformer",
    "Flux2TransformerConfig",
    "ReferenceCache",
]
