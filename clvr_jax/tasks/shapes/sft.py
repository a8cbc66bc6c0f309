"""Supervised fine-tuning of the small FLUX.2 of the shapes world on trajectories.

Source: arXiv 2605.14876, trajectory-accumulative conditioning.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from clvr_jax.data.preprocessing.histories import fit_history
from clvr_jax.data.preprocessing.text import load_tokenizer
from clvr_jax.data.sft_examples import conversation, target_indices
from clvr_jax.data.shapes import Example, generation_example, simulate_trajectory
from clvr_jax.data.shapes_corrections import rollout_examples
from clvr_jax.data.trajectories.dataset import TrajectoryDataset, saved_trajectories
from clvr_jax.errors import UsageError
from clvr_jax.files.image_io import pixels
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.pipelines.flux2 import Flux2Pipeline, Flux2Settings
from clvr_jax.pipelines.flux2.io import load_text_encoder, load_transformer, load_vae, read_flux2_settings
from clvr_jax.pipelines.flux2.settings import ReferenceMode
from clvr_jax.pipelines.registry import resolve
from clvr_jax.tasks.shapes.base import drawing_loss
from clvr_jax.tasks.shapes.batches import Kind, batch
from clvr_jax.tasks.shapes.sizes import SETTINGS
from clvr_jax.training.trainer import Task
from clvr_jax.trees import Batch, Params


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
SFT_KINDS = (
    PLAIN,
    *(Kind(share, size, partial(step_example, step=step)) for step, (share, size) in enumerate(STEPS)),
)


# Shares for fine-tuning on the generator's own images, most of them with a long history: after three references and
# more, models that were trained with the shares above leave fewer of the other objects unchanged.
LATE_STEPS = ((0.10, 24), (0.12, 20), (0.14, 16), (0.17, 12), (0.16, 8), (0.13, 8), (0.10, 6), (0.08, 6))


def one_of(rng: np.random.Generator, among: Sequence[Example]) -> Example:
    """Samples one of the examples."""
    return among[int(rng.integers(len(among)))]


def rollout_kinds(examples: Sequence[Example], share: float) -> tuple[Kind, ...]:
    """Returns kinds by number of references that mix examples of rollouts with simulated ones.

    Args:
      examples: examples of rollouts; numbers of references that they lack are simulated, and examples with more
        references than `LATE_STEPS` has steps, which `shapes_rollouts` does not make, are left out.
      share: share of the examples that are from rollouts, in [0, 1].
    """

    def sample(rng: np.random.Generator, step: int, among: Sequence[Example]) -> Example:
        return one_of(rng, among) if among and rng.random() < share else step_example(rng, step)

    by_step = [[each for each in examples if len(each.references) == step] for step in range(len(LATE_STEPS))]
    return (
        PLAIN,
        *(
            Kind(frequency, size, partial(sample, step=step, among=by_step[step]))
            for step, (frequency, size) in enumerate(LATE_STEPS)
        ),
    )


def recorded_kinds(examples: Sequence[Example]) -> tuple[Kind, ...]:
    """Returns kinds like `SFT_KINDS` that choose from the given examples by their number of references."""
    kinds = [PLAIN]
    for step, (share, size) in enumerate(STEPS):
        if among := [example for example in examples if len(example.references) == step]:
            kinds.append(Kind(share, size, partial(one_of, among=among)))
    return tuple(kinds)


def recorded_examples(dataset: Path, tokenizer: Tokenizer) -> list[Example]:
    """Returns the right images of a dataset that `clvr synth` made, each under everything that came before it.

    Histories that are too long for the generator lose their oldest replies, as when it is used.
    Raises: ClvrError if there is no dataset, or too much of it is corrupt.
    """
    examples = []
    for _, record in TrajectoryDataset(dataset).scan():
        replies, images = conversation(record.trajectory)
        shown = tuple(pixels(image) for image in images)
        for index in [index for index in target_indices(record) if index < len(shown)]:
            text = fit_history(
                tokenizer, record.trajectory.prompt, replies[: index + 1], max(SETTINGS.text_buckets)
            ).text
            examples.append(Example(text, shown[:index], shown[index]))
    return examples


def sft_task(
    base: str,
    dataset: Path | None,
    rollouts: Path | None = None,
    *,
    rollout_share: float = 0.5,
    reference_cache: ReferenceMode | None = None,
    dropout: float,
    shift: float,
    seed: int,
) -> Task:
    """Returns the task of training the transformer on images of trajectories under everything before them.

    Args:
      base: initial model, a shipped name or a pipeline directory; its text encoder and autoencoder are frozen.
      dataset: of trajectories, that `clvr synth` wrote; None simulates them.
      rollouts: directory of trajectories of the oracle with this generator, mixed with simulated ones; not together
        with `dataset`.
      rollout_share: see `rollout_kinds`.
      reference_cache: how images attend to references, as in the initial model if None. Images are trained on one by
        one, because an image here has 16 tokens, a text some hundred, and those of a trajectory differ in length.
      dropout: fraction of texts that are replaced by the empty text.
      shift: see `sample_timesteps`.
      seed: of the batches.
    Raises: UsageError for both `dataset` and `rollouts`, or a share outside of [0, 1]; ClvrError for a directory
      without trajectories.
    """
    if dataset is not None and rollouts is not None:
        raise UsageError("--dataset and --rollouts: give one of them; both say where the references come from")
    if not 0 <= rollout_share <= 1:
        raise UsageError(f"--rollout-share must be between 0 and 1, got {rollout_share}")
    directory, name = resolve(base)
    tokenizer = load_tokenizer(directory / "tokenizer")
    mode = reference_cache or read_flux2_settings(directory, name, Flux2Settings).reference_cache
    kinds = SFT_KINDS
    if dataset is not None:
        kinds = recorded_kinds(recorded_examples(dataset, tokenizer))
    elif rollouts is not None:
        records = saved_trajectories(rollouts)
        kinds = rollout_kinds(rollout_examples(records, tokenizer, max(SETTINGS.text_buckets)), rollout_share)
    vae = load_vae(directory / "vae")
    encoder = load_text_encoder(directory / "text_encoder")
    transformer_def, transformer = nnx.split(load_transformer(directory / name))
    (encoder_def, encoder_state), (vae_def, vae_state) = nnx.split(encoder), nnx.split(vae)

    settings = dataclasses.replace(SETTINGS, reference_cache=mode)

    def loss(params: Params, frozen: Params, data: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        value = drawing_loss(
            nnx.merge(transformer_def, params),
            nnx.merge(encoder_def, frozen["text_encoder"]),
            nnx.merge(vae_def, frozen["vae"]),
            data,
            key,
            shift,
            mode,
        )
        return value, {f"loss_{data['references'].shape[1]}_references": value}

    def export(ema: Params, directory: Path) -> None:
        pipeline = Flux2Pipeline(nnx.merge(transformer_def, ema), vae, encoder, tokenizer, settings)
        pipeline.save_pretrained(str(directory), dtype="float16")

    return Task(
        name="shapes SFT",
        params=transformer,
        frozen={"text_encoder": encoder_state, "vae": vae_state},
        loss=loss,
        batches=partial(batch, seed=seed, tokenizer=tokenizer, dropout=dropout, kinds=kinds),
        export=export,
    )
