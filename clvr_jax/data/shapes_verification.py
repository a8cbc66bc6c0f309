"""Training chats of the small Qwen3-VL for its two roles in the shapes world.

As a verifier it derives requirements from a prompt, describes a single image, and compares a description with a
requirement. As a controller it plans, and continues a conversation in which images are often wrong. Some pairs of color
and shape occur in evaluation only: made-up words and corrupted inputs prevent the model from completing known pairs
instead of reading the image or the text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from clvr_jax.data.sft_examples import conversation
from clvr_jax.data.shapes import Canvas, Image, corrupted_canvas, simulate_trajectory
from clvr_jax.data.shapes_augmentation import random_canvas
from clvr_jax.data.trajectories.dataset import TrajectoryDataset
from clvr_jax.files.image_io import pixels
from clvr_jax.interfaces import Message
from clvr_jax.reasoning.conversation.context import chat_messages, prompt_with_requirements, requirements_line
from clvr_jax.reasoning.verification import verification
from clvr_jax.worlds.shapes.detect import Reading, detect
from clvr_jax.worlds.shapes.language.grammar import DENSE_TIERS, TIERS
from clvr_jax.worlds.shapes.language.training_phrasings import wide_metadata
from clvr_jax.worlds.shapes.layout import plan
from clvr_jax.worlds.shapes.metadata import RELATIONS, Metadata, parse_metadata
from clvr_jax.worlds.shapes.oracle import first_reply, next_reply, parse_plan
from clvr_jax.worlds.shapes.prompts import is_reserved, train_prompt
from clvr_jax.worlds.shapes.requirements import (
    ObjectGroup,
    ShapesRequirement,
    check_requirement,
    describe,
    requirements,
)
from clvr_jax.worlds.shapes.scene import (
    CELLS,
    COLORS,
    SHAPES,
    Scene,
    place,
    sample_pair,
)

EMPTY_REQUESTS = (
    *("", "hello", "a picture", "an empty canvas", "a plain background", "draw", "an image on white", "thanks"),
    *("a nice picture, please", "show me something", "an image of nothing"),
)
"""Prompts without requirements."""
SIMPLE_WEIGHTS = {
    **{"single_object": 0.08, "colors": 0.12, "two_object": 0.1, "counting": 0.12, "position": 0.15, "color_attr": 0.1},
    "complex": 0.33,
}
"""Shares of the tags among prompts of the first grammar."""
WIDE_TIERS = (0.14, 0.2, 0.29, 0.31, 0.03, 0.02, 0.01)
"""Shares of 3, 4, ... 9 objects among prompts in wide phrasings."""
PLANNED_TIERS = (0.08, 0.13, 0.25, 0.3, 0.1, 0.08, 0.06)
"""The same for plans from requirements alone, which are short enough for many objects."""
CHECKLIST_MISSING = 0.15
"""Share of the controller's conversations without the requirements, as in loops without a separate verifier."""
REPORT_MISSING = 0.1
"""Share of the controller's conversations without the verifier's report, as in the same loops."""
MISREAD_RATE = 0.3
"""Share of wrong replies in the history of the controller's conversations."""
CONVERSATION_WIDE_SHARE = 0.35
"""Share of wide phrasings among the prompts of the controller's conversations, whose plans are given."""
CONVERSATION_WEIGHTS = {"complex": 0.75, "counting": 0.1, "two_object": 0.05, "position": 0.05, "color_attr": 0.05}
"""Shares of the tags among the other prompts of conversations; most have several objects, so that mistakes occur."""
EMPTY_SHARE = 0.03
"""Share of descriptions without objects among those that requirements are compared with."""
BARE_CHECKLIST = 0.5
"""Share of plans from requirements below a prompt without requirements."""
_NONCE_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(frozen=True)
class Chat:
    """A training conversation.

    Attributes:
      messages: the messages; the assistant's turns are the targets.
      images: one image for each image part.
      is_corruptible: whether color words in the assistant's turn may be replaced in the model's input.
    """

    messages: Sequence[Message]
    images: Sequence[Image] = ()
    is_corruptible: bool = False


# --- prompts ----------------------------------------------------------------------------------------------------------


