"""Supervised fine-tuning of FLUX.2's transformer by flow matching."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from clvr_jax.pipelines.flux2.programs import attended_references, packed_velocity_field, velocity_field
from clvr_jax.sharding import replicate
from clvr_jax.tasks.bundles import Export, cast_weights
from clvr_jax.tasks.flux2.models import Flux2Models, has_packed_rows
from clvr_jax.training.objectives.sft import Field, drawing_loss, packed_drawing_loss
from clvr_jax.training.prefetch import Batches
from clvr_jax.training.trainer import Task, TrainConfig
from clvr_jax.trees import Batch, Params


@dataclasses.dataclass(frozen=True)
class FlowMatchingConfig:
    """Options of the recipes that train the transformer of FLUX.2 klein by flow matching."""

    model: str = ""
    """Start from this model: a pipeline directory or a Hugging Face id; it must be given to train."""
    batch_size: int = 64
    """Number of target images in a step, over all devices; of trajectories, if their images are trained on at once."""
    dropout: float = 0.1
    """Replace this fraction of the texts by the empty text, so that the model can be sampled with classifier-free
    guidance."""
    shift: float = 3.0
    """Shift the training timesteps towards noise by this factor, as the sampler's schedule is shifted; 1 leaves them
    uniform."""
    remat: str = "attention"
    """Choose what the backward pass keeps of each block: "dots" keeps all matrix products, "attention" only the outputs
    of attention, and "full" nothing, which takes the least memory and the most time."""
    preset: Literal["klein-4b", "klein-9b"] = "klein-4b"
    """With `clvr plan` only: plan for this size of FLUX.2 klein."""


def sft_task(
    models: Flux2Models, config: FlowMatchingConfig, train: TrainConfig, batches: Batches, export: Export
) -> Task:
    """Returns the task of training all weights of the transformer; master weights are float32 whatever is loaded.

    Args:
      models: the initial model, loaded or abstract. The text encoder and the VAE are frozen.
      config, train: options of the run.
      batches: of the form of `Flux2Models.abstract_batches`, or of `abstract_packed_batches` for a model with
        `reference_cache` "loop".
      export: of the trained weights.
    """
    params = cast_weights(models.transformer.weights, jnp.float32)
    return flow_matching_task(models, params, config, train, batches, export)


def flow_matching_task(
    models: Flux2Models,
    params: Params,
    config: FlowMatchingConfig,
    train: TrainConfig,
    batches: Batches,
    export: Export,
) -> Task:
    """Returns the task of `sft_task` for parameters of any dtype, such as the base of a LoRA."""
    layers, token = models.settings.text_encoder_out_layers, models.vae.config.token_pixels
    dtype = jnp.dtype(train.compute_dtype)
    transformer_def = models.training_graphdef(dtype, config.remat)
    text_encoder_def, vae_def, counts = models.text_encoder.graphdef, models.vae.graphdef, models.counts

    mode = models.settings.reference_cache

    def loss(params: Params, frozen: Params, data: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        height, width = data["target"].shape[-3:-1]
        grid = height // token, width // token
        count = data["references"].shape[1]
        sizes = [grid] * count
        text_encoder = nnx.merge(text_encoder_def, frozen["text_encoder"])
        vae = nnx.merge(vae_def, replicate(frozen["vae"]))

        def encode_text(ids: jax.Array, mask: jax.Array) -> jax.Array:
            return jax.lax.stop_gradient(jnp.concatenate(text_encoder.hidden_states(ids, mask, layers), axis=-1))

        def encode_images(images: jax.Array) -> jax.Array:
            tokens = vae.encode_tokens(images.astype(dtype))
            flat: jax.Array = tokens.reshape(len(images), grid[0] * grid[1], -1)
            return flat

        model = nnx.merge(transformer_def, params)

        def field(references: jax.Array) -> Field:
            if has_packed_rows(data):
                return packed_velocity_field(model, references, grid, data["seen"])
            return velocity_field(model, attended_references(model, references, sizes, mode), grid, sizes)

        loss_of = packed_drawing_loss if has_packed_rows(data) else drawing_loss
        value = loss_of(encode_text, encode_images, field, data, key, config.shift)
        return value, {f"loss_{count}_references": value}

    def encoders_forward(batch: Batch) -> float:
        return counts.encoders(batch, images=batch["references"].shape[1] + counts.targets(batch)).forward

    blocks = f"{models.transformer.config.num_layers} + {models.transformer.config.num_single_layers} blocks"
    return Task(
        name=f"FLUX.2 SFT, {blocks}",
        params=params,
        frozen={"text_encoder": models.text_encoder.weights, "vae": models.vae.weights},
        loss=loss,
        batches=batches,
        export=export,
        flops=lambda batch: counts.evaluation(batch).training + encoders_forward(batch),
        hardware_flops=lambda batch: (
            counts.evaluation(batch).hardware(config.remat, flash=True) + encoders_forward(batch)
        ),
        tokens=counts.tokens,
    )
