"""A small Stable Diffusion of the shapes world: a UNet and its CLIP text encoder, trained together from random weights.

It generates one or two objects, on the latents of the autoencoder that ships with the package, and is exported as a
`StableDiffusionPipeline` directory.

    clvr train configs/shapes_sd.py --out runs/shapes_sd
    clvr sample "a red circle and a blue star" --model runs/shapes_sd/export
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clvr_jax.data.clip_tokens import encode_clip, make_clip_tokenizer
from clvr_jax.data.shapes import generation_example
from clvr_jax.diffusion import NoiseSchedule
from clvr_jax.models.autoencoder_blocks import AutoencoderConfig
from clvr_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from clvr_jax.models.autoencoder_kl_flux2 import AutoencoderKLFlux2
from clvr_jax.models.clip_text import CLIPText, CLIPTextConfig
from clvr_jax.models.unet_2d_condition import UNet2DCondition, UNet2DConditionConfig
from clvr_jax.pipelines.flux2_io import load_vae
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.pipelines.sdxl import SDXLPipeline, SDXLSettings
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.initialization import scaled
from clvr_jax.training.objectives import noise_prediction_loss
from clvr_jax.training.trainer import Task, TrainConfig
from clvr_jax.worlds.shapes.grammar import vocabulary

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


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of the run."""

    train: TrainConfig = TrainConfig(
        steps=2000,
        learning_rate=2e-3,
        muon_learning_rate=4e-3,
        b2=0.98,
        ema_decay=0.998,
        checkpoint=CheckpointConfig(save_interval_minutes=5),
    )
    """Configuration of the training."""
    vae: Path = SHIPPED / "shapes-tiny" / "vae"
    """Use this autoencoder, a directory with an AutoencoderKLFlux2; the default is the shipped one."""
    batch_size: int = 32
    """Number of images in a step, over all devices."""
    dropout: float = 0.1
    """Replace this fraction of the texts by the empty text, so that the model can be sampled with classifier-free
    guidance."""


CONFIG = Config()


def without_batch_norm(vae: AutoencoderKLFlux2) -> AutoencoderKL:
    """The same autoencoder in Stable Diffusion's form: one scaling factor instead of statistics for each channel."""
    mean, variance = vae.bn.running_mean[...], vae.bn.running_var[...]
    deviation = jnp.sqrt(jnp.mean(variance) + jnp.var(mean))
    shared = {field.name: getattr(vae.config, field.name) for field in dataclasses.fields(AutoencoderConfig)}
    config = AutoencoderKLConfig(**shared, scaling_factor=float(1 / deviation))
    plain = AutoencoderKL(config, rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(vae, nnx.Param))
    return plain


def models(config: Config) -> tuple[UNet2DCondition, CLIPText, Any]:
    """UNet and text encoder as they start, and the tokenizer."""
    tokenizer = make_clip_tokenizer(vocabulary(), LENGTH)
    rngs = nnx.Rngs(config.train.seed)
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


def batch(step: int, config: Config, tokenizer: Any) -> dict[str, np.ndarray]:
    """Returns the batch of a step: ids (b, LENGTH) and "pictures" (b, 64, 64, 3) as uint8."""
    rng = np.random.default_rng((config.train.seed, step))
    drawn = [generation_example(rng, PROMPTS) for _ in range(config.batch_size)]
    texts = ["" if rng.random() < config.dropout else example.text for example in drawn]
    return {"ids": encode_clip(tokenizer, texts, LENGTH), "pictures": np.stack([example.target for example in drawn])}


def task(config: Config) -> Task:
    """The run as the trainer takes it."""
    vae = without_batch_norm(load_vae(config.vae))
    unet, encoder, tokenizer = models(config)
    unet_def, unet_state = nnx.split(unet)
    encoder_def, encoder_state = nnx.split(encoder)
    vae_def, vae_state = nnx.split(vae)

    def loss(params: Any, frozen: Any, data: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        unet = nnx.merge(unet_def, params["unet"])
        text = nnx.merge(encoder_def, params["text_encoder"])(data["ids"]).last_hidden_state_btd
        pictures = data["pictures"].astype(jnp.float32) / 127.5 - 1
        latents = jax.lax.stop_gradient(nnx.merge(vae_def, frozen).encode_scaled(pictures))
        return noise_prediction_loss(lambda x, t: unet(x, t, text), latents, key, SCHEDULE), {}

    def export(ema: Any, directory: Path) -> None:
        trained = nnx.merge(unet_def, ema["unet"]), vae, [nnx.merge(encoder_def, ema["text_encoder"])]
        SDXLPipeline(*trained, [tokenizer], SCHEDULER, SETTINGS).save_pretrained(str(directory))

    return Task(
        name="shapes Stable Diffusion",
        params={"unet": scaled(unet_state, UNET_START), "text_encoder": encoder_state},
        frozen=vae_state,
        loss=loss,
        batches=partial(batch, config=config, tokenizer=tokenizer),
        export=export,
    )