def training_metadata(
    rng: np.random.Generator,
    wide_share: float = 0.7,
    tier_weights: Sequence[float] = WIDE_TIERS,
    weights: dict[str, float] = SIMPLE_WEIGHTS,
) -> Metadata:
    """Samples metadata for requirements and plans, mostly with many objects, in wide phrasings.

    Args:
      rng: numpy generator.
      wide_share: share of wide phrasings.
      tier_weights: shares of 3, 4, ... 9 objects among prompts in wide phrasings.
      weights: shares of the tags among the other prompts.
    """
    if rng.random() > wide_share:
        return train_prompt(rng, weights)
    while True:
        tier = int(rng.choice(TIERS + DENSE_TIERS, p=tier_weights))
        metadata = wide_metadata(rng, tier, min_relations=min(3, tier - 2) if rng.random() < 0.5 else 1)
        if not is_reserved(metadata):
            return metadata


def plan_chat(rng: np.random.Generator) -> Chat:
    """Samples the first reply to a prompt: the plan and the first instruction.

    Mostly the requirements are part of the input. Often the prompt itself has none: the meaning of prompts is learned
    in `requirements_chat`, and with short texts more plans are learned in the same time.
    """
    if rng.random() < BARE_CHECKLIST:
        metadata = training_metadata(rng, 0.9, PLANNED_TIERS)
        prompt, checklist = EMPTY_REQUESTS[int(rng.integers(1, len(EMPTY_REQUESTS)))], _requirements(metadata)
    else:
        metadata = training_metadata(rng)
        prompt, checklist = metadata["prompt"], _checklist(rng, metadata)
    request = prompt_with_requirements(prompt, checklist)
    request, reply = _renamed(rng, 0.1, request, first_reply(plan(metadata)))
    return Chat(chat_messages(request, [reply], 0))


def requirements_chat(rng: np.random.Generator) -> Chat:
    """Samples a prompt and its requirements."""
    if rng.random() < 0.02:
        prompt = EMPTY_REQUESTS[int(rng.integers(len(EMPTY_REQUESTS)))]
        return Chat(_with_reply(verification.requirements_messages(prompt), requirements_line(())))
    metadata = training_metadata(rng)
    reply = requirements_line([str(each) for each in requirements(metadata)])
    prompt, reply = _renamed(rng, 0.1, metadata["prompt"], reply)
    return Chat(_with_reply(verification.requirements_messages(prompt), reply))


def _checklist(rng: np.random.Generator, metadata: Metadata) -> tuple[str, ...]:
    """Returns the requirements that the controller reads below its prompt; () as in loops without a verifier."""
    return () if rng.random() < CHECKLIST_MISSING else _requirements(metadata)


def _requirements(metadata: Metadata) -> tuple[str, ...]:
    return tuple(map(str, requirements(metadata)))


# --- images -----------------------------------------------------------------------------------------------------------


def description_chat(image: Image, description: str) -> Chat:
    """Returns the chat that describes a single image."""
    return Chat(_with_reply(verification.description_messages(), description), (image,), is_corruptible=True)


def question_chat(rng: np.random.Generator, image: Image, reading: Reading) -> Chat:
    """Samples a requirement that is checked on an image directly, without a description."""
    requirement = random_requirement(rng, reading)
    answer = verification.comparison_reply(*check_requirement(requirement, reading))
    return Chat(_with_reply(verification.question_messages(str(requirement)), answer), (image,), is_corruptible=True)


# --- conversations of the loop ----------------------------------------------------------------------------------------


def conversation_chat(
    rng: np.random.Generator, error_rate: float, show: Callable[[Sequence[Image]], Sequence[Image]]
) -> Chat:
    """Samples a conversation of the loop up to a random reply, with the verifier's report next to the last image.

    The last reply is exact. Earlier replies are often wrong, to simulate mistakes of a controller, so that the model
    learns to reply from the plan and the report instead of the previous reply.

    Args:
      rng: numpy generator.
      error_rate: share of steps whose image is not what was requested.
      show: (images) -> the images as the model receives them, for example through an autoencoder.
    """
    metadata = training_metadata(rng, CONVERSATION_WIDE_SHARE, weights=CONVERSATION_WEIGHTS)
    trajectory = simulate_trajectory(
        rng, metadata, error_rate=error_rate, random_plan=False, max_steps=6, misread_rate=MISREAD_RATE
    )
    last = int(rng.integers(1, len(trajectory.replies)))
    reply = next_reply(parse_plan(trajectory.replies[0]), detect(trajectory.canvases[last - 1]))
    return reported_chat(rng, metadata, [*trajectory.replies[:last], reply], trajectory.canvases[:last], show)


