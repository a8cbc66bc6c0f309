"""A small Stable Diffusion of the shapes world: a UNet and its CLIP text encoder, trained together from random weights.

It generates one or two objects, on the latents of the autoencoder that ships with the package, and is exported as a
`StableDiffusionPipeline` directory.

    clvr train configs/shapes_sd.py --out runs/shapes_sd
    clvr sample "a red circle and a blue star" --model runs/shapes_sd/export
"""

import dataclasses
from pathlib import Path

from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.tasks.shapes import stable_diffusion_task
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.trainer import Task, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of the run."""

    train: TrainConfig = TrainConfig(
        steps=2000,
        learning_rate=2e-3,
        muon_learning_rate=4e-3,
        b2=0.98,
        ema_decay=0.998,
        checkpoint=CheckpointConfig(save_interval_minutes=5),
    )
    """Configuration of the training."""
    vae: Path = SHIPPED / "shapes-tiny" / "vae"
    """Use this autoencoder, a directory with an AutoencoderKLFlux2; the default is the shipped one."""
    batch_size: int = 32
    """Number of images in a step, over all devices."""
    dropout: float = 0.1
    """Replace this fraction of the texts by the empty text, so that the model can be sampled with classifier-free
    guidance."""


CONFIG = Config()


def task(config: Config) -> Task:
    """Returns the task for the trainer."""
    return stable_diffusion_task(
        config.vae, batch_size=config.batch_size, dropout=config.dropout, seed=config.train.seed
    )
