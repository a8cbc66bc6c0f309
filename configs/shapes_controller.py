"""The small Qwen3-VL of the shapes world in its two roles: verifier and controller.

As a verifier it derives requirements from a prompt, describes an image that it sees alone, and compares descriptions
with requirements. As a controller it plans and continues conversations in which images are often wrong. Half of the
images it describes are simulated, with objects missing, blurred, mixed or replaced; the others are images of the
generators themselves, labeled by the detector (`clvr_jax.scripts.shapes_images`).

    clvr train configs/shapes_controller.py --out runs/shapes_controller

The shipped controller continues an earlier one (earlier versions of this file say how that was made):

    clvr train configs/shapes_controller.py --start EARLIER --train.steps 2400 --train.learning-rate 1e-3
        --train.muon-learning-rate 4e-3 --train.final-learning-rate 0.5 --train.warmup 0.02 --train.ema-decay 0.998
        --plan-share 0.42 --generated-share 0.55 --kinds image conversation prompt image comparison conversation image
        prompt comparison image conversation prompt comparison --out runs/shapes_controller

which was stopped after 1,160 steps, 43 minutes on two cores that were shared with other work, with the data of commit
3821131. The images were those of `shapes_images`, with 640 more prompts in the loop. The shipped weights are
the average of start and end (`scripts/average_weights.py`), which reads images and compares texts better than both.
docs/verification.md says what it reaches.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clvr_jax.atomic_io import write_json
from clvr_jax.convert.architectures import QWEN3_VL
from clvr_jax.convert.models import load_model, save_model
from clvr_jax.data.conversations import IMAGE_PAD, collate_conversations, supervised_conversation
from clvr_jax.data.qwen3_vl_images import Qwen3VLImageProcessor, processor_to_dict
from clvr_jax.data.shapes_augmentation import (
    add_noise,
    blur_cells,
    random_canvas,
    resembles_held_out_pair,
    vary_appearance,
)
from clvr_jax.data.shapes_distractors import distractor_image, recolor_objects
from clvr_jax.data.shapes_patches import Patches, assembled_image, cut_patches
from clvr_jax.data.shapes_verification import (
    Chat,
    comparisons_chat,
    conversation_chat,
    description_chat,
    plan_chat,
    question_chat,
    recorded_conversations,
    reported_chat,
    requirements_chat,
)
from clvr_jax.data.text import load_tokenizer
from clvr_jax.errors import ClvrError
from clvr_jax.image_io import read_image_arrays
from clvr_jax.models.autoencoder_kl_flux2 import AutoencoderKLFlux2
from clvr_jax.models.qwen3_vl import Qwen3VL, Qwen3VLConfig, Qwen3VLTextConfig
from clvr_jax.models.qwen3_vl_vision import Qwen3VLVisionConfig
from clvr_jax.pipelines.flux2_io import load_vae
from clvr_jax.pipelines.verifier import TRAINED_FOR_LOOP
from clvr_jax.tasks.shapes.sizes import TEXT_ENCODER, TEXT_START
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.expansion import with_identity_blocks
from clvr_jax.training.initialization import scaled
from clvr_jax.training.objectives import next_token_loss
from clvr_jax.training.trainer import Task, TrainConfig
from clvr_jax.worlds.shapes.detect import Reading, detect
from clvr_jax.worlds.shapes.requirements import describe
from clvr_jax.worlds.shapes.scene import COLORS

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
GRID = (1, 64 // PROCESSOR.patch_size, 64 // PROCESSOR.patch_size)


KINDS: tuple[Literal["prompt", "comparison", "image", "conversation"], ...] = (
    *("prompt", "comparison", "image", "prompt", "comparison", "image"),
    *("comparison", "conversation", "prompt", "comparison", "image", "prompt"),
)
"""The kinds of batches in turn."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Configures the run."""

    train: TrainConfig = TrainConfig(
        steps=6_000,
        learning_rate=1e-3,
        muon_learning_rate=4e-3,
        b2=0.98,
        ema_decay=0.998,
        checkpoint=CheckpointConfig(save_interval_minutes=5),
    )
    tokenizer: Path = Path("runs/shapes_tokenizer")
    """Directory that `clvr_jax/scripts/shapes_tokenizer.py` wrote."""
    vae: Path = Path("runs/shapes_vae/export/vae")
    """Autoencoder, from `configs/shapes_vae.py`."""
    images: Path = Path("runs/shapes_images.npz")
    """Images of the generators, from `clvr_jax/scripts/shapes_images.py`."""
    start: Path | None = None
    """A controller to continue from; new weights if not given."""
    trained: Literal["all", "vision"] = "all"
    """Train all weights, or those of the vision tower alone: then plans, comparisons and replies stay as they are."""
    deepen_vision: bool = False
    """Insert a block after each block of the vision tower of `start`; the new ones change nothing at first."""
    dataset: Path | None = None
    """Conversations of `clvr synth`, in place of simulated ones."""
    kinds: tuple[Literal["prompt", "comparison", "image", "conversation"], ...] = KINDS
    """Kinds of batches, in turn."""
    image_batch: int = 48
    """Descriptions of images in a batch."""
    comparison_batch: int = 24
    """Descriptions that requirements are compared with in a batch."""
    comparisons: int = 5
    """Requirements that are compared with each description."""
    answer_weight: float = 12.0
    """Weight of the words yes and no in the loss; the other words have weight 1."""
    prompt_batch: int = 32
    """Plans and lists of requirements in a batch."""
    plan_share: float = 0.4
    """Share of plans in these batches; the others are lists of requirements."""
    conversation_batch: int = 12
    """Conversations in a batch."""
    distractor_share: float = 0.35
    """Share of described images whose objects have colors and shapes that no prompt names."""
    recolored_share: float = 0.0
    """Share of the other images whose objects are given other colors, also such as no prompt names."""
    generated_share: float = 0.4
    """Share of the other images that a generator made; the rest are simulated."""
    assembled_share: float = 0.0
    """Share of the generated images that are assembled from objects of several images, more of them unclear."""
    vae_share: float = 0.4
    """Share of simulated images that pass through the autoencoder."""
    vae_noise: float = 0.15
    """Noise added to their latents, whose scale is 1."""
    blur_share: float = 0.2
    """Share of simulated images with one or two objects out of focus, labeled by the detector."""
    tint_share: float = 0.5
    """Share of simulated images whose objects have slightly other colors and softer edges."""
    error_rate: float = 0.5
    """Share of the steps of simulated conversations whose image is wrong."""


