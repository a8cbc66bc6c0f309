"""Few-step distillation of FLUX.2 klein base: 4 steps without guidance in place of 28 with it, under whole histories.

clvr train configs/flux2_distill.py --model black-forest-labs/FLUX.2-klein-base-4B --dataset data/trajectories
clvr plan configs/flux2_distill.py --preset klein-4b --batch-size 256 --topology v6e-256

The dataset gives only the conditions: prompts, histories and reference images. The teacher generates the targets. All
parameters are trained and none is added, so that `clvr merge` can add the delta to an aligned model. Never run on the
real weights: there was no accelerator. The tests run it on a small model of the same classes, and trace the step of the
full sizes. Every 9B variant of FLUX.2 klein is for non-commercial use only.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clvr_jax.configs.flux2_sft import abstract_batch
from clvr_jax.convert.architectures import FLUX2_TRANSFORMER, FLUX2_VAE, qwen3_hidden_states
from clvr_jax.cost_model.flops import Flops, flux2_flops, qwen3_flops
from clvr_jax.cost_model.flops_images import encoder_flops
from clvr_jax.data.sft_examples import GenerationExamples
from clvr_jax.data.sft_input import Batches, BatchLoader
from clvr_jax.data.text import encode_prompts
from clvr_jax.data.trajectory_dataset import TrajectoryDataset
from clvr_jax.diffusion import flow_sigmas
from clvr_jax.errors import ClvrError
from clvr_jax.models.autoencoder_kl_flux2 import AutoencoderKLFlux2Config
from clvr_jax.models.flux2_transformer import Flux2Transformer, Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3Config
from clvr_jax.pipelines.flux2 import KLEIN, Flux2Pipeline, Flux2Settings
from clvr_jax.pipelines.flux2_programs import encode_references, encode_text, velocity_field
from clvr_jax.sharding import MeshConfig, process_allgather, replicate
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.distillation import DistillConfig, Field, distillation_loss
from clvr_jax.training.trainer import Task, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of the run, and of what `clvr plan` compiles."""

    train: TrainConfig = TrainConfig(
        steps=3000,
        learning_rate=1e-5,
        b2=0.999,
        warmup=0.05,
        ema_decay=0.999,
        compute_dtype="bfloat16",
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(save_interval_minutes=20),
    )
    """Configuration of the training."""
    distill: DistillConfig = DistillConfig()
    """Configuration of the distillation."""
    model: str = ""
    """Start from this base model: a pipeline directory or a Hugging Face id; it must be given to train."""
    dataset: Path = Path("data/trajectories")
    """Train on this dataset of trajectories, a directory that `clvr synth` wrote."""
    batch_size: int = 64
    """Number of target images in a step, over all devices; each is learned from in all steps of the student."""
    remat: str = "attention"
    """Choose what the backward pass keeps of each block: "dots" keeps all matrix products, "attention" only the outputs
    of attention, and "full" nothing, which takes the least memory and the most time."""
    preset: Literal["klein-4b", "klein-9b"] = "klein-4b"
    """With `clvr plan` only: plan for this size of FLUX.2 klein."""
    size: int = 1024
    """With `clvr plan` only: plan for images with sides of this many pixels."""
    references: int = 4
    """With `clvr plan` only: plan for this many reference images."""


CONFIG = Config()


def task(config: Config) -> Task:
    """Returns the task for the trainer."""
    if not config.model:
        raise ClvrError("flux2_distill: --model is missing; give a directory or a Hugging Face id of a base model")
    pipe = Flux2Pipeline.from_pretrained(config.model, config.train.compute_dtype)
    examples = GenerationExamples(
        TrajectoryDataset(config.dataset), pipe.tokenizer, dropout=0.0, text_buckets=pipe.settings.text_buckets
    )
    batches = Batches(BatchLoader(examples, config.batch_size, seed=config.train.seed))
    return pipeline_task("distillation of FLUX.2", pipe, config.train, config.distill, batches, config.remat)


def pipeline_task(
    name: str,
    pipe: Flux2Pipeline,
    train: TrainConfig,
    distill: DistillConfig,
    batches: Any,
    remat: str = "dots",
    save_dtype: str = "bfloat16",
) -> Task:
    """Distillation of any FLUX.2 pipeline; exports one that samples in few steps without guidance.

    Args:
      name: for progress lines.
      pipe: the teacher; the student begins as it.
      train, distill: how.
      batches: as the trainer takes them: ids and mask (b, s), references (b, n, h, w, 3) and target (b, h, w, 3), whose
        size alone is used.
      remat: what the backward pass keeps. save_dtype: of the exported weights.
    Raises: ClvrError if the pipeline is a distilled one.
    """
    if pipe.settings.is_distilled:
        raise ClvrError(f"{name}: the model is distilled already; give its base")
    # Master weights are float32, whatever the directory holds.
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.state(pipe.transformer))
    (text_encoder_def, text_encoder), (vae_def, vae) = nnx.split(pipe.text_encoder), nnx.split(pipe.vae)
    unchanged = nnx.merge(vae_def, process_allgather(vae)), nnx.merge(text_encoder_def, process_allgather(text_encoder))
    transformer_def, teacher = nnx.split(pipe.transformer)
    tokenizer, schedule, source = pipe.tokenizer, pipe.schedule, pipe.text_encoder_source
    settings = dataclasses.replace(
        pipe.settings, is_distilled=True, num_inference_steps=distill.steps, guidance_scale=1.0
    )

    def export(ema: Any, directory: Path) -> None:
        transformer = nnx.merge(transformer_def, ema)
        student = Flux2Pipeline(transformer, *unchanged, tokenizer, settings, schedule, source)
        student.save_pretrained(str(directory), dtype=save_dtype)

    return _task(
        name,
        (train, distill, remat),
        settings,
        (pipe.transformer.config, params, teacher),
        (pipe.text_encoder.config, text_encoder_def, text_encoder),
        (pipe.vae.config, vae_def, vae),
        lambda length: encode_prompts(tokenizer, [""], (length,)),
        batches,
        export,
    )


