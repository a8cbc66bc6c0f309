"""Full-parameter fine-tuning of FLUX.2 klein on verified trajectories, as the paper does it: 1024 x 1024, rate 2e-5.

clvr train configs/flux2_sft.py --model black-forest-labs/FLUX.2-klein-base-4B --dataset data/trajectories

With `--reference-cache loop` the keys and values of references are kept for the whole loop, so that the cost of an
image hardly grows with their number; all images of a trajectory are then trained on at once.

Wrong images of a trajectory, which a later step corrects, are references of later steps, never targets. Never run on
the real weights: there was no accelerator. The tests run it on `shapes-tiny`, whose models are of the same classes, and
trace the step of the full sizes. Every 9B variant of FLUX.2 klein is for non-commercial use only.
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
from clvr_jax.training.trainer import Task, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config(flux2.FlowMatchingConfig):
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
    reference_cache: Literal["none", "image", "loop"] | None = None
    """Train the model to attend to references like this: as tokens in every step (none), through keys and values that
    are computed once for an image (image), or that are kept for the whole loop (loop). With the last one, all images of
    a trajectory are trained on at once. As the model does if it is not given; it is written into the exported model."""
    dataset: StoragePath = Path("data/trajectories")
    """Train on this dataset of trajectories, a directory that `clvr synth` wrote, also in a bucket."""
    size: int = 1024
    """With `clvr plan` only: plan for images with sides of this many pixels."""
    references: int = 4
    """With `clvr plan` only: plan for this many reference images; with `--reference-cache loop` for trajectories of one
    more image."""


CONFIG = Config()


def task(config: Config) -> Task:
    """Returns the task for the trainer."""
    check_model_given("flux2_sft", config.model, "FLUX.2 klein")
    pipe = Flux2Pipeline.from_pretrained(config.model, config.train.compute_dtype)
    models = flux2.Flux2Models.of(pipe, config.reference_cache)
    is_packed = models.settings.reference_cache == "loop"
    batches = flux2.trajectory_batches(
        pipe, config.dataset, config.batch_size, config.train.seed, config.dropout, is_packed=is_packed
    )
    export = flux2.pipeline_export(pipe, "bfloat16", models.settings)
    return flux2.sft_task(models, config, config.train, batches, export)


def abstract_task(config: Config) -> Task:
    """Returns the same task with shapes in place of arrays, to trace, compile and plan its step."""
    models = flux2.Flux2Models.abstract(
        config.preset, config.train.compute_dtype, reference_cache=config.reference_cache
    )
    if config.reference_cache == "loop":
        batches = models.abstract_packed_batches(config.batch_size, config.size, config.references + 1)
    else:
        batches = models.abstract_batches(config.batch_size, config.size, config.references)
    return flux2.sft_task(models, config, config.train, batches, no_export)
