"""Pretraining of the text encoder of the shapes world: it predicts what a text describes, cell by cell.

FLUX.2's Qwen3 understands sentences before a transformer is trained on it. Here the encoder learns to predict the
content of the nine cells; where a text leaves places free, its image shows only a likely one. The prediction head is
discarded, and `configs/shapes_base.py` continues to train the encoder.

    clvr train configs/shapes_text_encoder.py --out runs/shapes_text_encoder

Measured for the shipped weights: 6 minutes on one core; of the objects of 128 new texts that name their places all are
read right. (In that run free choices were random.)
"""

import dataclasses
from pathlib import Path

from clvr_jax.tasks.shapes import text_encoder_task
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.trainer import Task, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of the run."""

    train: TrainConfig = TrainConfig(
        steps=1200, learning_rate=1.5e-3, b2=0.98, ema_decay=0.99, checkpoint=CheckpointConfig(save_interval_minutes=5)
    )
    """Configuration of the training."""
    tokenizer: Path = Path("runs/shapes_tokenizer")
    """Use this tokenizer, a directory that `clvr_jax/scripts/shapes_tokenizer.py` wrote."""


CONFIG = Config()


def task(config: Config) -> Task:
    """Returns the task for the trainer."""
    return text_encoder_task(config.tokenizer, seed=config.train.seed)
