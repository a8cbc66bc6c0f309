"""Full-parameter fine-tuning of FLUX.2 klein on verified trajectories, as the paper does it: 1024 x 1024, rate 2e-5.

clvr train configs/flux2_sft.py --model black-forest-labs/FLUX.2-klein-base-4B --dataset data/trajectories

Wrong images of a trajectory, which a later step corrects, are references of later steps, never targets. Never run on
the real weights: there was no accelerator. The tests run it on `shapes-tiny`, whose models are of the same classes, and
trace the step of the full sizes. Every 9B variant of FLUX.2 klein is for non-commercial use only.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from clvr_jax.convert.architectures import FLUX2_TRANSFORMER, FLUX2_VAE, qwen3_hidden_states
from clvr_jax.cost_model.flops import Flops, flux2_flops, qwen3_flops
from clvr_jax.cost_model.flops_images import encoder_flops
from clvr_jax.data.sft_examples import GenerationExamples
from clvr_jax.data.sft_input import Batches, BatchLoader
from clvr_jax.data.trajectory_dataset import TrajectoryDataset
from clvr_jax.errors import ClvrError
from clvr_jax.models.autoencoder_kl_flux2 import AutoencoderKLFlux2Config
from clvr_jax.models.flux2_transformer import Flux2Transformer, Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3Config
from clvr_jax.pipelines.flux2 import KLEIN, Flux2Pipeline, Flux2Settings
from clvr_jax.pipelines.flux2_programs import velocity_field
from clvr_jax.sharding import MeshConfig, process_allgather, replicate
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.sft import drawing_loss
from clvr_jax.training.trainer import Task, TrainConfig


@dataclasses.dataclass(frozen=True)
class FlowMatchingConfig:
    """Options of the recipes that train the transformer of FLUX.2 klein by flow matching: this one and `flux2_lora`."""

    model: str = ""
    """Start from this model: a pipeline directory or a Hugging Face id; it must be given to train."""
    batch_size: int = 64
    """Number of target images in a step, over all devices."""
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


@dataclasses.dataclass(frozen=True)
class Config(FlowMatchingConfig):
    """Configuration of the run, and of what `clvr plan` compiles."""

    train: TrainConfig = TrainConfig(
        steps=5000,
        learning_rate=2e-5,
        b2=0.999,
        warmup=0.1,
        ema_decay=0.999,
        compute_dtype="bfloat16",
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(save_interval_minutes=20),
    )
    """Configuration of the training."""
    dataset: Path = Path("data/trajectories")
    """Train on this dataset of trajectories, a directory that `clvr synth` wrote."""
    size: int = 1024
    """With `clvr plan` only: plan for images with sides of this many pixels."""
    references: int = 4
    """With `clvr plan` only: plan for this many reference images."""


CONFIG = Config()


def task(config: Config) -> Task:
    """Returns the task for the trainer."""
    if not config.model:
        raise ClvrError("flux2_sft: --model is missing; give a directory or a Hugging Face id of FLUX.2 klein")
    pipe = Flux2Pipeline.from_pretrained(config.model, config.train.compute_dtype)
    # Master weights are float32, whatever the directory holds.
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.state(pipe.transformer))
    vae, text_encoder = _allgathered(pipe.vae), _allgathered(pipe.text_encoder)
    transformer_def, tokenizer = nnx.graphdef(pipe.transformer), pipe.tokenizer
    settings, schedule, source = pipe.settings, pipe.schedule, pipe.text_encoder_source
    examples = GenerationExamples(
        TrajectoryDataset(config.dataset), tokenizer, dropout=config.dropout, text_buckets=settings.text_buckets
    )

    def export(ema: Any, directory: Path) -> None:
        transformer = nnx.merge(transformer_def, ema)
        trained = Flux2Pipeline(transformer, vae, text_encoder, tokenizer, settings, schedule, source)
        trained.save_pretrained(str(directory), dtype="bfloat16")

    batches = Batches(BatchLoader(examples, config.batch_size, seed=config.train.seed))
    return pipeline_task(config, pipe, params, batches, export)


def pipeline_task(
    config: Any, pipe: Flux2Pipeline, params: Any, batches: Any, export: Callable[[Any, Path], None]
) -> Task:
    """Returns the task of training a pipeline's transformer, whose text encoder and VAE stay as they are.

    Args:
      config: a `FlowMatchingConfig` with a field `train` of type TrainConfig.
      pipe: the initial model.
      params: of the transformer, in the dtype in which they are trained.
      batches: as the trainer takes them, of the form of `abstract_batch`.
      export: (params, directory) -> None.
    """
    text_encoder_def, text_encoder = nnx.split(pipe.text_encoder)
    vae_def, vae = nnx.split(pipe.vae)
    return _task(
        config,
        pipe.settings,
        (pipe.transformer.config, params),
        (pipe.text_encoder.config, text_encoder_def, text_encoder),
        (pipe.vae.config, vae_def, vae),
        batches,
        export,
    )


def _allgathered(model: nnx.Module) -> Any:
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, process_allgather(state))


def abstract_task(config: Config) -> Task:
    """Returns the same task with shapes in place of arrays, to trace, compile and plan its step."""
    (transformer_config, text_encoder), vae = KLEIN[config.preset], AutoencoderKLFlux2Config()
    settings, dtype = Flux2Settings(), jnp.dtype(config.train.compute_dtype)
    encoder = qwen3_hidden_states(settings.text_encoder_out_layers)
    batch = abstract_batch(config.batch_size, config.size, config.references, settings.text_buckets[0])
    return _task(
        config,
        settings,
        (transformer_config, FLUX2_TRANSFORMER.split(FLUX2_TRANSFORMER.config_to_dict(transformer_config))[1]),
        (text_encoder, *encoder.split(encoder.config_to_dict(text_encoder), dtype)),
        (vae, *FLUX2_VAE.split(FLUX2_VAE.config_to_dict(vae), dtype)),
        lambda step: batch,
        lambda ema, directory: None,
    )


def abstract_batch(rows: int, side: int, references: int, text: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch. side: pixels. references: of each row. text: tokens."""
    return {
        "ids": jax.ShapeDtypeStruct((rows, text), jnp.int32),
        "mask": jax.ShapeDtypeStruct((rows, text), jnp.int32),
        "target": jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8),
        "references": jax.ShapeDtypeStruct((rows, references, side, side, 3), jnp.uint8),
    }