def reported_chat(
    rng: np.random.Generator,
    metadata: Metadata,
    replies: Sequence[str],
    canvases: Sequence[Image],
    show: Callable[[Sequence[Image]], Sequence[Image]],
) -> Chat:
    """Returns the chat of a trajectory up to its last reply, mostly with an exact report next to the last image.

    Args:
      rng: numpy generator.
      metadata: metadata of the prompt.
      replies: replies of the trajectory; the last one is the target.
      canvases: the images after all replies but the last.
      show: see `conversation_chat`.
    """
    last = len(canvases)
    messages = chat_messages(metadata["prompt"], replies, last, requirements=_checklist(rng, metadata))
    if rng.random() >= REPORT_MISSING:
        reading = detect(canvases[-1])
        unmet = [str(each) for each in requirements(metadata) if not check_requirement(each, reading)[1]]
        report = verification.report(describe(reading), unmet)
        messages[-2] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": report}]}
    return Chat(messages, show(canvases))


def recorded_conversations(dataset: Path) -> list[tuple[Metadata, list[str], list[Image]]]:
    """Loads metadata, replies and images of the trajectories in a dataset of the shapes world.

    Args:
      dataset: directory that `clvr synth` wrote.
    Raises: ClvrError if there is no dataset, too many records are corrupt, or one has no metadata of the shapes world.
    """
    recorded = []
    for _, record in TrajectoryDataset(dataset).scan():
        replies, images = conversation(record.trajectory)
        if len(replies) > 1:
            recorded.append((parse_metadata(record.metadata), list(replies), [pixels(image) for image in images]))
    return recorded


# --- comparisons ------------------------------------------------------------------------------------------------------


def comparisons_chat(rng: np.random.Generator, count: int) -> Chat:
    """Samples a description and requirements that are compared with it in turn; half of them are met.

    A verifier compares each requirement in a separate conversation. In training they share the description, which is
    most of the text, so that a batch has several times as many comparisons.

    Args:
      rng: numpy generator.
      count: maximum number of distinct requirements.
    """
    answers: dict[str, str] = {}
    while not answers:  # for an empty image, only unmet requirements can be sampled
        reading, text, options = _described(rng)
        for met_wanted in rng.random(count) < 0.5:
            for _ in range(12):
                requirement = options[int(rng.integers(len(options)))] if options and rng.random() < 0.3 else None
                requirement = requirement or random_requirement(rng, reading)
                evidence, met = check_requirement(requirement, reading)
                if str(requirement) not in answers and met == met_wanted:
                    answers[str(requirement)] = verification.comparison_reply(evidence, met)
                    break
    texts = _renamed(rng, 0.15, text, *(part for pair in answers.items() for part in pair))
    text, required, replies = texts[0], texts[1::2], texts[2::2]
    messages: list[Message] = []
    for requirement_text, reply in zip(required, replies, strict=True):
        question = verification.comparison_messages(text, requirement_text)
        if messages:
            question = [{"role": "user", "content": f"Required: {requirement_text}."}]
        messages += _with_reply(question, reply)
    return Chat(messages)


