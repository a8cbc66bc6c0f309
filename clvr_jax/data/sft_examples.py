"""Trajectories as training examples: drawings for the diffusion model, conversations for the controller.

What was rolled back is part of no example: neither a target nor history. A wrong image is history, never a target of
the diffusion model; the verdict on it and the correction are targets of the controller.
Source: arXiv 2605.14876, supervised fine-tuning and trajectory-accumulative conditioning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import numpy as np

from clvr_jax.console import console
from clvr_jax.data.batch_plan import length_bounds
from clvr_jax.data.conversations import IMAGE_PAD, collate_conversations, supervised_conversation, supervised_tokens
from clvr_jax.data.histories import FittedHistory, fit_history
from clvr_jax.data.qwen3_vl_images import Qwen3VLImageProcessor
from clvr_jax.data.text import bucket_for, encode_prompts
from clvr_jax.data.trajectory_dataset import TrajectoryDataset
from clvr_jax.data.trajectory_record import TrajectoryRecord
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.image_io import ImageLike, as_pil, pixels
from clvr_jax.reasoning.actions import IMAGE_GEN, TERMINATE
from clvr_jax.reasoning.context import chat_messages
from clvr_jax.reasoning.trajectory import Trajectory, Verdict


@dataclass(frozen=True)
class Sample:
    """Where an example lies in a dataset, and its shape.

    record: number in the dataset. id: of that record. step: which of its pictures is the target, from 0.
    shape: what else must be equal in a batch. length: tokens. padded: tokens with padding. learned: tokens that are
    learned to be said, room for the most that a sample of its bucket has.
    """

    record: int
    id: str
    step: int
    shape: tuple[Any, ...]
    length: int
    padded: int = 0
    learned: int = 0

    @property
    def bucket(self) -> tuple[Any, ...]:
        """Samples of one bucket make batches of one shape."""
        return (*self.shape, self.padded)


@jax.tree_util.register_static
class StaticGrids(tuple[tuple[int, int, int], ...]):
    """Image grids as part of a batch's shape: for JAX a node without arrays, so a step is compiled for them."""


class Examples(Protocol):
    """Samples known by their shapes, and what makes a batch of those that share a bucket."""

    samples: tuple[Sample, ...]

    def batch(self, samples: Sequence[Sample], rngs: Sequence[np.random.Generator]) -> dict[str, Any]:
        """Reads the samples, all of one bucket, each with a generator of its own."""


def padding_share(samples: Sequence[Sample]) -> float:
    """Share of padding among the tokens of all samples, in [0, 1]."""
    return 1 - sum(min(sample.length, sample.padded) for sample in samples) / sum(sample.padded for sample in samples)


