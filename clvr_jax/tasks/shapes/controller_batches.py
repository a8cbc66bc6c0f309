"""Batches of the small Qwen3-VL of the shapes world: prompts, images, comparisons and conversations."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from clvr_jax.data.preprocessing.conversations import IMAGE_PAD, collate_conversations, supervised_conversation
from clvr_jax.data.preprocessing.qwen3_vl_images import Qwen3VLImageProcessor
from clvr_jax.data.shapes_augmentation import (
    add_noise,
    blur_cells,
    random_canvas,
    resembles_held_out_pair,
    vary_appearance,
)
from clvr_jax.data.shapes_distractors import distractor_image, random_colors, recolor_objects
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
from clvr_jax.errors import ClvrError
from clvr_jax.files.image_io import read_image_arrays
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.models.qwen3_vl.positions import Conversation
from clvr_jax.worlds.shapes.detect import Examination, Reading, detect, examine
from clvr_jax.worlds.shapes.requirements import describe
from clvr_jax.worlds.shapes.scene import COLORS, HELD_OUT_PAIRS

PROCESSOR = Qwen3VLImageProcessor(patch_size=8, min_pixels=64 * 64, max_pixels=64 * 64)
Reconstruct = Callable[[np.ndarray, int], np.ndarray]
"""(images uint8 (n, 64, 64, 3), seed) -> the images after the autoencoder."""
Example = tuple[Conversation, np.ndarray, bool]
"""A conversation, the loss weights of its tokens, and whether color words in it may be replaced, see `Chat`."""
BatchKind = Literal["prompt", "comparison", "image", "conversation", "clarity"]
KINDS: tuple[BatchKind, ...] = (
    *("prompt", "comparison", "image", "prompt", "comparison", "image"),
    *("comparison", "conversation", "prompt", "comparison", "image", "prompt"),
)
"""The kinds of batches in turn."""


@dataclasses.dataclass(frozen=True)
class ControllerData:
    """What the batches of a run contain."""

    images: Path = Path("runs/shapes_images.npz")
    """Images of the generators, from `clvr_jax/scripts/shapes_images.py`."""
    dataset: Path | None = None
    """Conversations of `clvr synth`, in place of simulated ones."""
    kinds: tuple[BatchKind, ...] = KINDS
    """Kinds of batches, in turn. In "clarity" the vision tower alone learns, by how much each object is clear."""
    image_batch: int = 48
    """Descriptions of images in a batch."""
    clarity_batch: int = 96
    """Images in a batch of clarity."""
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
    random_color_share: float = 0.0
    """Share of images in batches of clarity whose objects are given random colors."""
    generated_share: float = 0.4
    """Share of the other images that a generator made; the rest are simulated."""
    assembled_share: float = 0.0
    """Share of the generated images that are assembled from objects of several images, more of them unclear."""
    vae_share: float = 0.4
    """Share of simulated images that pass through the autoencoder."""
    blur_share: float = 0.2
    """Share of simulated images with one or two objects out of focus, labeled by the detector."""
    tint_share: float = 0.5
    """Share of simulated images whose objects have slightly other colors and softer edges."""
    error_rate: float = 0.5
    """Share of the steps of simulated conversations whose image is wrong."""


PARTS = 4
"""Batches that are cut from one pool of texts sorted by length, so that little of a batch is padding."""
ROWS_DECODED = 8
"""Images that pass through the autoencoder in one call."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a kind of batches: rows, what lengths are multiples of, the greatest length, images in a row."""

    rows: int
    multiple: int
    longest: int
    image_slots: int = 0


