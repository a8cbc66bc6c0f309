"""The base model of the shapes world learns to sample in 4 steps without guidance instead of 28 with it.

The conditions are those that it and its fine-tuned successor are trained on: prompts, instructions on an image, and
whole histories of up to three images. It has exactly the parameters of its base, so `clvr merge` can add its delta to a
fine-tuned model.

    clvr train configs/shapes_distill.py --out runs/shapes_distill

By the processor time of its steps it takes about 80 minutes on two cores, a tenth of it to compile. The student in the
shipped model is from 1,230 steps of `--train.steps 1500`, when the time on an H200 was over (270 s beside ten other
processes, with everything compiled before); its loss was .021 then.

A model that takes few steps already, such as the merged one, teaches itself to attend to references through caches:
without guidance, in its own steps, under histories with its own images.

    python -m clvr_jax.scripts.shapes_rollouts --model shapes-tiny --tiers 4 5 6 7 8 9 --out runs/rollouts
    clvr train configs/shapes_distill.py --model shapes-tiny --reference-cache loop --distill.guidance 1
        --distill.substeps 1 --distill.start-share 1 --rollouts runs/rollouts --out runs/shapes_cached
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal

from flax import nnx

from clvr_jax.data.shapes_corrections import rollout_examples
from clvr_jax.data.trajectories.dataset import saved_trajectories
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.tasks import flux2
from clvr_jax.tasks.shapes import BASE_KINDS, SETTINGS, SFT_KINDS, Kind, batch, rollout_kinds
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.objectives.distillation import DistillConfig
from clvr_jax.training.trainer import Task, TrainConfig


def _kinds(kinds: tuple[Kind, ...], share: float) -> tuple[Kind, ...]:
    """Scales kinds to a share of all batches, at half their batch size: each image is learned from in four windows."""
    total = sum(kind.share for kind in kinds)
    return tuple(
        dataclasses.replace(kind, share=share * kind.share / total, batch_size=kind.batch_size // 2) for kind in kinds
    )


# Later images are rare, and each number of images is a program to compile.
KINDS = (*_kinds(BASE_KINDS, 0.7), *_kinds(SFT_KINDS[:5], 0.3))


def _kinds_of(rollouts: Path, tokenizer: Tokenizer) -> tuple[Kind, ...]:
    """Returns kinds of which most have the references of these trajectories."""
    examples = rollout_examples(saved_trajectories(rollouts), tokenizer, max(SETTINGS.text_buckets))
    return (*_kinds(BASE_KINDS, 0.15), *_kinds(rollout_kinds(examples, 0.8), 0.85))


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of the run."""

    train: TrainConfig = TrainConfig(
        steps=900,
        learning_rate=5e-4,
        muon_learning_rate=1.5e-3,
        b2=0.98,
        ema_decay=0.99,
        checkpoint=CheckpointConfig(save_interval_minutes=5),
    )
    """Configuration of the training."""
    # 16 steps of the teacher in all: its images are no better in 28.
    distill: DistillConfig = DistillConfig(substeps=4, guidance=SETTINGS.guidance_scale)
    """Configuration of the distillation."""
    model: str = "shapes-tiny-base"
    """Distill this model: a shipped name or a pipeline directory."""
    reference_cache: Literal["none", "image", "loop"] | None = None
    """Train the student to attend to references like this: as tokens in every step (none), through keys and values that
    are computed once for an image (image), or that are kept for the whole loop (loop). As the teacher does if it is not
    given; it is written into the exported model."""
    student: str | None = None
    """Start the student from this model: a shipped name or a pipeline directory; from `model` if it is not given."""
    rollouts: Path | None = None
    """Condition most images on the histories of this directory of trajectories, which `shapes_rollouts` wrote."""


CONFIG = Config()


def task(config: Config) -> Task:
    """Returns the task for the trainer."""
    pipe = Flux2Pipeline.from_pretrained(config.model)
    student = None if config.student is None else nnx.state(Flux2Pipeline.from_pretrained(config.student).transformer)
    kinds = KINDS if config.rollouts is None else _kinds_of(config.rollouts, pipe.tokenizer)
    batches = partial(batch, seed=config.train.seed, tokenizer=pipe.tokenizer, dropout=0.0, kinds=kinds)
    return flux2.pipeline_distill_task(
        "shapes distillation",
        pipe,
        config.train,
        config.distill,
        batches,
        save_dtype="float32",
        reference_cache=config.reference_cache,
        student=student,
    )