class GenerationExamples:
    """Every right drawing of a trajectory under all that came before it: n right pictures make n samples.

    The text holds the prompt and all replies so far, earlier pictures as marks; these are the references. The target
    is the picture that was drawn.

    Args:
      dataset: the pictures of a trajectory must be of one size.
      tokenizer: of the text encoder.
      dropout: share of texts replaced by the empty one, for guidance. The references stay.
      text_buckets: lengths that texts are padded to, each to its own, as the pipeline does; a history that is longer
        loses its oldest replies, as in the pipeline. () chooses the fewest that keep padding under `max_padding`,
        multiples of 8 where that is possible.
      max_corrupt: see `TrajectoryDataset.scan`.
    Raises: UsageError for a dropout outside of [0, 1]; ClvrError if there is no drawing, pictures differ in size, or a
      prompt with its instruction is longer than all buckets.

    left_out: how many samples are without their oldest replies.
    """

    def __init__(
        self,
        dataset: TrajectoryDataset,
        tokenizer: Any,
        *,
        dropout: float = 0.1,
        text_buckets: Sequence[int] = (),
        max_padding: float = 0.1,
        max_corrupt: int = 16,
    ):
        if not 0 <= dropout <= 1:
            raise UsageError(f"drawing examples: dropout must lie in [0, 1], got {dropout}")
        self._dataset, self._tokenizer, self._dropout = dataset, tokenizer, dropout
        self._limit = max(text_buckets, default=None)
        self.left_out = 0
        samples = [
            Sample(number, record.id, step, (step, *size), length)
            for number, record in dataset.scan(max_corrupt)
            for size in [_picture_size(record.id, record.trajectory)]
            for step, length in zip(target_indices(record), self._lengths(record), strict=True)
        ]
        self.samples = _padded(dataset, samples, text_buckets, max_padding, multiple=8)
        if self.left_out:
            console.print(
                f"{dataset.folder}: {self.left_out} of {len(samples)} histories are longer than {self._limit} tokens; "
                "their oldest replies are left out"
            )

    def _lengths(self, record: TrajectoryRecord) -> list[int]:
        fitted = [self._fitted(record.id, record.trajectory, step) for step in target_indices(record)]
        self.left_out += sum(history.left_out > 0 for history in fitted)
        return [history.length for history in fitted]

    def _fitted(self, name: str, trajectory: Trajectory, step: int) -> FittedHistory:
        """The text of image `step`."""
        replies, _ = _history(trajectory)
        try:
            return fit_history(self._tokenizer, trajectory.prompt, replies[: step + 1], self._limit)
        except ClvrError as error:
            raise ClvrError(f"trajectory {name}, image {step}: {error}") from error

    def batch(self, samples: Sequence[Sample], rngs: Sequence[np.random.Generator]) -> dict[str, np.ndarray]:
        """ids and mask (b, t) int32, references (b, r, h, w, 3) and target (b, h, w, 3) uint8."""
        texts, pictures = [], []
        for sample, rng in zip(samples, rngs, strict=True):
            trajectory = self._dataset[sample.record].trajectory
            _, shown = _history(trajectory)
            text = self._fitted(sample.id, trajectory, sample.step).text
            texts.append("" if rng.random() < self._dropout else text)
            pictures.append(np.stack(_decoded(sample, shown[: sample.step + 1])))
        ids, mask = encode_prompts(self._tokenizer, texts, (samples[0].padded,))
        drawn = np.stack(pictures)
        return {"ids": ids, "mask": mask, "references": drawn[:, :-1], "target": drawn[:, -1]}


