"""The controller of the shapes world: a small Qwen3-VL that plans, looks and says what to correct, from nothing.

It learns the oracle's replies: every other batch holds whole conversations, the rest plans alone, for where to put
things is what it has to think about longest. Most pictures it sees in training are simulated: the drawing that was
asked for, or one with the mistakes a diffusion model makes, some of them as the autoencoder shows them. Later a share
are drawings that the diffusion model really made (`configs/shapes_rollouts.py`).

    clvr train configs/shapes_controller.py --out runs/shapes_controller

With `--dataset runs/shapes_synth/dataset` the conversations are verified ones of `clvr synth`, in which nothing goes
wrong. So the shipped weights were made, with `--train.steps 4000`, from 3,371 trajectories; 195 s on an H200 that other
processes shared. Measured on the 300 `complex` prompts with the fine-tuned drawer in 28 steps: .723. Simulated
trajectories gave .683 after 2,952 of 4,000 steps (the run was stopped), and .627 after 11,000, the last 1,000 of them
with roll-outs, the first 4,045 without plans (paired with the shipped weights: p = .0009); see docs/data-engine.md.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clvr_jax.configs.shapes_base import TEXT_ENCODER, TEXT_START
from clvr_jax.convert.families import QWEN3_VL
from clvr_jax.convert.models import save_model
from flax import nnx

from clvr_jax.data.conversations import IMAGE_PAD, collate_conversations, supervised_conversation
from clvr_jax.data.qwen3_vl_images import Qwen3VLImageProcessor, processor_to_dict
from clvr_jax.data.shapes import recorded_trajectories, simulate_trajectory
from clvr_jax.data.text import load_tokenizer
from clvr_jax.errors import ClvrError
from clvr_jax.files import write_json
from clvr_jax.models.autoencoder_kl_flux2 import AutoencoderKLFlux2
from clvr_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig, Qwen3VLTextConfig
from clvr_jax.models.qwen3_vl_vision import Qwen3VLVisionConfig
from clvr_jax.pipelines.folder import load_vae
from clvr_jax.reasoning.context import chat_messages
from clvr_jax.reasoning.images import pixels
from clvr_jax.reasoning.trajectory import Trajectory
from clvr_jax.training.initialization import scaled
from clvr_jax.training.objectives import next_token_loss
from clvr_jax.training.trainer import Task, TrainConfig
from clvr_jax.worlds.shapes.layout import plan
from clvr_jax.worlds.shapes.oracle import first_reply
from clvr_jax.worlds.shapes.prompts import train_prompt

PROCESSOR = Qwen3VLImageProcessor(patch_size=8, min_pixels=64 * 64, max_pixels=64 * 64)
TEXT = Qwen3VLTextConfig(
    vocab_size=640,
    hidden_size=TEXT_ENCODER.hidden_size,  # TEXT_START is for this width
    intermediate_size=384,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rope_theta=10_000.0,
    mrope_section=(6, 5, 5),
    max_position_embeddings=2048,
)
VISION = Qwen3VLVisionConfig(
    depth=4,
    hidden_size=128,
    intermediate_size=256,
    num_heads=4,
    patch_size=PROCESSOR.patch_size,
    out_hidden_size=TEXT.hidden_size,
    num_position_embeddings=64,
    deepstack_visual_indexes=(1, 2),
)
PLANNED = {"complex": 0.75, "position": 0.15, "counting": 0.1}
GRID = (1, 64 // PROCESSOR.patch_size, 64 // PROCESSOR.patch_size)

Told = tuple[str, Sequence[str], Sequence[np.ndarray]]
"""A trajectory: prompt, replies, and the pictures between them."""


@dataclasses.dataclass(frozen=True)
class Config:
    """tokenizer, vae, rollouts: folders made by their recipes. dataset: of verified trajectories (`clvr synth`) in the
    place of simulated ones and of roll-outs.

    rollouts_from: step at which drawings of the diffusion model join, a `rollout_share` of the trajectories from then
    on. batch_size, plan_batch_size: conversations, or plans, in a batch. error_rate: of simulated drawings. vae_share:
    simulated trajectories whose pictures go through the autoencoder, `vae_noise` added to their latents (whose scale
    is 1).
    """

    train: TrainConfig = TrainConfig(
        steps=11_000, learning_rate=1.5e-3, muon_learning_rate=6e-3, b2=0.98, ema_decay=0.998, save_minutes=5
    )
    tokenizer: Path = Path("runs/shapes_tokenizer")
    vae: Path = Path("runs/shapes_vae/export/vae")
    rollouts: Path = Path("runs/shapes_rollouts")
    dataset: Path | None = None
    rollouts_from: int = 10_000
    rollout_share: float = 0.5
    batch_size: int = 8
    plan_batch_size: int = 32
    error_rate: float = 0.35
    vae_share: float = 0.3
    vae_noise: float = 0.1


CONFIG = Config()
PARTS = 4
"""Batches that are cut from one pool of trajectories sorted by length, so that little of a batch is padding."""


class Conversations:
    """The batches of a run: a pure function of the step."""

    def __init__(self, config: Config, tokenizer: Any, reconstruct: Callable[[np.ndarray, int], np.ndarray]):
        self._config, self._tokenizer, self._reconstruct = config, tokenizer, reconstruct
        self._pool = functools.lru_cache(maxsize=2)(self._make_pool)

    def __call__(self, step: int) -> dict[str, Any]:
        """The batch of a step: as `collate_conversations` makes it, without the grids, which are all GRID."""
        turn, plans = divmod(step, 2)
        if plans:
            rng = np.random.default_rng((self._config.train.seed, 2, step))
            return self._collate([self._plan(rng) for _ in range(self._config.plan_batch_size)])
        number, part = divmod(turn, PARTS)
        # A shuffled order of the parts: otherwise long conversations would come in a rhythm.
        order = np.random.default_rng((self._config.train.seed, number)).permutation(PARTS)
        size = self._config.batch_size
        return self._collate(self._pool(number)[order[part] * size :][:size])

    def _collate(self, examples: list[Any]) -> dict[str, Any]:
        most = max(len(conversation.grid_thw) for conversation, _ in examples)
        batch = collate_conversations(
            examples,
            image_token_id=self._tokenizer.convert_tokens_to_ids(IMAGE_PAD),
            merge=PROCESSOR.merge_size,
            pad_token=self._tokenizer.pad_token_id,
            length_multiple=96,
            image_slots=most + most % 2,
        )
        batch.pop("grid_thw", None)
        return batch

    def _make_pool(self, number: int) -> list[Any]:
        config = self._config
        rng = np.random.default_rng((config.train.seed, 1, number))
        real = 2 * number * PARTS >= config.rollouts_from
        told = [self._told(rng, real) for _ in range(PARTS * config.batch_size)]
        examples = [
            supervised_conversation(
                self._tokenizer, PROCESSOR, chat_messages(prompt, replies, len(replies) - 1), images
            )
            for prompt, replies, images in told
        ]
        return sorted(examples, key=lambda example: len(example[0].input_ids))

    def _plan(self, rng: np.random.Generator) -> Any:
        metadata = train_prompt(rng, PLANNED)
        said = chat_messages(metadata["prompt"], [first_reply(plan(metadata))], 0)
        return supervised_conversation(self._tokenizer, PROCESSOR, said, [])

    def _told(self, rng: np.random.Generator, real: bool) -> Told:
        config = self._config
        if config.dataset is not None:
            return _any(recorded(config.dataset), rng)
        if real and rng.random() < config.rollout_share:
            return _any(rollouts(config.rollouts), rng)
        return self._simulated(rng)

    def _simulated(self, rng: np.random.Generator) -> Told:
        config = self._config
        trajectory = simulate_trajectory(rng, error_rate=config.error_rate, random_plan=False)
        images: Sequence[np.ndarray] = trajectory.canvases
        if rng.random() < config.vae_share:
            images = list(self._reconstruct(np.stack(images), int(rng.integers(2**31))))
        return trajectory.prompt, trajectory.replies, images


def _any(told: Sequence[Told], rng: np.random.Generator) -> Told:
    return told[int(rng.integers(len(told)))]


@functools.cache
def recorded(dataset: Path) -> list[Told]:
    """The trajectories of a dataset."""
    return [(each.prompt, each.replies, each.canvases) for each in recorded_trajectories(dataset)]


@functools.cache
def rollouts(folder: Path) -> list[Told]:
    """The trajectories that `configs/shapes_rollouts.py` wrote."""
    trajectories = [Trajectory.load(path.parent) for path in sorted(folder.glob("*/trajectory.json"))]
    if not trajectories:
        raise ClvrError(f"{folder}: no trajectories; run python -m clvr_jax.configs.shapes_rollouts {folder}")
    told: list[Told] = []
    for trajectory in trajectories:
        images = [pixels(step.image) for step in trajectory.drawings if step.image is not None]
        replies = [step.reasoning + step.action for step in trajectory.steps]
        told.append((trajectory.prompt, replies[: len(images) + 1], images[: len(replies) - 1]))
    return told


def reconstruction(vae: AutoencoderKLFlux2, noise: float) -> Callable[[np.ndarray, int], np.ndarray]:
    """(n, 64, 64, 3) uint8 and a seed -> the same pictures as the autoencoder shows them, latents slightly off."""
    graphdef, state = nnx.split(vae)

    @jax.jit
    def eight(state: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        vae = nnx.merge(graphdef, state)
        tokens = vae.encode_tokens(images.astype(jnp.float32) / 127.5 - 1)
        decoded = vae.decode_tokens(tokens + noise * jax.random.normal(key, tokens.shape))
        return jnp.round(jnp.clip(decoded / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)

    def apply(images: np.ndarray, seed: int) -> np.ndarray:
        filled = np.zeros((8, *images.shape[1:]), np.uint8)
        filled[: len(images)] = images
        return np.asarray(eight(state, filled, jax.random.key(seed)))[: len(images)]

    return apply


def task(config: Config) -> Task:
    """The run as the trainer takes it."""
    tokenizer = load_tokenizer(config.tokenizer)
    model_config = Qwen3VLConfig(
        text=TEXT,
        vision=VISION,
        tie_word_embeddings=False,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_PAD),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    graphdef, params = nnx.split(Qwen3VL(model_config, rngs=nnx.Rngs(config.train.seed)))
    params = scaled(params, TEXT_START)

    def loss(params: Any, frozen: Any, data: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graphdef, params)
        pixel_values = data.get("pixel_values")
        count = 0 if pixel_values is None else pixel_values.shape[1] // (GRID[1] * GRID[2])
        logits = model(
            data["input_ids_bt"],
            pixel_values,
            (GRID,) * count,
            data["positions_b3t"].swapaxes(0, 1),
            data["attention_mask_bt"],
        )
        return next_token_loss(logits, data["input_ids_bt"], data["weights_bt"])

    def export(ema: Any, folder: Path) -> None:
        model = nnx.merge(graphdef, ema)
        save_model(folder, model, QWEN3_VL, "float16")
        tokenizer.save_pretrained(str(folder))
        write_json(folder / "preprocessor_config.json", processor_to_dict(PROCESSOR))

    return Task(
        name="shapes controller",
        params=params,
        frozen={},
        loss=loss,
        batches=Conversations(config, tokenizer, reconstruction(load_vae(config.vae), config.vae_noise)),
        export=export,
    )
