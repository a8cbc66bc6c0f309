"""Sampling with FLUX.2 as one program for the planner."""

import jax
import jax.numpy as jnp

from clvr_jax.cost_model.flops import flux2_flops, qwen3_flops
from clvr_jax.cost_model.flops_images import decoder_flops, encoder_flops
from clvr_jax.diffusion.schedule import flow_sigmas
from clvr_jax.pipelines.flux2.programs import decode, denoise, encode_images, encode_text
from clvr_jax.sharding import replicate
from clvr_jax.tasks.flux2.models import Flux2Models
from clvr_jax.training.plan import Program
from clvr_jax.trees import Batch, Params


def sampling_program(
    title: str, models: Flux2Models, *, batch_size: int, size: int, references: int, steps: int, guided: bool
) -> Program:
    """Returns all of a call, from token ids to pixels.

    Args:
      title: the model, for the name of the program.
      models: abstract models in bfloat16.
      batch_size: number of images.
      size: height and width of all images in pixels.
      references: number of reference images of each generated image.
      steps: number of sampler steps.
      guided: whether each step takes two network evaluations, for classifier-free guidance.
    """
    settings, sizes, vae = models.settings, models.transformer.config, models.vae.config
    bundles = (("transformer", models.transformer), ("text_encoder", models.text_encoder), ("vae", models.vae))
    graphs = {name: bundle.graphdef for name, bundle in bundles}
    b, text, passes = batch_size, settings.text_buckets[0], 1 + guided
    grid = (size // vae.token_pixels, size // vae.token_pixels)
    image = grid[0] * grid[1]

    def sample(weights: Params, data: Batch) -> jax.Array:
        vae_weights = replicate(weights["vae"])
        conditions = encode_text(
            graphs["text_encoder"], weights["text_encoder"], data["ids"], data["mask"], settings.text_encoder_out_layers
        )
        conditions = conditions.reshape(passes * b, text, -1)
        encoded = jax.lax.map(
            lambda images: encode_images(graphs["vae"], vae_weights, images), data["references"].swapaxes(0, 1)
        )
        final = denoise(
            graphs["transformer"],
            weights["transformer"],
            data["noise"],
            conditions,
            encoded.swapaxes(0, 1).reshape(b, references * image, vae.token_channels),
            jnp.asarray(flow_sigmas(steps, image)),
            jnp.float32(settings.guidance_scale),
            grid,
            (grid,) * references,
        )
        return decode(graphs["vae"], vae_weights, final.reshape(b, *grid, -1))

    shape = jax.ShapeDtypeStruct
    data = {
        "ids": shape((passes * b, text), jnp.int32),
        "mask": shape((passes * b, text), jnp.int32),
        "noise": shape((b, image, sizes.in_channels), jnp.bfloat16),
        "references": shape((b, references, size, size, 3), jnp.bfloat16),
    }
    evaluation = flux2_flops(sizes, passes * b, text=text, image=image, references=references * image)
    layers = max(settings.text_encoder_out_layers)
    read = qwen3_flops(models.text_encoder.config, passes * b, text, layers=layers, logits=0)
    vae_flops = encoder_flops(vae, b * references, size, size) + decoder_flops(vae, b, size, size)
    return Program(
        name=f"{title}, {steps} steps{' with guidance' * guided}, {b} of {size} x {size}",
        function=sample,
        weights={name: bundle.weights for name, bundle in bundles},
        data=data,
        reads={"transformer": steps, "text_encoder": 1, "vae": 1 + references},
        flops=steps * evaluation.forward + read.forward + vae_flops.forward,
    )