class ConversationExamples:
    """Every trajectory as one conversation; what the assistant says in it is learned, reasoning and actions.

    Verdicts on wrong images and corrections are learned as everything else. Of a verification example only the last
    turn is learned, the verdict on its latest image.

    Args:
      dataset: trajectories in which nothing was said make no sample. A last picture that nothing was said about is
        left out.
      tokenizer, image_processor: of the controller.
      verification: the split of verification examples, to be learned as well; None for none.
      system: optional system prompt, see `chat_messages`.
      max_padding, length_multiple: conversations are padded to the fewest lengths that keep padding under this share,
        multiples of `length_multiple` where that is possible.
      max_corrupt: see `TrajectoryDataset.scan`.
    Raises: ClvrError if there is no conversation.
    """

    def __init__(
        self,
        dataset: TrajectoryDataset,
        tokenizer: Any,
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
        most: dict[tuple[Any, ...], int] = {}
        for sample in samples:
            most[sample.bucket] = max(sample.learned, most.get(sample.bucket, 0))
        self.samples = tuple(
            replace(sample, learned=-(-most[sample.bucket] // length_multiple) * length_multiple) for sample in samples
        )

    def _record(self, number: int) -> TrajectoryRecord:
        """Record `number`; verification examples are counted after the trajectories."""
        if self._verification is not None and number >= len(self._dataset):
            return self._verification[number - len(self._dataset)]
        return self._dataset[number]

    def _shapes(self, record: TrajectoryRecord) -> Iterator[tuple[tuple[tuple[int, int, int], ...], int, int]]:
        """The patch grids, the number of tokens and of learned ones of the conversation, if there is one."""
        replies, pictures = record_conversation(record)
        if not replies:
            return
        processor = self._image_processor
        sides = [processor.resized(height, width) for height, width in map(_size, pictures)]
        grids = tuple((1, rows // processor.patch_size, columns // processor.patch_size) for rows, columns in sides)
        messages = self._messages(record.trajectory.prompt, replies)
        text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        shown = sum(rows * columns // processor.merge_size**2 for _, rows, columns in grids)
        ids, weights = supervised_tokens(self._tokenizer, text, last_only=record.is_verification)
        yield grids, len(ids) - len(pictures) + shown, int(weights.sum())

    def batch(self, samples: Sequence[Sample], rngs: Sequence[np.random.Generator]) -> dict[str, Any]:
        """What `collate_conversations` returns, grid_thw, the same for all rows of a bucket, as `StaticGrids`.

        And learned_bk (b, k) int32: which tokens are learned, in order, then 0, which never is.
        """
        conversations = []
        for sample in samples:
            record = self._record(sample.record)
            replies, pictures = record_conversation(record)
            messages = self._messages(record.trajectory.prompt, replies)
            shown = _decoded(sample, pictures)
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

    def _messages(self, prompt: str, replies: Sequence[str]) -> list[dict[str, Any]]:
        return chat_messages(prompt, replies, len(replies) - 1, self._system)


def _history(trajectory: Trajectory) -> tuple[list[str], list[ImageLike]]:
    """Replies that led to a picture, and the pictures, without those that were rolled back."""
    kept = [(step.reasoning + step.action, step.image) for step in trajectory.generated if not step.rolled_back]
    return [reply for reply, _ in kept], [picture for _, picture in kept if picture is not None]


def target_indices(record: TrajectoryRecord) -> list[int]:
    """Places, among the pictures that were not rolled back, of those that the diffusion model may learn."""
    kept = [
        number for number, step in enumerate(record.trajectory.steps) if step.image is not None and not step.rolled_back
    ]
    return [place for place, number in enumerate(kept) if number in record.generator_targets]


def record_conversation(record: TrajectoryRecord) -> tuple[list[str], list[ImageLike]]:
    """Returns the replies of a record and the pictures between them; a verification example ends with its verdict."""
    if not record.is_verification:
        return conversation(record.trajectory)
    replies, pictures = _history(record.trajectory)
    verdict = record.trajectory.steps[-1].verdict
    assert verdict is not None
    return [*replies, verdict_reply(verdict)], pictures


def verdict_reply(verdict: Verdict) -> str:
    """Returns the reply that gives a verdict: it asks for a correction if something is unmet, else it stops."""
    return verdict.reasoning + (IMAGE_GEN if verdict.unmet else TERMINATE)


def conversation(trajectory: Trajectory) -> tuple[list[str], list[ImageLike]]:
    """All replies, the last one terminating or not, and the pictures between them."""
    replies, pictures = _history(trajectory)
    if trajectory.steps and trajectory.steps[-1].action == TERMINATE:
        replies.append(trajectory.steps[-1].reasoning + TERMINATE)
    return replies, pictures[: max(len(replies) - 1, 0)]


def _size(picture: ImageLike) -> tuple[int, int]:
    """Height and width, without decoding."""
    return picture.shape[:2] if isinstance(picture, np.ndarray) else (as_pil(picture).height, as_pil(picture).width)


def _picture_size(name: str, trajectory: Trajectory) -> tuple[int, ...]:
    sizes = sorted({_size(picture) for picture in _history(trajectory)[1]})
    if len(sizes) > 1:
        found = ", ".join(f"{width} x {height}" for height, width in sizes)
        raise ClvrError(f"trajectory {name}: pictures of {found} pixels; write the dataset with one size a trajectory")
    return sizes[0] if sizes else ()


def _decoded(sample: Sample, pictures: Sequence[ImageLike]) -> list[np.ndarray]:
    try:
        return [pixels(picture) for picture in pictures]
    except ClvrError as error:
        raise ClvrError(f"trajectory {sample.id}, record {sample.record}: broken image ({error})") from error


def _padded(
    dataset: TrajectoryDataset, samples: Sequence[Sample], bounds: Sequence[int], max_padding: float, multiple: int
) -> tuple[Sample, ...]:
    """The samples with their padded lengths: the next of `bounds`, which are chosen if there are none."""
    if not samples:
        raise ClvrError(f"{dataset.folder}: nothing to learn from in {len(dataset)} trajectories")
    bounds = bounds or length_bounds([sample.length for sample in samples], max_padding, multiple)
    return tuple(replace(sample, padded=bucket_for(sample.length, bounds)) for sample in samples)
