"""The base model of the shapes world: a FLUX.2 transformer and its Qwen3 text encoder, trained together: the
transformer from random weights, the encoder from a pretrained one (`configs/shapes_text_encoder.py`).

It generates images from prompts and from the reply of a first step, and edits an image by instruction, also where the
instruction ends a long conversation: later stages freeze the text encoder. It is not trained on histories of images.

    clvr train configs/shapes_base.py --out runs/shapes_base

Measured for the shipped weights, 32 training prompts of a kind, 28 steps, guidance 1.7: one to three objects with their
places and single objects 1.00 right, two objects .97, edits .94, 3 to 6 objects .13; 85 minutes on one core. (For its
first 4,380 steps free choices were random: at step 3,480 single objects were .34 right, two objects .00.)
"""

import dataclasses
from pathlib import Path

from clvr_jax.tasks.shapes import base_task
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.trainer import Task, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of the run."""

    train: TrainConfig = TrainConfig(
        steps=6500,
        learning_rate=3e-3,
        muon_learning_rate=8e-3,
        b2=0.98,
        ema_decay=0.998,
        checkpoint=CheckpointConfig(save_interval_minutes=5),
    )
    """Configuration of the training."""
    vae: Path = Path("runs/shapes_vae/export/vae")
    """Use this autoencoder, a directory that `configs/shapes_vae.py` exported."""
    tokenizer: Path = Path("runs/shapes_tokenizer")
    """Use this tokenizer, a directory that `clvr_jax/scripts/shapes_tokenizer.py` wrote."""
    text_encoder: Path = Path("runs/shapes_text_encoder/export/text_encoder")
    """Start the text encoder from this one, a directory that `configs/shapes_text_encoder.py` exported."""
    dropout: float = 0.1
    """Replace this fraction of the texts by the empty text, so that the model can be sampled with classifier-free
    guidance."""
    shift: float = 2.5
    """Shift the training timesteps towards noise by this factor, as the sampler's schedule is shifted; 1 leaves them
    uniform."""


CONFIG = Config()


def task(config: Config) -> Task:
    """Returns the task for the trainer."""
    return base_task(
        config.vae,
        config.tokenizer,
        config.text_encoder,
        dropout=config.dropout,
        shift=config.shift,
        seed=config.train.seed,
    )