def abstract_task(config: Config) -> Task:
    """Returns the same task with shapes in place of arrays, to trace, compile and plan its step."""
    (transformer_config, text_encoder), vae = KLEIN[config.preset], AutoencoderKLFlux2Config()
    settings, dtype = Flux2Settings(), jnp.dtype(config.train.compute_dtype)
    encoder = qwen3_hidden_states(settings.text_encoder_out_layers)
    fields = FLUX2_TRANSFORMER.config_to_dict(transformer_config)
    batch = abstract_batch(config.batch_size, config.size, config.references, settings.text_buckets[0])
    return _task(
        f"distillation of {config.preset}",
        (config.train, config.distill, config.remat),
        settings,
        (transformer_config, FLUX2_TRANSFORMER.split(fields)[1], FLUX2_TRANSFORMER.split(fields, dtype)[1]),
        (text_encoder, *encoder.split(encoder.config_to_dict(text_encoder), dtype)),
        (vae, *FLUX2_VAE.split(FLUX2_VAE.config_to_dict(vae), dtype)),
        lambda length: (np.zeros((1, length), np.int32), np.ones((1, length), np.int32)),
        lambda step: batch,
        lambda ema, directory: None,
    )


def _task(
    name: str,
    how: tuple[TrainConfig, DistillConfig, str],
    settings: Flux2Settings,
    transformer: tuple[Flux2TransformerConfig, Any, Any],
    text_encoder: tuple[Qwen3Config, Any, Any],
    autoencoder: tuple[AutoencoderKLFlux2Config, Any, Any],
    empty: Callable[[int], tuple[np.ndarray, np.ndarray]],
    batches: Any,
    export: Callable[[Any, Path], None],
) -> Task:
    """Models are given as configuration, graph and weights, the transformer as configuration, student and teacher.

    empty: length -> ids and mask (1, length) of the empty text.
    """
    (train, distill, remat), (transformer_config, params, teacher) = how, transformer
    (text_encoder_config, text_encoder_def, text_encoder_state), (vae_config, vae_def, vae_state) = (
        text_encoder,
        autoencoder,
    )
    layers, token = settings.text_encoder_out_layers, vae_config.token_pixels
    dtype = jnp.dtype(train.compute_dtype)
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: Flux2Transformer(transformer_config, rngs=nnx.Rngs(0), dtype=dtype, remat=remat))
    )

    def loss(params: Any, frozen: Any, data: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        rows, grid = len(data["ids"]), tuple(side // token for side in data["target"].shape[1:3])
        count = data["references"].shape[1]

        def read(ids: Any, mask: Any) -> jax.Array:
            return encode_text(text_encoder_def, frozen["text_encoder"], jnp.asarray(ids), jnp.asarray(mask), layers)

        def network(weights: Any) -> Field:
            model = nnx.merge(graphdef, weights)

            def field(x: jax.Array, t: jax.Array, condition: Any) -> jax.Array:
                return velocity_field(model, condition["references"], grid, [grid] * count)(x, t, condition["text"])

            return field

        references = encode_references(vae_def, replicate(frozen["vae"]), data["references"], dtype)
        conditional = {"text": read(data["ids"], data["mask"]), "references": references}
        # Without guidance nobody asks for the empty text, and the compiler leaves it out.
        nothing = jnp.repeat(read(*empty(data["ids"].shape[1])), rows, axis=0)
        noise_key, loss_key = jax.random.split(key)
        return distillation_loss(
            network,
            params,
            frozen["teacher"],
            conditional,
            {"text": nothing, "references": references},
            jax.random.normal(noise_key, (rows, grid[0] * grid[1], transformer_config.in_channels)),
            flow_sigmas(distill.steps, grid[0] * grid[1]),
            distill,
            loss_key,
        )

    def counted(batch: Any) -> tuple[Flops, Flops]:
        """Returns the FLOPs of one evaluation of the transformer for each row, and of text encoder and VAE."""
        rows, side = batch["target"].shape[:2]
        count, image, text = batch["references"].shape[1], (side // token) ** 2, batch["ids"].shape[1]
        generator = flux2_flops(transformer_config, rows, text=text, image=image, references=count * image)
        read = qwen3_flops(text_encoder_config, rows, text, layers=max(layers), logits=0)
        return generator, read + encoder_flops(vae_config, rows * count, side, side)

    def rollout_flops(generator: Flops) -> float:
        """Returns the FLOPs of the teacher's and the student's evaluations in all windows."""
        return generator.forward * distill.steps * (distill.substeps * distill.passes + 1)

    def flops(batch: Any) -> float:
        generator, others = counted(batch)
        return distill.steps * generator.training + rollout_flops(generator) + others.forward

    def hardware_flops(batch: Any) -> float:
        generator, others = counted(batch)
        return distill.steps * generator.hardware(remat, flash=True) + rollout_flops(generator) + others.forward

    def tokens(batch: Any) -> int:
        rows, side = batch["target"].shape[:2]
        return int(rows * (batch["ids"].shape[1] + (1 + batch["references"].shape[1]) * (side // token) ** 2))

    return Task(
        name=name,
        params=params,
        frozen={"teacher": teacher, "text_encoder": text_encoder_state, "vae": vae_state},
        loss=loss,
        batches=batches,
        export=export,
        flops=flops,
        hardware_flops=hardware_flops,
        tokens=tokens,
    )
