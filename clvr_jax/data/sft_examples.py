"""Training examples from trajectories: images for the diffusion model, conversations for the controller.

Steps that were rolled back are part of no example, neither as target nor as history. A wrong image is history, never a
target of the diffusion model; the verdict on it and the correction are targets of the controller.
Source: arXiv 2605.14876, supervised fine-tuning and trajectory-accumulative conditioning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import jax
import numpy as np

from clvr_jax.data.batch_plan import Bucket, length_bounds
from clvr_jax.data.preprocessing.chat_templates import render_chats, without_control_tokens
from clvr_jax.data.preprocessing.conversations import (
    IMAGE_PAD,
    collate_conversations,
    supervised_conversation,
    supervised_tokens,
)
from clvr_jax.data.preprocessing.histories import FittedHistory, fit_history
from clvr_jax.data.preprocessing.qwen3_vl_images import Qwen3VLImageProcessor
from clvr_jax.data.preprocessing.text import bucket_for, encode_prompts
from clvr_jax.data.trajectories.dataset import TrajectoryDataset
from clvr_jax.data.trajectories.record import TrajectoryRecord
from clvr_jax.display.console import console
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.image_io import ImageLike, as_pil, pixels
from clvr_jax.interfaces import Message
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.reasoning.conversation.actions import IMAGE_GEN, TERMINATE
from clvr_jax.reasoning.conversation.context import chat_messages
from clvr_jax.reasoning.trajectories.trajectory import Trajectory, Verdict
from clvr_jax.trees import Batch


@dataclass(frozen=True)
class Sample:
    """The position of an example in a dataset, and its shape.

    Attributes:
      record: index of the record in the dataset.
      id: id of that record.
      step: index of the target among the images of the record.
      shape: further values that must be equal in a batch.
      length: number of tokens.
      padded: number of tokens with padding.
      learned: number of tokens with loss; the size for a batch of its bucket.
    """

    record: int
    id: str
    step: int
    shape: Bucket
    length: int
    padded: int = 0
    learned: int = 0

    @property
    def bucket(self) -> Bucket:
        """The key of samples that may share a batch: they have the same shapes after padding."""
        return (*self.shape, self.padded)


@jax.tree_util.register_static
class StaticGrids(tuple[tuple[int, int, int], ...]):
    """Image grids as static data of a batch: a pytree without leaves, so that steps are compiled for each value."""


class Examples(Protocol):
    """Samples with known shapes, which are loaded as batches.

    Attributes:
      samples: all samples.
    """

    samples: tuple[Sample, ...]

    def batch(self, samples: Sequence[Sample], rngs: Sequence[np.random.Generator]) -> Batch:
        """Loads a batch.

        Args:
          samples: samples of one bucket.
          rngs: one random generator for each sample.
        """


def padding_share(samples: Sequence[Sample]) -> float:
    """Returns the share of padding among the tokens of all samples, in [0, 1]."""
    return 1 - sum(min(sample.length, sample.padded) for sample in samples) / sum(sample.padded for sample in samples)


class GenerationExamples:
    """Examples for the diffusion model: each right image of a trajectory, conditioned on all previous steps.

    The text has the prompt and all replies so far, with marks for the earlier images, which are the references. The
    target is the image of the step.

    Attributes:
      samples: one sample for each right image.
      left_out: number of samples without their oldest replies.

    Args:
      dataset: the trajectories; the images of a trajectory must have one size.
      tokenizer: tokenizer of the text encoder.
      dropout: share of texts, in [0, 1], that are replaced by the empty text, for classifier-free guidance; the
        references stay.
      text_buckets: lengths to which texts are padded, each to the smallest that holds it; a history that is longer
        loses its oldest replies, as in the pipeline. () chooses the fewest lengths that keep padding below
        `max_padding`, multiples of 8 if possible.
      max_padding: share of padding for `text_buckets` = (), in [0, 1).
      max_corrupt: see `TrajectoryDataset.scan`.
    Raises: UsageError for a dropout outside of [0, 1]; ClvrError if there is no image, images differ in size, or a
      prompt with its instruction is longer than all buckets.
    """

    def __init__(
        self,
        dataset: TrajectoryDataset,
        tokenizer: Tokenizer,
        *,
        dropout: float = 0.1,
        text_buckets: Sequence[int] = (),
        max_padding: float = 0.1,
        max_corrupt: int = 16,
    ):
        if not 0 <= dropout <= 1:
            raise UsageError(f"generation examples: dropout must be in [0, 1], got {dropout}")
        self._dataset, self._tokenizer, self._dropout = dataset, tokenizer, dropout
        self._limit = max(text_buckets, default=None)
        self.left_out = 0
        samples = [
            Sample(number, record.id, step, (step, *size), length)
            for number, record in dataset.scan(max_corrupt)
            for size in [_image_size(record.id, record.trajectory)]
            for step, length in zip(target_indices(record), self._lengths(record), strict=True)
        ]
        self.samples = _padded(dataset, samples, text_buckets, max_padding, multiple=8)
        if self.left_out:
            console.print(
                f"{dataset.directory}: {self.left_out} of {len(samples)} histories are longer than {self._limit} "
                "tokens; their oldest replies are left out"
            )

    def _lengths(self, record: TrajectoryRecord) -> list[int]:
        fitted = [self._fitted(record.id, record.trajectory, step) for step in target_indices(record)]
        self.left_out += sum(history.left_out > 0 for history in fitted)
        return [history.length for history in fitted]

    def _fitted(self, name: str, trajectory: Trajectory, step: int) -> FittedHistory:
        """Returns the conditioning text of image `step`."""
        replies, _ = _history(trajectory)
        try:
            return fit_history(self._tokenizer, trajectory.prompt, replies[: step + 1], self._limit)
        except ClvrError as error:
            raise ClvrError(f"trajectory {name}, image {step}: {error}") from error

    def batch(self, samples: Sequence[Sample], rngs: Sequence[np.random.Generator]) -> dict[str, np.ndarray]:
        """Returns ids and mask (b, t) int32, references (b, r, h, w, 3) and target (b, h, w, 3) uint8."""
        ids, mask = self.encode(
            [self.text(sample, rng) for sample, rng in zip(samples, rngs, strict=True)], samples[0].padded
        )
        drawn = np.stack([self.images(sample) for sample in samples])
        return {"ids": ids, "mask": mask, "references": drawn[:, :-1], "target": drawn[:, -1]}

    def text(self, sample: Sample, rng: np.random.Generator) -> str:
        """Returns the conditioning text of a sample, or the empty text with the probability of `dropout`."""
        text = self._fitted(sample.id, self._dataset[sample.record].trajectory, sample.step).text
        return "" if rng.random() < self._dropout else text

    def images(self, sample: Sample) -> np.ndarray:
        """Returns the images up to and including the target, uint8 (step + 1, h, w, 3)."""
        _, shown = _history(self._dataset[sample.record].trajectory)
        return np.stack(_decoded(sample, shown[: sample.step + 1]))

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and mask of texts, padded to the length, (texts, length) int32."""
        return encode_prompts(self._tokenizer, list(texts), (length,))