def _described(rng: np.random.Generator) -> tuple[Reading, str, tuple[ShapesRequirement, ...]]:
    """Samples a reading, its description or a plan of it, and the requirements of its prompt, () without a prompt."""
    options: tuple[ShapesRequirement, ...] = ()
    kind = rng.random()
    if kind < EMPTY_SHARE:
        return Reading(), describe(Reading()), requirements(training_metadata(rng))
    if kind < 0.4:
        reading = random_canvas(rng).reading()
    else:
        metadata = training_metadata(rng)
        options = requirements(metadata)
        objects = plan(metadata, rng if rng.random() < 0.5 else None)
        scene = Scene(tuple(place(item.color, item.shape, item.cell, rng) for item in objects))
        canvas = Canvas(scene, seed=int(rng.integers(2**31)))
        reading = corrupted_canvas(canvas, rng, int(rng.integers(0, 4)), CELLS).reading()
    if reading.unclear or not reading.objects or rng.random() < 0.6:
        return reading, describe(reading), options
    order = rng.permutation(len(reading.objects))  # a plan, which is checked before an image is generated
    reading = Reading(tuple(reading.objects[i] for i in order))
    return reading, f"Plan: {'; '.join(map(str, reading.objects))}.", options


def random_requirement(rng: np.random.Generator, reading: Reading) -> ShapesRequirement:
    """Samples a requirement close to the reading: one of its objects, often with a change.

    The color, shape, place or relation may be different.
    """
    kind = rng.random()
    if kind < 0.18 or not reading.objects:
        return ShapesRequirement(total=max(1, min(9, len(reading.objects) + int(rng.choice((-1, 0, 0, 0, 1))))))
    first = reading.objects[int(rng.integers(len(reading.objects)))]
    group = _near(rng, first.color, first.shape, reading)
    if kind < 0.4:
        cell = first.cell if rng.random() < 0.75 else CELLS[int(rng.integers(len(CELLS)))]
        return ShapesRequirement(dataclasses.replace(group, count=1), cell)
    if kind < 0.5 or len(reading.objects) < 2:
        return ShapesRequirement(group)
    second = reading.objects[int(rng.integers(len(reading.objects)))]
    anchor = _near(rng, second.color, second.shape, reading, 0.12)
    if (anchor.color, anchor.shape) == (group.color, group.shape):
        return ShapesRequirement(group)
    return ShapesRequirement(group, None, RELATIONS[int(rng.integers(len(RELATIONS)))], anchor)


def _near(rng: np.random.Generator, color: str, shape: str, reading: Reading, change: float = 0.4) -> ObjectGroup:
    if rng.random() < change:
        # Mostly the same color and another shape, the mistake that is accepted most often.
        pairs = [sample_pair(rng) for _ in range(40)]
        of_color, of_shape = ([pair for pair in pairs if pair[i] == (color, shape)[i]] for i in (0, 1))
        options = of_color if rng.random() < 0.65 else of_shape
        color, shape = next((pair for pair in options if pair != (color, shape)), pairs[0])
    there = sum(item.color == color and item.shape == shape for item in reading.objects)
    count = max(1, there) if rng.random() < 0.85 else int(rng.integers(1, 4))
    return ObjectGroup(count, shape, None if rng.random() < 0.1 else color)


# --- words ------------------------------------------------------------------------------------------------------------

_PLURAL = {"cross": "crosses"}
_NAMES = re.compile(
    r"\b(?:(an?) )?(" + "|".join([*COLORS, *(_PLURAL.get(shape, shape + "s") for shape in SHAPES), *SHAPES]) + r")\b",
    re.IGNORECASE,
)


def _renamed(rng: np.random.Generator, share: float, *texts: str) -> tuple[str, ...]:
    """Replaces, with probability `share`, some names of colors and shapes by made-up words, the same in all texts."""
    if rng.random() >= share:
        return texts
    names = {name: _nonce(rng) for name in (*COLORS, *SHAPES) if rng.random() < 0.6}

    def replace(match: re.Match[str]) -> str:
        article, word = match[1], match[2].lower()
        singular = next((shape for shape in SHAPES if word == _PLURAL.get(shape, shape + "s")), None)
        if singular in names:
            new = names[singular] + "s"
        elif word in names:
            new = names[word]
        else:
            return match[0]
        return new if article is None else f"{'an' if new[0] in 'aeiou' else 'a'} {new}"

    return tuple(_NAMES.sub(replace, text) for text in texts)


def _nonce(rng: np.random.Generator) -> str:
    return "".join(_NONCE_LETTERS[i] for i in rng.integers(len(_NONCE_LETTERS), size=int(rng.integers(3, 6))))


def _with_reply(messages: list[Message], reply: str) -> list[Message]:
    return [*messages, {"role": "assistant", "content": reply}]