CONFIG = Config()
PARTS = 4
"""Batches that are cut from one pool of texts sorted by length, so that little of a batch is padding."""
ROWS_DECODED = 8


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a kind of batches: rows, what lengths are multiples of, the greatest length, images in a row."""

    rows: int
    multiple: int
    longest: int
    image_slots: int = 0


class Batches:
    """The batches of a run: a pure function of the step."""

    def __init__(self, config: Config, tokenizer: Any, reconstruct: Callable[[np.ndarray, int], np.ndarray]):
        self._config, self._tokenizer, self._reconstruct = config, tokenizer, reconstruct
        self._colors = np.array([tokenizer.encode(f" {color}")[0] for color in COLORS])
        self._answers = np.array([tokenizer.encode(f" {word}")[0] for word in ("yes", "no")])
        self._period = tokenizer.encode(".")[0]
        self._shapes = {
            "image": Shape(config.image_batch, 16, 112, image_slots=1),
            "comparison": Shape(config.comparison_batch, 64, 448),
            "prompt": Shape(config.prompt_batch, 48, 240),
            "conversation": Shape(config.conversation_batch, 96, 672, image_slots=6),
        }
        self._pool = functools.lru_cache(maxsize=2 * len(self._shapes))(self._make_pool)

    def __call__(self, step: int) -> dict[str, Any]:
        """Returns the batch of a step, as `collate_conversations` makes it, with `target_ids_bt` beside the inputs."""
        kinds = self._config.kinds
        kind = kinds[step % len(kinds)]
        turn = step // len(kinds) * kinds.count(kind) + kinds[: step % len(kinds)].count(kind)
        number, part = divmod(turn, PARTS)
        order = np.random.default_rng((self._config.train.seed, number)).permutation(PARTS)
        rows = self._shapes[kind].rows
        rng = np.random.default_rng((self._config.train.seed, 1, step))
        return self._collate(self._pool(kind, number)[order[part] * rows :][:rows], kind, rng)

    def _make_pool(self, kind: str, number: int) -> list[Any]:
        shape = self._shapes[kind]
        rng = np.random.default_rng((self._config.train.seed, 2, list(self._shapes).index(kind), number))
        make = {"image": self._images, "comparison": self._comparisons, "prompt": self._prompts}.get(
            kind, self._conversations
        )
        examples: list[Any] = []
        while len(examples) < PARTS * shape.rows:
            for chat in make(rng, PARTS * shape.rows - len(examples)):
                # The reply before may be wrong, and comparisons share a description: see `shapes_verification`.
                example = supervised_conversation(
                    self._tokenizer, PROCESSOR, chat.messages, chat.images, last_only=kind == "conversation"
                )
                if kind == "comparison":
                    self._weigh_answers(*example)
                if len(example[0].input_ids) <= shape.longest:  # longer ones are rare; others take their places
                    examples.append((*example, chat.is_corruptible))
        return examples if kind == "image" else sorted(examples, key=lambda example: len(example[0].input_ids))

    def _weigh_answers(self, conversation: Any, weights: np.ndarray) -> None:
        """Weighs up the first token of yes and no, which follows the period of the evidence."""
        ids = np.asarray(conversation.input_ids)
        is_answer = (ids[:-1] == self._period) & np.isin(ids[1:], self._answers) & (weights[1:] > 0)
        weights[1:][is_answer] *= self._config.answer_weight

    def _images(self, rng: np.random.Generator, count: int) -> list[Chat]:
        config = self._config
        distractors = int(rng.binomial(count, config.distractor_share))
        chats = []
        for _ in range(distractors):
            image, description = distractor_image(rng)
            chats.append(description_chat(add_noise(image, rng), description))
        for row, (image, reading) in enumerate(self._read_images(rng, count - distractors)):
            noisy, noisy_reading = _with_noise(image, reading, rng)
            if row % 8 == 0:
                chats.append(question_chat(rng, noisy, noisy_reading))
            elif rng.random() < config.recolored_share:
                recolored, description = recolor_objects(image, reading, rng)
                chats.append(description_chat(add_noise(recolored, rng), description))
            else:
                chats.append(description_chat(noisy, describe(noisy_reading)))
        return chats

    def _read_images(self, rng: np.random.Generator, count: int) -> list[tuple[np.ndarray, Reading]]:
        """Samples images of the world and what they show."""
        config = self._config
        generated, readings = labeled_images(config.images)
        pairs: list[tuple[np.ndarray, Reading]] = []
        while len(pairs) < count:
            is_generated = rng.random() < config.generated_share
            if is_generated and rng.random() < config.assembled_share:
                pairs.append(assembled_image(rng, patches(config.images)))
            elif is_generated:
                number = int(rng.integers(len(generated)))
                pairs.append((generated[number], readings[number]))
            else:
                canvas = random_canvas(rng)
                image = vary_appearance(canvas, rng) if rng.random() < config.tint_share else canvas.render()
                pairs.append((image, canvas.reading()))
                occupied = [item.cell for item in canvas.scene.objects]
                if occupied and rng.random() < config.blur_share:
                    image = blur_cells(image, rng, occupied)
                    pairs[-1] = (image, detect(image))
                if resembles_held_out_pair(image):
                    pairs.pop()
        decoded = [row for row in range(count) if rng.random() < config.vae_share * (1 - config.generated_share)]
        for begin in range(0, len(decoded), ROWS_DECODED):
            rows = decoded[begin : begin + ROWS_DECODED]
            shown = self._reconstruct(np.stack([pairs[row][0] for row in rows]), int(rng.integers(2**31)))
            for row, image in zip(rows, shown, strict=True):
                if not resembles_held_out_pair(image):
                    pairs[row] = (image, detect(image))
        return pairs

    def _comparisons(self, rng: np.random.Generator, count: int) -> list[Chat]:
        return [comparisons_chat(rng, self._config.comparisons) for _ in range(count)]

    def _prompts(self, rng: np.random.Generator, count: int) -> list[Chat]:
        share = self._config.plan_share
        return [(plan_chat if rng.random() < share else requirements_chat)(rng) for _ in range(count)]

    def _conversations(self, rng: np.random.Generator, count: int) -> list[Chat]:
        def show(images: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
            if images and rng.random() < self._config.vae_share:
                return list(self._reconstruct(np.stack(images), int(rng.integers(2**31))))
            return images

        if self._config.dataset is None:
            return [conversation_chat(rng, self._config.error_rate, show) for _ in range(count)]
        conversations = recorded(self._config.dataset)
        chosen = [conversations[int(rng.integers(len(conversations)))] for _ in range(count)]
        ends = [int(rng.integers(1, len(replies))) for _, replies, _ in chosen]
        return [
            reported_chat(rng, metadata, replies[: end + 1], images[:end], lambda images: images)
            for (metadata, replies, images), end in zip(chosen, ends, strict=True)
        ]

    def _collate(self, rows: list[Any], kind: str, rng: np.random.Generator) -> dict[str, Any]:
        shape = self._shapes[kind]
        batch = collate_conversations(
            [(conversation, weights) for conversation, weights, _ in rows],
            image_token_id=self._tokenizer.convert_tokens_to_ids(IMAGE_PAD),
            merge=PROCESSOR.merge_size,
            pad_token=self._tokenizer.pad_token_id,
            length_multiple=shape.multiple,
            image_slots=shape.image_slots,
        )
        batch.pop("grid_thw", None)
        ids = batch["input_ids_bt"]
        # A color word that may be wrong says nothing of the shape that follows: the image must be looked at.
        rows_read = np.array([is_corruptible and rng.random() < 0.5 for *_, is_corruptible in rows])[:, None]
        wrong = rows_read & np.isin(ids, self._colors) & (batch["weights_bt"] > 0) & (rng.random(ids.shape) < 0.3)
        read = np.where(wrong, rng.choice(self._colors, ids.shape), ids).astype(ids.dtype)
        return {**batch, "input_ids_bt": read, "target_ids_bt": ids}


def _with_noise(image: np.ndarray, reading: Reading, rng: np.random.Generator) -> tuple[np.ndarray, Reading]:
    """Returns the image with noise, labeled anew: noise moves objects over the border between clear and unclear."""
    noisy = add_noise(image, rng)
    return (image, reading) if resembles_held_out_pair(noisy) else (noisy, detect(noisy))


recorded = functools.cache(recorded_conversations)


@functools.cache
def labeled_images(path: Path) -> tuple[np.ndarray, list[Reading]]:
    """Returns generated images and what the detector reads in them, without those that resemble a held-out pair."""
    try:
        images = np.concatenate([array for _, array in sorted(read_image_arrays(path).items())])
    except (ClvrError, ValueError) as error:  # ValueError: no array, or images of several sizes
        raise ClvrError(
            f"{path}: no generated images ({error}); run python -m clvr_jax.scripts.shapes_images"
        ) from error
    chosen = [index for index, image in enumerate(images) if not resembles_held_out_pair(image)]
    return images[chosen], [detect(images[index]) for index in chosen]


@functools.cache
def patches(path: Path) -> Patches:
    """Returns the objects of the generated images."""
    images, readings = labeled_images(path)
    return cut_patches(list(images), readings)


def reconstruction(vae: AutoencoderKLFlux2, noise: float) -> Callable[[np.ndarray, int], np.ndarray]:
    """Returns a function of images, uint8 (n, 64, 64, 3), and a seed: their reconstructions from noisy latents."""
    graphdef, state = nnx.split(vae)

    @jax.jit
    def decode(state: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        vae = nnx.merge(graphdef, state)
        tokens = vae.encode_tokens(images.astype(jnp.float32) / 127.5 - 1)
        decoded = vae.decode_tokens(tokens + noise * jax.random.normal(key, tokens.shape))
        return jnp.round(jnp.clip(decoded / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)

    def apply(images: np.ndarray, seed: int) -> np.ndarray:
        filled = np.zeros((ROWS_DECODED, *images.shape[1:]), np.uint8)
        filled[: len(images)] = images
        return np.asarray(decode(state, filled, jax.random.key(seed)))[: len(images)]

    return apply


def with_deeper_vision(model: Qwen3VL) -> Qwen3VL:
    """Returns the model with twice as many blocks in its vision tower, which computes the same at first."""
    vision = model.config.vision
    # The features for the language model are taken after the new block, so that they come from it too.
    indexes = tuple(2 * index + 1 for index in vision.deepstack_visual_indexes)
    deeper = dataclasses.replace(vision, depth=2 * vision.depth, deepstack_visual_indexes=indexes)
    config = dataclasses.replace(model.config, vision=deeper)
    graphdef = nnx.split(nnx.eval_shape(lambda: Qwen3VL(config, rngs=nnx.Rngs(0))))[0]
    params = nnx.state(model)
    blocks = params["model"]["visual"]["blocks"]
    params["model"]["visual"]["blocks"] = with_identity_blocks(blocks, (r"attn\.proj\.", r"mlp\.linear_fc2\."))
    deepened: Qwen3VL = nnx.merge(graphdef, params)
    return deepened


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
    if config.start is None:
        graphdef, all_params = nnx.split(Qwen3VL(model_config, rngs=nnx.Rngs(config.train.seed)))
        start = nnx.merge(graphdef, scaled(all_params, TEXT_START))
    else:
        start = load_model(config.start, QWEN3_VL, jnp.float32)
    if config.deepen_vision:
        start = with_deeper_vision(start)
    is_trained = nnx.PathContains("visual") if config.trained == "vision" else nnx.Everything()
    graphdef, params, fixed = nnx.split(start, is_trained, ...)

    def loss(params: Any, frozen: Any, data: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graphdef, params, frozen)
        pixel_values = data.get("pixel_values")
        count = 0 if pixel_values is None else pixel_values.shape[1] // (GRID[1] * GRID[2])
        logits = model(
            data["input_ids_bt"],
            pixel_values,
            (GRID,) * count,
            data["positions_b3t"].swapaxes(0, 1),
            data["attention_mask_bt"],
        )
        mean, metrics = next_token_loss(logits, data["target_ids_bt"], data["weights_bt"])
        kind = "text" if pixel_values is None else "image" if count == 1 else "conversation"
        return mean, {**metrics, f"{kind}_loss": mean}

    def export(ema: Any, directory: Path) -> None:
        model = nnx.merge(graphdef, ema, fixed)
        save_model(directory, model, QWEN3_VL, "float16")
        tokenizer.save_pretrained(str(directory))
        write_json(directory / "preprocessor_config.json", processor_to_dict(PROCESSOR))
        write_json(directory / "clvr.json", {"contract": TRAINED_FOR_LOOP})

    return Task(
        name="shapes controller",
        params=params,
        frozen=fixed,
        loss=loss,
        batches=Batches(config, tokenizer, reconstruction(load_vae(config.vae), config.vae_noise)),
        export=export,
    )
