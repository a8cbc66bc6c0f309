"""The autoencoder of the shapes world: 64 x 64 images <-> 16 tokens of 32 channels.

clvr train configs/shapes_vae.py --out runs/shapes_vae
"""

import dataclasses

from clvr_jax.tasks.shapes import vae_task
from clvr_jax.training.trainer import Task, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of the run."""

    train: TrainConfig = TrainConfig(steps=3000, learning_rate=2e-3, weight_decay=0.0, ema_decay=0.998)
    """Configuration of the training."""
    batch_size: int = 32
    """Number of images in a step, over all devices."""
    kl_weight: float = 3e-3
    """Weight of the KL divergence of the posterior from a unit normal, in nats for each pixel value."""
    statistics: int = 4096
    """Compute the statistics that normalize the latents over this many images."""


CONFIG = Config()


def task(config: Config) -> Task:
    """Returns the task for the trainer."""
    return vae_task(
        batch_size=config.batch_size,
        kl_weight=config.kl_weight,
        statistics=config.statistics,
        seed=config.train.seed,
    )
