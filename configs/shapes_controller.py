"""The small Qwen3-VL of the shapes world in its two roles: verifier and controller.

As a verifier it derives requirements from a prompt, describes an image that it sees alone, and compares descriptions
with requirements. As a controller it plans and continues conversations in which images are often wrong. Half of the
images it describes are simulated, with objects missing, blurred, mixed or replaced; the others are images of the
generators themselves, labeled by the detector (`clvr_jax.scripts.shapes_images`).

    clvr train configs/shapes_controller.py --out runs/shapes_controller

The shipped controller continues earlier ones (earlier versions of this file say how the first was made). Its vision
tower was deepened and trained alone for 2,933 steps; then the language model was trained alone for 4,100 steps, 2,600
of them by

    clvr train configs/shapes_controller.py --start EARLIER --trained language --kinds prompt comparison prompt
        comparison image prompt comparison prompt conversation --plan-share 0.35 --distractor-share 0.2
        --recolored-share 0.3 --generated-share 0.6 --assembled-share 0.4 --train.steps 2600
        --train.learning-rate 1e-3 --train.muon-learning-rate 4e-3 --train.final-learning-rate 0.02
        --train.warmup 0.02 --train.ema-decay 0.998 --train.seed 5 --out runs/shapes_controller

on two cores that were shared with other work, with the data of commit b41ed44. The shipped weights are the average of
the result (.75) and of the controller before the language model was trained (.25) (`scripts/average_weights.py`): it
compares texts better than the result, and reads prompts better than the controller before.
docs/results/verification.md says what it reaches.
"""

import dataclasses
from pathlib import Path

from clvr_jax.tasks.shapes import ControllerData, controller_task
from clvr_jax.tasks.shapes.controller import Trained
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.trainer import Task, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config(ControllerData):
    """Configuration of the run."""

    train: TrainConfig = TrainConfig(
        steps=6_000,
        learning_rate=1e-3,
        muon_learning_rate=4e-3,
        b2=0.98,
        ema_decay=0.998,
        checkpoint=CheckpointConfig(save_interval_minutes=5),
    )
    """Configuration of the training."""
    tokenizer: Path = Path("runs/shapes_tokenizer")
    """Directory that `clvr_jax/scripts/shapes_tokenizer.py` wrote."""
    vae: Path = Path("runs/shapes_vae/export/vae")
    """Autoencoder, from `configs/shapes_vae.py`."""
    vae_noise: float = 0.15
    """Noise added to their latents, whose scale is 1."""
    start: Path | None = None
    """A controller to continue from; new weights if not given."""
    trained: Trained = "all"
    """Train all weights, those of the vision tower alone (plans, comparisons and replies stay as they are), or all but
    those of the vision tower."""
    deepen_vision: bool = False
    """Insert a block after each block of the vision tower of `start`; the new ones change nothing at first."""


CONFIG = Config()


def task(config: Config) -> Task:
    """Returns the task for the trainer."""
    return controller_task(
        config.tokenizer,
        config.vae,
        config,
        vae_noise=config.vae_noise,
        start=config.start,
        trained=config.trained,
        deepen_vision=config.deepen_vision,
        seed=config.train.seed,
    )
