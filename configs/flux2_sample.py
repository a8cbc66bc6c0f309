"""Sampling with FLUX.2 klein: prompts and reference images to images, as one program to be planned.

clvr plan configs/flux2_sample.py --preset klein-4b --topology v6e:2x4

The program encodes prompts and references, runs the solver's steps and decodes; it is compiled from shapes alone. Every
9B variant of FLUX.2 klein is for non-commercial use only.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from clvr_jax.convert.architectures import FLUX2_TRANSFORMER, FLUX2_VAE, qwen3_hidden_states
from clvr_jax.cost_model.flops import flux2_flops, qwen3_flops
from clvr_jax.cost_model.flops_images import decoder_flops, encoder_flops
from clvr_jax.diffusion.schedule import flow_sigmas
from clvr_jax.models.autoencoder_kl_flux2 import AutoencoderKLFlux2Config
from clvr_jax.pipelines.flux2 import KLEIN, Flux2Settings
from clvr_jax.pipelines.flux2_programs import decode, denoise, encode_images, encode_text
from clvr_jax.sharding import MeshConfig, replicate
from clvr_jax.training.plan import Program


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of the program that `clvr plan` compiles."""

    mesh: MeshConfig = MeshConfig(data=-1, fsdp=1)
    """Configuration of the device mesh."""
    preset: Literal["klein-4b", "klein-9b"] = "klein-4b"
    """Plan for this size of FLUX.2 klein."""
    batch_size: int = 8
    """Number of images generated in a call, over all devices."""
    size: int = 1024
    """Generate images with sides of this many pixels."""
    references: int = 0
    """Number of reference images given with each prompt, of the same size as the generated image."""
    steps: int = 4
    """Number of sampler steps."""
    guided: bool = False
    """Use classifier-free guidance: two network evaluations in each step, which base models need and distilled models
    do not."""


CONFIG = Config()


def program(config: Config) -> Program:
    """All of a call, from token ids to pixels."""
    sizes, reader = KLEIN[config.preset]
    vae, settings = AutoencoderKLFlux2Config(), Flux2Settings()
    b, side, text, passes = config.batch_size, config.size, settings.text_buckets[0], 1 + config.guided
    grid = (side // vae.token_pixels, side // vae.token_pixels)
    image = grid[0] * grid[1]
    families = {
        "transformer": (FLUX2_TRANSFORMER, sizes),
        "text_encoder": (qwen3_hidden_states(settings.text_encoder_out_layers), reader),
        "vae": (FLUX2_VAE, vae),
    }
    split = {name: family.split(family.config_to_dict(of), jnp.bfloat16) for name, (family, of) in families.items()}
    graphs = {name: graphdef for name, (graphdef, _) in split.items()}

    def sample(weights: Any, data: Any) -> jax.Array:
        vae_weights = replicate(weights["vae"])
        conditions = encode_text(
            graphs["text_encoder"], weights["text_encoder"], data["ids"], data["mask"], settings.text_encoder_out_layers
        )
        conditions = conditions.reshape(passes * b, text, -1)
        references = jax.lax.map(
            lambda images: encode_images(graphs["vae"], vae_weights, images), data["references"].swapaxes(0, 1)
        )
        final = denoise(
            graphs["transformer"],
            weights["transformer"],
            data["noise"],
            conditions,
            references.swapaxes(0, 1).reshape(b, config.references * image, vae.token_channels),
            jnp.asarray(flow_sigmas(config.steps, image)),
            jnp.float32(settings.guidance_scale),
            grid,
            (grid,) * config.references,
        )
        return decode(graphs["vae"], vae_weights, final.reshape(b, *grid, -1))

    shape = jax.ShapeDtypeStruct
    data = {
        "ids": shape((passes * b, text), jnp.int32),
        "mask": shape((passes * b, text), jnp.int32),
        "noise": shape((b, image, sizes.in_channels), jnp.bfloat16),
        "references": shape((b, config.references, side, side, 3), jnp.bfloat16),
    }
    evaluation = flux2_flops(sizes, passes * b, text=text, image=image, references=config.references * image)
    read = qwen3_flops(reader, passes * b, text, layers=max(settings.text_encoder_out_layers), logits=0)
    vae_flops = encoder_flops(vae, b * config.references, side, side) + decoder_flops(vae, b, side, side)
    return Program(
        name=f"{config.preset}, {config.steps} steps{' with guidance' * config.guided}, {b} of {side} x {side}",
        function=sample,
        weights={name: state for name, (_, state) in split.items()},
        data=data,
        reads={"transformer": config.steps, "text_encoder": 1, "vae": 1 + config.references},
        flops=config.steps * evaluation.forward + read.forward + vae_flops.forward,
    )
