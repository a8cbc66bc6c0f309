"""Few-step distillation of FLUX.2 klein base: 4 steps without guidance in place of 28 with it, under whole histories.

clvr train configs/flux2_distill.py --model black-forest-labs/FLUX.2-klein-base-4B --dataset data/trajectories
clvr plan configs/flux2_distill.py --preset klein-4b --batch-size 256 --topology v6e-256

The dataset gives only the conditions: prompts, histories and reference images. The teacher generates the targets. All
parameters are trained and none is added, so that `clvr merge` can add the delta to an aligned model. Never run on the
real weights: there was no accelerator. The tests run it on a small model of the same classes, and trace the step of the
full sizes. Every 9B variant of FLUX.2 klein is for non-commercial use only.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from clvr_jax.arguments import StoragePath
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.sharding import MeshConfig
from clvr_jax.tasks import flux2
from clvr_jax.tasks.bundles import check_model_given, no_export
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.objectives.distillation import DistillConfig
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
    reference_cache: Literal["none", "image", "loop"] | None = None
    """Train the student to attend to references like this: as tokens in every step (none), through keys and values that
    are computed once for an image (image), or that are kept for the whole loop (loop). As the teacher does if it is not
    given; it is written into the exported model."""
    dataset: StoragePath = Path("data/trajectories")
    """Train on this dataset of trajectories, a directory that `clvr synth` wrote, also in a bucket."""
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
    check_model_given("flux2_distill", config.model, "a base model")
    pipe = Flux2Pipeline.from_pretrained(config.model, config.train.compute_dtype)
    batches = flux2.trajectory_batches(pipe, config.dataset, config.batch_size, config.train.seed, dropout=0.0)
    return flux2.pipeline_distill_task(
        "distillation of FLUX.2",
        pipe,
        config.train,
        config.distill,
        batches,
        config.remat,
        reference_cache=config.reference_cache,
    )


def abstract_task(config: Config) -> Task:
    """Returns the same task with shapes in place of arrays, to trace, compile and plan its step."""
    models = flux2.Flux2Models.abstract(config.preset, config.train.compute_dtype)
    batches = models.abstract_batches(config.batch_size, config.size, config.references)
    name = f"distillation of {config.preset}"
    return flux2.distill_task(
        name, models, config.train, config.distill, batches, no_export, config.remat, config.reference_cache
    )
