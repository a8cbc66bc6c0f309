"""Diagnosis of merging: whether the deltas of distillation and alignment add up in the generator's velocity."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clvr_jax.data.preprocessing.text import encode_prompts
from clvr_jax.diffusion import flow_sigmas
from clvr_jax.merging.deltas import delta
from clvr_jax.merging.diagnostics import Interaction, over_noise_levels, over_scales
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.programs import encode_references, encode_text, velocity_field
from clvr_jax.trees import Params
from clvr_jax.worlds.shapes.language.grammar import scene_for
from clvr_jax.worlds.shapes.metadata import Metadata
from clvr_jax.worlds.shapes.render import render

_LEVELS = (0.95, 0.85, 0.7, 0.5, 0.3, 0.1)
_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


class InteractionResult(TypedDict):
    """The JSON value of a `merging.diagnostics.Interaction`."""

    scale: float
    additivity_error: float
    angle: float
    distill: float
    align: float


class Interactions(TypedDict):
    """Interactions by noise level and, at the noise level `scales_at`, by scale of both deltas; see `interactions`."""

    levels: dict[str, InteractionResult]
    scales: dict[str, InteractionResult]
    scales_at: float


def interactions(base: Path, distilled: Path, aligned: Path, metadata: Sequence[Metadata]) -> Interactions:
    """Measures the interaction of both deltas on noised images that satisfy prompts.

    Args:
      base, distilled, aligned: directories of one architecture; text encoder and autoencoder are the base's.
      metadata: the prompts.
    Returns: {"levels": {sigma: found}, "scales": {scale: found}, "scales_at": sigma}, where found has the fields of
      `merging.diagnostics.Interaction`.
    """
    pipe = Flux2Pipeline.from_pretrained(str(base))
    graphdef, weights = nnx.split(pipe.transformer)
    distill_delta, align_delta = (
        delta(nnx.state(Flux2Pipeline.from_pretrained(str(directory)).transformer), weights)
        for directory in (distilled, aligned)
    )
    metadata, ids, mask = _of_common_length(pipe, metadata)
    rng = np.random.default_rng(0)
    images = np.stack([render(scene_for(dict(entry), rng, allow_held_out=True)) for entry in metadata])
    layers = pipe.settings.text_encoder_out_layers
    text = encode_text(*nnx.split(pipe.text_encoder), jnp.asarray(ids), jnp.asarray(mask), layers)
    x0 = encode_references(*nnx.split(pipe.vae), jnp.asarray(images[:, None]), jnp.float32)
    noise = jax.random.normal(jax.random.key(0), x0.shape)
    token = pipe.vae.config.token_pixels
    grid = (images.shape[1] // token, images.shape[2] // token)

    def predict(params: Params, sigma: jax.Array | float) -> jax.Array:
        field = velocity_field(nnx.merge(graphdef, params), x0[:, :0], grid, [])
        return field((1 - sigma) * x0 + sigma * noise, jnp.full(len(x0), sigma), text)

    # The noise level of the last step of the distilled model, which is its longest step.
    steps = Flux2Pipeline.from_pretrained(str(distilled)).settings.num_inference_steps
    last = float(flow_sigmas(steps, grid[0] * grid[1])[-2])
    levels = over_noise_levels(predict, weights, distill_delta, align_delta, _LEVELS)
    scales = over_scales(lambda params: predict(params, last), weights, distill_delta, align_delta, _SCALES)
    return {
        "levels": {str(sigma): _to_json(found) for sigma, found in levels.items()},
        "scales": {str(scale): _to_json(found) for scale, found in scales.items()},
        "scales_at": last,
    }


def _to_json(found: Interaction) -> InteractionResult:
    return {
        "scale": found.scale,
        "additivity_error": found.additivity_error,
        "angle": found.angle,
        "distill": found.distill,
        "align": found.align,
    }


def _of_common_length(
    pipe: Flux2Pipeline, metadata: Sequence[Metadata]
) -> tuple[list[Metadata], np.ndarray, np.ndarray]:
    """Selects the prompts with the most common padded length. Returns: their metadata, token ids and mask."""
    encoded = [encode_prompts(pipe.tokenizer, [entry["prompt"]], pipe.settings.text_buckets) for entry in metadata]
    length = Counter(ids.shape[1] for ids, _ in encoded).most_common(1)[0][0]
    chosen = [number for number, (ids, _) in enumerate(encoded) if ids.shape[1] == length]
    ids, mask = (np.concatenate([encoded[number][part] for number in chosen]) for part in (0, 1))
    return [metadata[number] for number in chosen], ids, mask
