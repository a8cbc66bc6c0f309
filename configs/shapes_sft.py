"""The image generator of the shapes world learns trajectories: supervised fine-tuning of the base transformer.

Every example is one image of a simulated trajectory of the oracle, conditioned on everything before it: the prompt, all
earlier replies, and all earlier images as references, mistakes included. The target shows what the last reply requests.
The text encoder is frozen.

    clvr train configs/shapes_sft.py --out runs/shapes_sft

With `--dataset runs/synth/dataset` the trajectories are verified ones of `clvr synth`. Their wrong images, which were
corrected, are references of later steps, never targets.

Measured for the shipped `shapes-tiny-sft`: with the oracle as controller .98 of the `complex` prompts are right,
and .13 of the base in one shot. Trained on verified trajectories, .88: docs/data-engine.md has both.

Source: arXiv 2605.14876, trajectory-accumulative conditioning.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from clvr_jax.configs.shapes_base import SETTINGS, Kind, batch, drawing_loss
from clvr_jax.data.histories import fit_history
from clvr_jax.data.sft_examples import conversation, target_indices
from clvr_jax.data.shapes import Example, generation_example, simulate_trajectory
from clvr_jax.data.text import load_tokenizer
from clvr_jax.data.trajectory_dataset import TrajectoryDataset
from clvr_jax.image_io import pixels
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2_io import load_text_encoder, load_transformer, load_vae
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.trainer import Task, TrainConfig


def step_example(rng: np.random.Generator, step: int) -> Example:
    """Returns image `step`, from 0, of a trajectory with at least so many images: it has `step` references."""
    # Few trajectories become long, unless much goes wrong in them.
    error_rate = 0.3 if step < 4 else 0.65
    while True:
        trajectory = simulate_trajectory(rng, error_rate=error_rate)
        if len(trajectory.canvases) > step:
            return trajectory.example(step)


# Share and batch size of each step: later ones are rarer and longer.
STEPS = ((0.20, 24), (0.22, 20), (0.20, 16), (0.12, 12), (0.07, 8), (0.04, 8), (0.03, 6), (0.02, 6))
# The plain prompts keep what the base could do in one shot.
PLAIN = Kind(0.10, 24, generation_example)
KINDS = (
    PLAIN,
    *(Kind(share, size, partial(step_example, step=step)) for step, (share, size) in enumerate(STEPS)),
)


def recorded_kinds(examples: Sequence[Example]) -> tuple[Kind, ...]:
    """Returns kinds like KINDS that choose from the given examples by their number of references."""

    def one_of(rng: np.random.Generator, among: Sequence[Example]) -> Example:
        return among[int(rng.integers(len(among)))]

    kinds = [PLAIN]
    for step, (share, size) in enumerate(STEPS):
        if among := [example for example in examples if len(example.references) == step]:
            kinds.append(Kind(share, size, partial(one_of, among=among)))
    return tuple(kinds)


def recorded_examples(dataset: Path, tokenizer: Any) -> list[Example]:
    """The right images of a dataset that `clvr synth` made, each under everything that came before it.

    Histories that are too long for the generator lose their oldest replies, as when it is used.
    Raises: ClvrError if there is no dataset, or too much of it is corrupt.
    """
    examples = []
    for _, record in TrajectoryDataset(dataset).scan():
        replies, images = conversation(record.trajectory)
        shown = tuple(pixels(image) for image in images)
        for place in [place for place in target_indices(record) if place < len(shown)]:
            told = record.trajectory.prompt, replies[: place + 1]
            text = fit_history(tokenizer, *told, max(SETTINGS.text_buckets)).text
            examples.append(Example(text, shown[:place], shown[place]))
    return examples


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
    base: Path = Path("runs/shapes_base/export")
    """Start from this pipeline directory."""
    dataset: Path | None = None
    """Train on this dataset of verified trajectories, a directory that `clvr synth` wrote; trajectories are simulated
    if it is not given."""
    dropout: float = 0.1
    """Replace this fraction of the texts by the empty text, so that the model can be sampled with classifier-free
    guidance."""
    shift: float = 2.5
    """Shift the training timesteps towards noise by this factor, as the sampler's schedule is shifted; 1 leaves them
    uniform."""


CONFIG = Config()


def task(config: Config) -> Task:
    """The run as the trainer takes it."""
    tokenizer = load_tokenizer(config.base / "tokenizer")
    kinds = KINDS if config.dataset is None else recorded_kinds(recorded_examples(config.dataset, tokenizer))
    vae = load_vae(config.base / "vae")
    encoder = load_text_encoder(config.base / "text_encoder")
    transformer_def, transformer = nnx.split(load_transformer(config.base / "transformer"))
    (encoder_def, encoder_state), (vae_def, vae_state) = nnx.split(encoder), nnx.split(vae)

    def loss(params: Any, frozen: Any, data: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        value = drawing_loss(
            nnx.merge(transformer_def, params),
            nnx.merge(encoder_def, frozen["text_encoder"]),
            nnx.merge(vae_def, frozen["vae"]),
            data,
            key,
            config.shift,
        )
        return value, {f"loss_{data['references'].shape[1]}_references": value}

    def export(ema: Any, directory: Path) -> None:
        pipeline = Flux2Pipeline(nnx.merge(transformer_def, ema), vae, encoder, tokenizer, SETTINGS)
        pipeline.save_pretrained(str(directory), dtype="float16")

    return Task(
        name="shapes SFT",
        params=transformer,
        frozen={"text_encoder": encoder_state, "vae": vae_state},
        loss=loss,
        batches=partial(batch, seed=config.train.seed, tokenizer=tokenizer, dropout=config.dropout, kinds=kinds),
        export=export,
    )
