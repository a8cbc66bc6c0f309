"""A small Stable Diffusion of the shapes world: a UNet and its CLIP text encoder, from random weights."""

import dataclasses
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from clvr_jax.data.preprocessing.clip_tokens import encode_clip, make_clip_tokenizer
from clvr_jax.data.shapes import generation_example
from clvr_jax.diffusion import NoiseSchedule
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.common.autoencoder_blocks import AutoencoderConfig
from clvr_jax.models.flux2 import AutoencoderKLFlux2
from clvr_jax.models.stable_diffusion import (
    AutoencoderKL,
    AutoencoderKLConfig,
    CLIPText,
    CLIPTextConfig,
    UNet2DCondition,
    UNet2DConditionConfig,
)
from clvr_jax.pipelines.flux2.io import load_vae
from clvr_jax.pipelines.sdxl import SDXLPipeline, SDXLSettings
from clvr_jax.tasks.bundles import ModelBundle
from clvr_jax.tasks.sdxl import noise_prediction_task
from clvr_jax.training.optimization.initialization import scaled
from clvr_jax.training.trainer import Task
from clvr_jax.trees import Params
from clvr_jax.worlds.shapes.language.grammar import vocabulary

LENGTH = 24
"""Tokens of a text; the longest of its prompts has 20."""
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": True,
}
# As in Stable Diffusion what a text leaves free is decided at the noisiest steps; there v, unlike the noise, is
# something to be learned.
SCHEDULE = NoiseSchedule.from_config(SCHEDULER)
SETTINGS = SDXLSettings(num_inference_steps=28, guidance_scale=2.0, world="shapes")
UNET_START = {"conv2|proj_out|conv_out": 0.0, r"attn2\.to_q|attn2\.to_k": 2.0}
"""Branches start silent, heads able to look at a single token."""
PROMPTS = {"single_object": 0.2, "two_object": 0.25, "colors": 0.25, "color_attr": 0.3}


def without_batch_norm(vae: AutoencoderKLFlux2) -> AutoencoderKL:
    """Returns the same autoencoder in Stable Diffusion's form: one scaling factor, not statistics for each channel."""
    mean, variance = vae.bn.running_mean[...], vae.bn.running_var[...]
    deviation = jnp.sqrt(jnp.mean(variance) + jnp.var(mean))
    shared = {field.name: getattr(vae.config, field.name) for field in dataclasses.fields(AutoencoderConfig)}
    config = AutoencoderKLConfig(**shared, scaling_factor=float(1 / deviation))
    plain = abstract_module(lambda rngs: AutoencoderKL(config, rngs=rngs))
    nnx.update(plain, nnx.state(vae, nnx.Param))
    return plain


def initial_models(seed: int) -> tuple[UNet2DCondition, CLIPText, Tokenizer]:
    """Returns UNet and text encoder with random weights, and the tokenizer."""
    tokenizer = make_clip_tokenizer(vocabulary(), LENGTH)
    rngs = nnx.Rngs(seed)
    encoder = CLIPText(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            eos_token_id=tokenizer.eos_token_id,
        ),
        rngs=rngs,
    )
    unet = UNet2DCondition(
        UNet2DConditionConfig(
            sample_size=8,
            in_channels=8,
            out_channels=8,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            block_out_channels=(48, 96),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=64,
            attention_head_dim=4,
            use_linear_projection=True,
        ),
        rngs=rngs,
    )
    return unet, encoder, tokenizer


def text_image_batch(
    step: int, seed: int, batch_size: int, dropout: float, tokenizer: Tokenizer
) -> dict[str, np.ndarray]:
    """Returns the batch of a step: ids (b, LENGTH) and "pictures" (b, 64, 64, 3) as uint8."""
    rng = np.random.default_rng((seed, step))
    chosen = [generation_example(rng, PROMPTS) for _ in range(batch_size)]
    texts = ["" if rng.random() < dropout else example.text for example in chosen]
    return {"ids": encode_clip(tokenizer, texts, LENGTH), "pictures": np.stack([example.target for example in chosen])}


def stable_diffusion_task(vae: Path, *, batch_size: int, dropout: float, seed: int) -> Task:
    """Returns the task of training UNet and text encoder together on one or two objects.

    Args:
      vae: directory of an AutoencoderKLFlux2.
      batch_size: number of images in a step.
      dropout: fraction of texts that are replaced by the empty text.
      seed: of the initial weights and of the batches.
    """
    autoencoder = without_batch_norm(load_vae(vae))
    unet, encoder, tokenizer = initial_models(seed)
    unet_bundle, encoder_bundle = ModelBundle.of(unet), ModelBundle.of(encoder)
    unet_def, encoder_def = unet_bundle.graphdef, encoder_bundle.graphdef

    def export(ema: Params, directory: Path) -> None:
        trained = nnx.merge(unet_def, ema["unet"]), autoencoder, [nnx.merge(encoder_def, ema["text_encoder"])]
        SDXLPipeline(*trained, [tokenizer], SCHEDULER, SETTINGS).save_pretrained(str(directory))

    return noise_prediction_task(
        "shapes Stable Diffusion",
        dataclasses.replace(unet_bundle, weights=scaled(unet_bundle.weights, UNET_START)),
        encoder_bundle,
        ModelBundle.of(autoencoder),
        SCHEDULE,
        partial(text_image_batch, seed=seed, batch_size=batch_size, dropout=dropout, tokenizer=tokenizer),
        export,
    )
