"""Stable Diffusion XL and 1.5: from a prompt to an image."""

from clvr_jax.pipelines.sdxl.pipeline import SDXLOutput, SDXLPipeline, SDXLSettings

__all__ = ["SDXLOutput", "SDXLPipeline", "SDXLSettings"]
