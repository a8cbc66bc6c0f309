"""FLUX.2 klein: from a prompt and reference images to an image."""

from clvr_jax.pipelines.flux2.pipeline import Flux2Pipeline
from clvr_jax.pipelines.flux2.settings import KLEIN, Flux2Output, Flux2Settings

__all__ = ["KLEIN", "Flux2Output", "Flux2Pipeline", "Flux2Settings"]