def _task(
    config: Any,
    settings: Flux2Settings,
    transformer: tuple[Flux2TransformerConfig, Any],
    text_encoder: tuple[Qwen3Config, Any, Any],
    autoencoder: tuple[AutoencoderKLFlux2Config, Any, Any],
    batches: Any,
    export: Callable[[Any, Path], None],
) -> Task:
    """Models are passed as configuration, graph definition and weights."""
    (
        (transformer_config, params),
        (text_encoder_config, text_encoder_def, text_encoder_state),
        (vae_config, vae_def, vae_state),
    ) = (
        transformer,
        text_encoder,
        autoencoder,
    )
    layers, token = settings.text_encoder_out_layers, vae_config.token_pixels
    dtype = jnp.dtype(config.train.compute_dtype)
    transformer_def, _ = nnx.split(
        nnx.eval_shape(lambda: Flux2Transformer(transformer_config, rngs=nnx.Rngs(0), dtype=dtype, remat=config.remat))
    )

    def loss(params: Any, frozen: Any, data: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        grid = tuple(side // token for side in data["target"].shape[1:3])
        count = data["references"].shape[1]
        text_encoder = nnx.merge(text_encoder_def, frozen["text_encoder"])
        vae = nnx.merge(vae_def, replicate(frozen["vae"]))

        def encode_text(ids: jax.Array, mask: jax.Array) -> jax.Array:
            return jax.lax.stop_gradient(jnp.concatenate(text_encoder.hidden_states(ids, mask, layers), axis=-1))

        def encode_images(images: jax.Array) -> jax.Array:
            tokens = vae.encode_tokens(images.astype(dtype))
            return tokens.reshape(len(images), grid[0] * grid[1], -1)

        model = nnx.merge(transformer_def, params)
        value = drawing_loss(
            encode_text,
            encode_images,
            lambda references: velocity_field(model, references, grid, [grid] * count),
            data,
            key,
            config.shift,
        )
        return value, {f"loss_{count}_references": value}

    def counted(batch: Any) -> tuple[Flops, Flops]:
        """Returns the FLOPs of the transformer, and of the text encoder and VAE, which are not trained."""
        rows, side = batch["target"].shape[:2]
        count, image, text = batch["references"].shape[1], (side // token) ** 2, batch["ids"].shape[1]
        generator = flux2_flops(transformer_config, rows, text=text, image=image, references=count * image)
        read = qwen3_flops(text_encoder_config, rows, text, layers=max(layers), logits=0)
        return generator, read + encoder_flops(vae_config, rows * (count + 1), side, side)

    def flops(batch: Any) -> float:
        generator, others = counted(batch)
        return generator.training + others.forward

    def hardware_flops(batch: Any) -> float:
        generator, others = counted(batch)
        return generator.hardware(config.remat, flash=True) + others.forward

    def tokens(batch: Any) -> int:
        rows, side = batch["target"].shape[:2]
        return int(rows * (batch["ids"].shape[1] + (1 + batch["references"].shape[1]) * (side // token) ** 2))

    return Task(
        name=f"FLUX.2 SFT, {transformer_config.num_layers} + {transformer_config.num_single_layers} blocks",
        params=params,
        frozen={"text_encoder": text_encoder_state, "vae": vae_state},
        loss=loss,
        batches=batches,
        export=export,
        flops=flops,
        hardware_flops=hardware_flops,
        tokens=tokens,
    )
