"""Few-step distillation of FLUX.2's transformer with its own parameters."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from clvr_jax.cost_model.flops import Flops
from clvr_jax.diffusion import flow_sigmas
from clvr_jax.errors import ClvrError
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.programs import attended_references, encode_references, encode_text, velocity_field
from clvr_jax.pipelines.flux2.settings import ReferenceMode
from clvr_jax.sharding import replicate
from clvr_jax.tasks.bundles import Export, cast_weights
from clvr_jax.tasks.flux2.models import Flux2Models, pipeline_export
from clvr_jax.training.objectives.distillation import DistillConfig, Field, distillation_loss
from clvr_jax.training.prefetch import Batches
from clvr_jax.training.trainer import Task, TrainConfig
from clvr_jax.trees import Batch, Params, Path, leaves_by_path


def pipeline_distill_task(
    name: str,
    pipe: Flux2Pipeline,
    train: TrainConfig,
    distill: DistillConfig,
    batches: Batches,
    remat: str = "dots",
    save_dtype: str = "bfloat16",
    reference_cache: ReferenceMode | None = None,
    student: Params | None = None,
) -> Task:
    """Returns the task of distilling a loaded pipeline; exports one that samples in few steps without guidance.

    Args:
      name: for progress lines.
      pipe: the teacher, and the start of the student unless `student` is given.
      train, distill, remat: see `distill_task`.
      batches: of the form of `Flux2Models.abstract_batches`.
      save_dtype: of the exported weights.
      reference_cache: how the student attends to references; as the teacher does if None.
      student: weights from which the student starts.
    Raises: see `distill_task`.
    """
    models = Flux2Models.of(pipe)
    settings = dataclasses.replace(
        pipe.settings,
        is_distilled=True,
        num_inference_steps=distill.steps,
        guidance_scale=1.0,
        reference_cache=reference_cache or pipe.settings.reference_cache,
    )
    export = pipeline_export(pipe, save_dtype, settings)
    return distill_task(name, models, train, distill, batches, export, remat, reference_cache, student)


def distill_task(
    name: str,
    models: Flux2Models,
    train: TrainConfig,
    distill: DistillConfig,
    batches: Batches,
    export: Export,
    remat: str = "dots",
    reference_cache: ReferenceMode | None = None,
    student: Params | None = None,
) -> Task:
    """Returns the task of distilling a transformer into its own few steps; master weights are float32.

    Args:
      name: for progress lines.
      models: the teacher, loaded or abstract, and the start of the student unless `student` is given.
      train, distill: options of the run.
      batches: of the form of `Flux2Models.abstract_batches`; only the size of the target images is used.
      export: of the trained weights.
      remat: what the backward pass keeps of each block, a name in `layers.REMAT`.
      reference_cache: how the student attends to references; as the teacher does if None.
      student: weights from which the student starts, of the teacher's architecture.
    Raises: ClvrError if the model is a distilled one, but for a student that learns from it without guidance to attend
      to references in another way; or if the student is of another architecture.
    """
    teacher_mode = models.settings.reference_cache
    mode = reference_cache or teacher_mode
    if models.settings.is_distilled and (mode == teacher_mode or distill.passes > 1):
        raise ClvrError(
            f"{name}: the model is distilled already; give its base, or another --reference-cache than"
            f" {teacher_mode} with --distill.guidance 1"
        )
    if student is not None and _layout(student) != _layout(models.transformer.weights):
        raise ClvrError(
            f"{name}: the student's weights are not of the teacher's architecture; start it from the teacher"
        )
    layers, token = models.settings.text_encoder_out_layers, models.vae.config.token_pixels
    dtype = jnp.dtype(train.compute_dtype)
    graphdef = models.training_graphdef(dtype, remat)
    text_encoder_def, vae_def = models.text_encoder.graphdef, models.vae.graphdef
    teacher_counts = models.counts
    counts = dataclasses.replace(teacher_counts, mode=mode)
    channels, empty_text = models.transformer.config.in_channels, models.empty_text

    def loss(params: Params, frozen: Params, data: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        rows, grid = len(data["ids"]), tuple(side // token for side in data["target"].shape[1:3])
        count = data["references"].shape[1]

        def read(ids: ArrayLike, mask: ArrayLike) -> jax.Array:
            return encode_text(text_encoder_def, frozen["text_encoder"], jnp.asarray(ids), jnp.asarray(mask), layers)

        def network(attended: ReferenceMode, weights: Params) -> Field:
            model = nnx.merge(graphdef, weights)

            def field(x: jax.Array, t: jax.Array, condition: Params) -> jax.Array:
                sizes = [grid] * count
                references = attended_references(model, condition["references"], sizes, attended)
                return velocity_field(model, references, grid, sizes)(x, t, condition["text"])

            return field

        references = encode_references(vae_def, replicate(frozen["vae"]), data["references"], dtype)
        conditional = {"text": read(data["ids"], data["mask"]), "references": references}
        # Without guidance nothing reads the empty text, and the compiler leaves it out.
        nothing = jnp.repeat(read(*empty_text(data["ids"].shape[1])), rows, axis=0)
        noise_key, loss_key = jax.random.split(key)
        return distillation_loss(
            partial(network, mode),
            params,
            frozen["teacher"],
            conditional,
            {"text": nothing, "references": references},
            jax.random.normal(noise_key, (rows, grid[0] * grid[1], channels)),
            flow_sigmas(distill.steps, grid[0] * grid[1]),
            distill,
            loss_key,
            partial(network, teacher_mode),
        )

    def flops_of(evaluation: Flops, trained: float, batch: Batch) -> float:
        """Returns the FLOPs of a step in which each of the student's steps takes `trained` to learn from."""
        # In all windows: the teacher's evaluations, and one of the student, which samples.
        guiding = teacher_counts.evaluation(batch).forward * distill.substeps * distill.passes
        encoders = counts.encoders(batch, images=batch["references"].shape[1])
        return distill.steps * (trained + guiding + evaluation.forward) + encoders.forward

    def flops(batch: Batch) -> float:
        evaluation = counts.evaluation(batch)
        return flops_of(evaluation, evaluation.training, batch)

    def hardware_flops(batch: Batch) -> float:
        evaluation = counts.evaluation(batch)
        return flops_of(evaluation, evaluation.hardware(remat, flash=True), batch)

    return Task(
        name=name,
        params=cast_weights(models.transformer.weights if student is None else student, jnp.float32),
        frozen={
            "teacher": models.transformer.weights,
            "text_encoder": models.text_encoder.weights,
            "vae": models.vae.weights,
        },
        loss=loss,
        batches=batches,
        export=export,
        flops=flops,
        hardware_flops=hardware_flops,
        tokens=counts.tokens,
    )


def _layout(weights: Params) -> dict[Path, tuple[int, ...]]:
    """Returns the shape of each weight."""
    return {path: leaf.shape for path, leaf in leaves_by_path(weights).items()}
