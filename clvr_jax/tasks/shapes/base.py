"""Training of the small FLUX.2 of the shapes world: its transformer from random weights, with its text encoder."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from clvr_jax.data.preprocessing.text import load_tokenizer
from clvr_jax.models.flux2 import AutoencoderKLFlux2, Flux2Transformer
from clvr_jax.models.qwen3 import Qwen3
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.io import load_text_encoder, load_vae
from clvr_jax.pipelines.flux2.programs import attended_references, velocity_field
from clvr_jax.pipelines.flux2.settings import ReferenceMode
from clvr_jax.tasks.shapes.batches import batch
from clvr_jax.tasks.shapes.sizes import GRID, SETTINGS, TRANSFORMER, TRANSFORMER_START, VAE
from clvr_jax.training.objectives import sft
from clvr_jax.training.optimization.initialization import scaled
from clvr_jax.training.trainer import Task
from clvr_jax.trees import Batch, Params


def drawing_loss(
    transformer: Flux2Transformer,
    text_encoder: Qwen3,
    vae: AutoencoderKLFlux2,
    data: dict[str, jax.Array],
    key: jax.Array,
    shift: float,
    reference_cache: ReferenceMode = "none",
) -> jax.Array:
    """Computes the flow-matching loss of the target's latents, given text and references; see `objectives.sft`."""
    sizes = [GRID] * data["references"].shape[1]

    def encode_text(ids: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.concatenate(text_encoder.hidden_states(ids, mask, SETTINGS.text_encoder_out_layers), axis=-1)

    return sft.drawing_loss(
        encode_text,
        lambda images: vae.encode_tokens(images).reshape(len(images), -1, VAE.token_channels),
        lambda tokens: velocity_field(
            transformer, attended_references(transformer, tokens, sizes, reference_cache), GRID, sizes
        ),
        data,
        key,
        shift,
    )


def base_task(vae: Path, tokenizer: Path, text_encoder: Path, *, dropout: float, shift: float, seed: int) -> Task:
    """Returns the task of training the transformer from random weights together with a pretrained text encoder.

    Args:
      vae, tokenizer, text_encoder: directories of the autoencoder, the tokenizer and the initial text encoder.
      dropout: fraction of texts that are replaced by the empty text.
      shift: see `sample_timesteps`.
      seed: of the initial weights and of the batches.
    """
    words, autoencoder = load_tokenizer(tokenizer), load_vae(vae)
    rngs = nnx.Rngs(seed)
    transformer_def, transformer = nnx.split(Flux2Transformer(TRANSFORMER, rngs=rngs))
    transformer = scaled(transformer, TRANSFORMER_START)
    encoder_def, encoder = nnx.split(load_text_encoder(text_encoder))
    vae_def, vae_state = nnx.split(autoencoder)

    def loss(params: Params, frozen: Params, data: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        value = drawing_loss(
            nnx.merge(transformer_def, params["transformer"]),
            nnx.merge(encoder_def, params["text_encoder"]),
            nnx.merge(vae_def, frozen),
            data,
            key,
            shift,
        )
        kind = "edit" if data["references"].shape[1] else "draw"
        return value, {f"loss_{kind}": value}

    def export(ema: Params, directory: Path) -> None:
        pipeline = Flux2Pipeline(
            nnx.merge(transformer_def, ema["transformer"]),
            autoencoder,
            nnx.merge(encoder_def, ema["text_encoder"]),
            words,
            SETTINGS,
        )
        pipeline.save_pretrained(str(directory), dtype="float16")

    return Task(
        name="shapes base",
        params={"transformer": transformer, "text_encoder": encoder},
        frozen=vae_state,
        loss=loss,
        batches=partial(batch, seed=seed, tokenizer=words, dropout=dropout),
        export=export,
    )