class ControllerBatches:
    """The batches of a run: a pure function of the step."""

    def __init__(self, config: ControllerData, seed: int, tokenizer: Tokenizer, reconstruct: Reconstruct):
        self._config, self._seed, self._tokenizer, self._reconstruct = config, seed, tokenizer, reconstruct
        self._colors = np.array([tokenizer.encode(f" {color}")[0] for color in COLORS])
        self._answers = np.array([tokenizer.encode(f" {word}")[0] for word in ("yes", "no")])
        self._period = tokenizer.encode(".")[0]
        self._shapes = {
            "image": Shape(config.image_batch, 16, 112, image_slots=1),
            "clarity": Shape(config.clarity_batch, 1, 0, image_slots=1),
            "comparison": Shape(config.comparison_batch, 64, 448),
            "prompt": Shape(config.prompt_batch, 48, 240),
            "conversation": Shape(config.conversation_batch, 96, 672, image_slots=6),
        }
        self._pool = functools.lru_cache(maxsize=2 * len(self._shapes))(self._make_pool)
        self._clarity_pool = functools.lru_cache(maxsize=2)(self._make_clarity_pool)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Returns the batch of a step: of clarity as `_clarity_batch` makes it, of all other kinds as
        `collate_conversations` does, with `target_ids_bt` beside the inputs.
        """
        kinds = self._config.kinds
        kind = kinds[step % len(kinds)]
        turn = step // len(kinds) * kinds.count(kind) + kinds[: step % len(kinds)].count(kind)
        number, part = divmod(turn, PARTS)
        order = np.random.default_rng((self._seed, number)).permutation(PARTS)
        rows = self._shapes[kind].rows
        rng = np.random.default_rng((self._seed, 1, step))
        chosen = slice(order[part] * rows, (order[part] + 1) * rows)
        if kind == "clarity":
            return _clarity_batch(self._clarity_pool(number)[chosen])
        return self._collate(self._pool(kind, number)[chosen], kind, rng)

    def _rng(self, kind: str, number: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, 2, list(self._shapes).index(kind), number))

    def _make_clarity_pool(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        rng = self._rng("clarity", number)
        examined = self._examined_images(rng, PARTS * self._shapes["clarity"].rows)
        return [
            random_colors(image, found, rng)
            if rng.random() < self._config.random_color_share
            else (image, found.clarity)
            for image, found in examined
        ]

    def _make_pool(self, kind: str, number: int) -> list[Example]:
        shape, rng = self._shapes[kind], self._rng(kind, number)
        make = {"image": self._images, "comparison": self._comparisons, "prompt": self._prompts}.get(
            kind, self._conversations
        )
        examples: list[Example] = []
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

    def _weigh_answers(self, conversation: Conversation, weights: np.ndarray) -> None:
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
        for row, (image, examined) in enumerate(self._examined_images(rng, count - distractors)):
            if row % 8 == 0:
                chats.append(question_chat(rng, image, examined.reading))
            elif rng.random() < config.recolored_share:
                chats.append(description_chat(*recolor_objects(image, examined.reading, rng)))
            else:
                chats.append(description_chat(image, describe(examined.reading)))
        return chats

    def _examined_images(self, rng: np.random.Generator, count: int) -> list[tuple[np.ndarray, Examination]]:
        """Samples images of the world, with noise, and what they show; nothing in them resembles a held-out pair."""
        config = self._config
        generated, _ = labeled_images(config.images)
        examined: list[tuple[np.ndarray, Examination]] = []
        while len(examined) < count:
            is_generated = rng.random() < config.generated_share
            if is_generated and rng.random() < config.assembled_share:
                examined.append(assembled_image(rng, patches(config.images)))
                continue
            image = generated[int(rng.integers(len(generated)))] if is_generated else self._simulated(rng)
            # Noise moves objects over the border between clear and unclear, so the image is labeled with its noise.
            noisy = add_noise(image, rng)
            if HELD_OUT_PAIRS.isdisjoint((found := examine(noisy)).pairs):
                examined.append((noisy, found))
        decoded = [row for row in range(count) if rng.random() < config.vae_share * (1 - config.generated_share)]
        for begin in range(0, len(decoded), ROWS_DECODED):
            rows = decoded[begin : begin + ROWS_DECODED]
            shown = self._reconstruct(np.stack([examined[row][0] for row in rows]), int(rng.integers(2**31)))
            for row, image in zip(rows, shown, strict=True):
                if HELD_OUT_PAIRS.isdisjoint((found := examine(image)).pairs):
                    examined[row] = (image, found)
        return examined

    def _simulated(self, rng: np.random.Generator) -> np.ndarray:
        config = self._config
        canvas = random_canvas(rng)
        image = vary_appearance(canvas, rng) if rng.random() < config.tint_share else canvas.render()
        occupied = [item.cell for item in canvas.scene.objects]
        return blur_cells(image, rng, occupied) if occupied and rng.random() < config.blur_share else image

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

    def _collate(self, rows: list[Example], kind: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
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


def _clarity_batch(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the patches of images, pixel_values (b, patches, values), and their clarity_b93, see `Examination`."""
    patches = [PROCESSOR([image])[0] for image, _ in rows]
    return {"pixel_values": np.stack(patches), "clarity_b93": np.stack([clarity for _, clarity in rows])}


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