class PackedExamples:
    """Examples for the diffusion model with all target images of a trajectory at once, which share their references.

    They are for models with `reference_cache` "loop", whose references depend on earlier references only. Targets whose
    texts are padded to different lengths are in different samples, because padding is part of the condition.

    Attributes:
      samples: one sample for each trajectory and length of its texts; the step is that of the last target.

    Args:
      examples: the single target images.
    """

    def __init__(self, examples: GenerationExamples):
        self._examples = examples
        self._targets: dict[tuple[int, int], list[Sample]] = {}
        for sample in examples.samples:
            self._targets.setdefault((sample.record, sample.padded), []).append(sample)
        self.samples = tuple(
            replace(
                targets[-1],
                shape=(len(targets), *targets[-1].shape),
                length=max(target.length for target in targets),
            )
            for targets in self._targets.values()
        )

    def batch(self, samples: Sequence[Sample], rngs: Sequence[np.random.Generator]) -> dict[str, np.ndarray]:
        """Returns a batch of b trajectories with n targets and r references each, all int32 but the images.

        ids and mask (b, n, s); target (b, n, h, w, 3) and references (b, r, h, w, 3), uint8; seen (b, n), the number of
        references of each target.
        """
        rows = [self._targets[sample.record, sample.padded] for sample in samples]
        texts = [self._examples.text(each, rng) for row, rng in zip(rows, rngs, strict=True) for each in row]
        encoded = self._examples.encode(texts, samples[0].padded)
        ids, mask = (array.reshape(len(rows), len(rows[0]), -1) for array in encoded)
        seen = np.array([[target.step for target in row] for row in rows], np.int32)
        images = [self._examples.images(row[-1]) for row in rows]
        return {
            "ids": ids,
            "mask": mask,
            "references": np.stack([shown[:-1] for shown in images]),
            "target": np.stack([shown[steps] for shown, steps in zip(images, seen, strict=True)]),
            "seen": seen,
        }


