"""The image generator of the shapes world learns trajectories: supervised fine-tuning of the base transformer.

Every example is one image of a simulated trajectory of the oracle, conditioned on everything before it: the prompt, all
earlier replies, and all earlier images as references, mistakes included. The target shows what the last reply requests.
The text encoder is frozen.

    clvr train configs/shapes_sft.py --out runs/shapes_sft

With `--dataset runs/synth/dataset` the trajectories are verified ones of `clvr synth`. Their wrong images, which were
corrected, are references of later steps, never targets.

Simulated references are renderings; those of a loop are the generator's own images. With `--rollouts` a trained model
continues on the latter, most of them with a long history, and on targets that are rendered as requested:

    python -m clvr_jax.scripts.shapes_rollouts --model shapes-tiny --tiers 4 5 6 7 8 9 --out runs/rollouts
    clvr train configs/shapes_sft.py --base shapes-tiny-sft --rollouts runs/rollouts --out runs/shapes_sft_late

Measured for `shapes-tiny-sft` before that: with the oracle as controller .98 of the `complex` prompts are right,
and .13 of the base in one shot. Trained on verified trajectories, .88: docs/how-to/data-engine.md has both.

With 512 rollouts and 560 steps at `--rollout-share 0.6` and half of the learning rates (about 40 minutes on two cores),
and merged as before, 128 loops of the oracle on training prompts (3 to 9 objects, the same prompts and noise) give: of
the objects that are added under three references .91 of 89 (before .83 of 84), under more .88 of 25 (.68 of 31); of the
unclear ones that are replaced under more than three .55 of 49 (.49 of 80); and of the images with more than three .21
of 56 change another object (.29 of 84).

Source: arXiv 2605.14876, trajectory-accumulative conditioning.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from clvr_jax.arguments import StoragePath
from clvr_jax.tasks.shapes import sft_task
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.trainer import Task, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of the run."""

    train: TrainConfig = TrainConfig(
        steps=1200,
        learning_rate=1e-3,
        muon_learning_rate=3e-3,
        b2=0.98,
        ema_decay=0.995,
        checkpoint=CheckpointConfig(save_interval_minutes=5),
    )
    """Configuration of the training."""
    base: str = "runs/shapes_base/export"
    """Start from this model: a shipped name or a pipeline directory."""
    dataset: StoragePath | None = None
    """Train on this dataset of verified trajectories, a directory that `clvr synth` wrote; trajectories are simulated
    if it is not given."""
    rollouts: Path | None = None
    """Mix simulated trajectories with those of this directory, which `shapes_rollouts` wrote."""
    rollout_share: float = 0.5
    """Take this share of the examples from `--rollouts`, between 0 and 1."""
    reference_cache: Literal["none", "image", "loop"] | None = None
    """Train the model to attend to references like this: as tokens in every step (none), through keys and values that
    are computed once for an image (image), or that are kept for the whole loop (loop). As the model does if it is not
    given; it is written into the exported model."""
    dropout: float = 0.1
    """Replace this fraction of the texts by the empty text, so that the model can be sampled with classifier-free
    guidance."""
    shift: float = 2.5
    """Shift the training timesteps towards noise by this factor, as the sampler's schedule is shifted; 1 leaves them
    uniform."""


CONFIG = Config()


def task(config: Config) -> Task:
    """Returns the task for the trainer."""
    return sft_task(
        config.base,
        config.dataset,
        config.rollouts,
        rollout_share=config.rollout_share,
        reference_cache=config.reference_cache,
        dropout=config.dropout,
        shift=config.shift,
        seed=config.train.seed,
    )