class ConversationExamples:
    """Examples for the controller: each trajectory is one conversation with loss on the assistant's turns.

    Reasoning, verdicts on wrong images, corrections and actions all have loss. A verification example has loss on its
    last turn only, the verdict on its latest image.

    Attributes:
      samples: one sample for each conversation.

    Args:
      dataset: the trajectories. Those without replies make no sample; a last image without a reply is left out.
      tokenizer, image_processor: of the controller.
      verification: the split of verification examples; None for none.
      system: optional system prompt, see `chat_messages`.
      max_padding, length_multiple: conversations are padded to the fewest lengths that keep the share of padding below
        `max_padding`, multiples of `length_multiple` if possible.
      max_corrupt: see `TrajectoryDataset.scan`.
    Raises: ClvrError if there is no conversation.
    """

    def __init__(
        self,
        dataset: TrajectoryDataset,
        tokenizer: Tokenizer,
        image_processor: Qwen3VLImageProcessor,
        *,
        verification: TrajectoryDataset | None = None,
        system: str | None = None,
        max_padding: float = 0.1,
        length_multiple: int = 32,
        max_corrupt: int = 16,
    ):
        self._dataset, self._verification = dataset, verification
        self._tokenizer, self._image_processor, self._system = tokenizer, image_processor, system
        samples = [
            Sample(first + number, record.id, 0, (grids,), length, learned=learned)
            for first, split in ((0, dataset), (len(dataset), verification))
            if split is not None
            for number, record in split.scan(max_corrupt)
            for grids, length, learned in self._shapes(record)
        ]
        samples = list(_padded(dataset, samples, (), max_padding, length_multiple))
        most: dict[Bucket, int] = {}
        for sample in samples:
            most[sample.bucket] = max(sample.learned, most.get(sample.bucket, 0))
        self.samples = tuple(
            replace(sample, learned=-(-most[sample.bucket] // length_multiple) * length_multiple) for sample in samples
        )

    def _record(self, number: int) -> TrajectoryRecord:
        """Returns record `number`; verification examples come after the trajectories."""
        if self._verification is not None and number >= len(self._dataset):
            return self._verification[number - len(self._dataset)]
        return self._dataset[number]

    def _shapes(self, record: TrajectoryRecord) -> Iterator[tuple[tuple[tuple[int, int, int], ...], int, int]]:
        """Yields the patch grids, the number of tokens and the number with loss, if the record has a conversation."""
        replies, images = record_conversation(record)
        if not replies:
            return
        processor = self._image_processor
        sides = [processor.resized(height, width) for height, width in map(_size, images)]
        grids = tuple((1, rows // processor.patch_size, columns // processor.patch_size) for rows, columns in sides)
        messages = self._messages(record.trajectory.prompt, replies)
        (text,) = render_chats(self._tokenizer, [without_control_tokens(messages)])
        shown = sum(rows * columns // processor.merge_size**2 for _, rows, columns in grids)
        ids, weights = supervised_tokens(self._tokenizer, text, last_only=record.is_verification)
        yield grids, len(ids) - len(images) + shown, int(weights.sum())

    def batch(self, samples: Sequence[Sample], rngs: Sequence[np.random.Generator]) -> Batch:
        """Returns the dict of `collate_conversations`, with grid_thw, which is equal for all rows, as `StaticGrids`.

        It also has learned_bk (b, k) int32: the positions of tokens with loss in order, padded with 0, a position that
        never has loss.
        """
        conversations = []
        for sample in samples:
            record = self._record(sample.record)
            replies, images = record_conversation(record)
            messages = self._messages(record.trajectory.prompt, replies)
            shown = _decoded(sample, images)
            conversations.append(
                supervised_conversation(
                    self._tokenizer, self._image_processor, messages, shown, last_only=record.is_verification
                )
            )
        batch = collate_conversations(
            conversations,
            image_token_id=self._tokenizer.convert_tokens_to_ids(IMAGE_PAD),
            merge=self._image_processor.merge_size,
            pad_token=self._tokenizer.pad_token_id,
            length_multiple=samples[0].padded,
        )
        if "grid_thw" in batch:
            batch["grid_thw"] = StaticGrids(batch["grid_thw"])
        learned = np.zeros((len(samples), samples[0].learned), np.int32)
        for row, weights in zip(learned, batch["weights_bt"], strict=True):
            found = np.flatnonzero(weights)
            row[: len(found)] = found
        return {**batch, "learned_bk": learned}

    def _messages(self, prompt: str, replies: Sequence[str]) -> list[Message]:
        return chat_messages(prompt, replies, len(replies) - 1, self._system)


def _history(trajectory: Trajectory) -> tuple[list[str], list[ImageLike]]:
    """Returns the replies that led to an image, and the images, without steps that were rolled back."""
    kept = [(step.reasoning + step.action, step.image) for step in trajectory.generated if not step.rolled_back]
    return [reply for reply, _ in kept], [image for _, image in kept if image is not None]


def target_indices(record: TrajectoryRecord) -> list[int]:
    """Returns the targets of the diffusion model, as indices among the images that were not rolled back."""
    kept = [
        number for number, step in enumerate(record.trajectory.steps) if step.image is not None and not step.rolled_back
    ]
    return [index for index, number in enumerate(kept) if number in record.generator_targets]


def record_conversation(record: TrajectoryRecord) -> tuple[list[str], list[ImageLike]]:
    """Returns the replies of a record and the images between them; a verification example ends with its verdict."""
    if not record.is_verification:
        return conversation(record.trajectory)
    replies, images = _history(record.trajectory)
    verdict = record.trajectory.steps[-1].verdict
    assert verdict is not None
    return [*replies, verdict_reply(verdict)], images


def verdict_reply(verdict: Verdict) -> str:
    """Returns the reply that gives a verdict: it asks for a correction if something is unmet, else it stops."""
    return verdict.reasoning + (IMAGE_GEN if verdict.unmet else TERMINATE)


def conversation(trajectory: Trajectory) -> tuple[list[str], list[ImageLike]]:
    """Returns all replies, whether the last one terminates or not, and the images between them."""
    replies, images = _history(trajectory)
    if trajectory.steps and trajectory.steps[-1].action == TERMINATE:
        replies.append(trajectory.steps[-1].reasoning + TERMINATE)
    return replies, images[: max(len(replies) - 1, 0)]


def _size(image: ImageLike) -> tuple[int, int]:
    """Returns height and width in pixels, without decoding."""
    return image.shape[:2] if isinstance(image, np.ndarray) else (as_pil(image).height, as_pil(image).width)


def _image_size(name: str, trajectory: Trajectory) -> tuple[int, ...]:
    sizes = sorted({_size(image) for image in _history(trajectory)[1]})
    if len(sizes) > 1:
        found = ", ".join(f"{width} x {height}" for height, width in sizes)
        raise ClvrError(f"trajectory {name}: images of {found} pixels; all images of a trajectory must have one size")
    return sizes[0] if sizes else ()


def _decoded(sample: Sample, images: Sequence[ImageLike]) -> list[np.ndarray]:
    try:
        return [pixels(image) for image in images]
    except ClvrError as error:
        raise ClvrError(f"trajectory {sample.id}, record {sample.record}: broken image ({error})") from error


def _padded(
    dataset: TrajectoryDataset, samples: Sequence[Sample], bounds: Sequence[int], max_padding: float, multiple: int
) -> tuple[Sample, ...]:
    """Returns the samples with padded lengths: the smallest of `bounds` that holds them; () chooses the bounds."""
    if not samples:
        raise ClvrError(f"{dataset.directory}: no training example in {len(dataset)} trajectories")
    bounds = bounds or length_bounds([sample.length for sample in samples], max_padding, multiple)
    return tuple(replace(sample, padded=bucket_for(sample.length, bounds)) for sample in samples)
