"""Chats from which the small Qwen3-VL learns its two roles in the shapes world.

As a verifier it derives requirements from a prompt, describes an image it sees alone, and compares a description with
a requirement. As a controller it plans, and continues a conversation in which images are often wrong. Some pairs of
color and shape occur in evaluation only; made-up words and corrupted inputs keep the model from completing the pairs
that it has met, instead of looking and copying.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from clvr_jax.data.sft_examples import conversation
from clvr_jax.data.shapes import Canvas, corrupted_canvas, simulate_trajectory
from clvr_jax.data.trajectory_dataset import TrajectoryDataset
from clvr_jax.image_io import pixels
from clvr_jax.reasoning import verification
from clvr_jax.reasoning.context import Message, chat_messages, prompt_with_requirements, requirements_line
from clvr_jax.worlds.shapes.detect import Reading, detect
from clvr_jax.worlds.shapes.grammar import DENSE_TIERS, TIERS
from clvr_jax.worlds.shapes.layout import plan
from clvr_jax.worlds.shapes.metadata import RELATIONS, Metadata, parse_metadata
from clvr_jax.worlds.shapes.oracle import first_reply, next_reply, parse_plan
from clvr_jax.worlds.shapes.prompts import is_reserved, train_prompt
from clvr_jax.worlds.shapes.render import coverage, window
from clvr_jax.worlds.shapes.requirements import (
    ShapesRequirement,
    Thing,
    check_requirement,
    describe,
    requirements,
)
from clvr_jax.worlds.shapes.scene import (
    CELL_SIZE,
    CELLS,
    COLORS,
    HELD_OUT_PAIRS,
    SHAPES,
    Scene,
    cell_center,
    place,
    sample_pair,
    sample_scene_random,
)
from clvr_jax.worlds.shapes.training_phrasings import wide_metadata

Image = np.ndarray
"""uint8 (64, 64, 3)."""

NOTHING_ASKED = (
    *("", "hello", "a picture", "an empty canvas", "a plain background", "draw", "an image on white", "thanks"),
    *("a nice picture, please", "show me something", "an image of nothing"),
)
"""Prompts without a requirement that an image could be checked for."""
SIMPLE_WEIGHTS = {
    **{"single_object": 0.08, "colors": 0.12, "two_object": 0.1, "counting": 0.12, "position": 0.15, "color_attr": 0.1},
    "complex": 0.33,
}
"""Shares of the tags among prompts of the first grammar."""
WIDE_TIERS = (0.14, 0.2, 0.29, 0.31, 0.03, 0.02, 0.01)
"""Shares of 3, 4, ... 9 objects among prompts in wide phrasings."""
PLANNED_TIERS = (0.08, 0.13, 0.25, 0.3, 0.1, 0.08, 0.06)
"""The same among plans that are made from requirements alone, which are short enough for many objects."""
CHECKLIST_MISSING = 0.15
"""Share of the controller's conversations without the requirements, as in loops without a separate verifier."""
REPORT_MISSING = 0.1
"""Share of the controller's conversations without the verifier's report, for the same loops."""
MISREAD_RATE = 0.3
"""Share of wrong replies in the history of the controller's conversations."""
CONVERSATION_WIDE_SHARE = 0.35
"""Share of wide phrasings among the prompts of the controller's conversations, whose plans are given."""
CONVERSATION_WEIGHTS = {"complex": 0.75, "counting": 0.1, "two_object": 0.05, "position": 0.05, "color_attr": 0.05}
"""Shares of the tags among the other prompts of conversations: most have several objects, so that mistakes remain."""
BARE_CHECKLIST = 0.5
"""Share of plans that are made from requirements below a prompt that asks for nothing."""
_TINT = 44.0
"""Greatest distance of an object's color from the named one, in units of the channels, which have 256 levels."""
_SOFTNESS = 0.9
"""Greatest standard deviation of the blur of soft edges, in pixels."""
_NONCE_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation to learn from: the assistant's turns are the targets.

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
    """Samples a training request for reading and planning, mostly with many objects, in wide phrasings."""
    if rng.random() > wide_share:
        return train_prompt(rng, weights)
    while True:
        tier = int(rng.choice(TIERS + DENSE_TIERS, p=tier_weights))
        metadata = wide_metadata(rng, tier, min_relations=min(3, tier - 2) if rng.random() < 0.5 else 1)
        if not is_reserved(metadata):
            return metadata


def plan_chat(rng: np.random.Generator) -> Chat:
    """Samples the first reply to a prompt: the plan and the first instruction, mostly with the requirements in view.

    Often the requirements are all there is to plan for, below a prompt that asks for nothing: the understanding of
    prompts is learned from requirements, and short texts make more plans in the same time.
    """
    if rng.random() < BARE_CHECKLIST:
        metadata = training_metadata(rng, 0.9, PLANNED_TIERS)
        prompt, checklist = NOTHING_ASKED[int(rng.integers(1, len(NOTHING_ASKED)))], _requirements(metadata)
    else:
        metadata = training_metadata(rng)
        prompt, checklist = metadata["prompt"], _checklist(rng, metadata)
    asked = prompt_with_requirements(prompt, checklist)
    asked, reply = _renamed(rng, 0.1, asked, first_reply(plan(metadata)))
    return Chat(chat_messages(asked, [reply], 0))


def requirements_chat(rng: np.random.Generator) -> Chat:
    """The requirements of a prompt."""
    if rng.random() < 0.02:
        prompt = NOTHING_ASKED[int(rng.integers(len(NOTHING_ASKED)))]
        return Chat(_said(verification.requirements_messages(prompt), requirements_line(())))
    metadata = training_metadata(rng)
    reply = requirements_line([str(each) for each in requirements(metadata)])
    prompt, reply = _renamed(rng, 0.1, metadata["prompt"], reply)
    return Chat(_said(verification.requirements_messages(prompt), reply))


def _checklist(rng: np.random.Generator, metadata: Metadata) -> tuple[str, ...]:
    """Returns the requirements that the controller reads below its prompt; () as in loops without a verifier."""
    return () if rng.random() < CHECKLIST_MISSING else _requirements(metadata)


def _requirements(metadata: Metadata) -> tuple[str, ...]:
    return tuple(map(str, requirements(metadata)))


# --- images -----------------------------------------------------------------------------------------------------------


def random_canvas(rng: np.random.Generator) -> Canvas:
    """A scene of 0 to 9 objects, often with blurred or mixed things in it."""
    number = int(rng.choice(10, p=(0.03, 0.05, 0.08, 0.12, 0.16, 0.18, 0.16, 0.1, 0.07, 0.05)))
    canvas = Canvas(sample_scene_random(rng, number), seed=int(rng.integers(2**31)))
    return corrupted_canvas(canvas, rng, int(rng.choice(4, p=(0.4, 0.3, 0.2, 0.1))), CELLS)


def noisy(image: Image, rng: np.random.Generator) -> Image:
    """The image with slight noise and brightness errors, as generators make them."""
    changed = image + rng.normal(0, rng.uniform(0, 6), image.shape) + rng.uniform(-4, 4)
    return np.clip(np.round(changed), 0, 255).astype(np.uint8)


def blurred(image: Image, rng: np.random.Generator, cells: Sequence[str] = CELLS) -> Image:
    """The image with one or two of the cells out of focus, as generators leave objects unfinished."""
    changed = image.copy()
    for index in rng.permutation(len(cells))[: int(rng.integers(1, 3))]:
        x, y = cell_center(cells[index])
        half = CELL_SIZE / 2
        rows, columns = (slice(max(round(value - half), 0), round(value + half)) for value in (y, x))
        sigma = rng.uniform(1.0, 4.0)
        changed[rows, columns] = ndimage.gaussian_filter(image[rows, columns], (sigma, sigma, 0), mode="nearest")
    return changed


def tinted(canvas: Canvas, rng: np.random.Generator) -> Image:
    """The canvas with its objects in slightly other colors and with softer edges, all of them as clear as before.

    Whether a thing is clear then cannot be learned as a list of the pairs of color and shape that occur in training.
    """
    image = canvas.render().astype(np.float32)
    for item in canvas.scene.objects:
        rows, columns, x, y = window(item)
        direction = rng.normal(size=3)
        change = rng.uniform(0, _TINT) * direction / np.linalg.norm(direction)
        image[rows, columns] += coverage(item.shape, x, y, item.radius)[..., None] * change
    sigma = rng.uniform(0.0, _SOFTNESS)
    changed = np.clip(np.round(ndimage.gaussian_filter(image, (sigma, sigma, 0))), 0, 255).astype(np.uint8)
    return changed if _same_content(detect(changed), canvas.reading()) else canvas.render()


def _same_content(first: Reading, second: Reading) -> bool:
    return describe(first) == describe(second)


def description_chat(image: Image, description: str) -> Chat:
    """What an image shows, seen alone."""
    return Chat(_said(verification.description_messages(), description), (image,), is_corruptible=True)


def question_chat(rng: np.random.Generator, image: Image, reading: Reading) -> Chat:
    """One requirement asked of an image, without a description."""
    requirement = random_requirement(rng, reading)
    answer = verification.comparison_reply(*check_requirement(requirement, reading))
    return Chat(_said(verification.question_messages(str(requirement)), answer), (image,), is_corruptible=True)


def has_held_out_object(reading: Reading) -> bool:
    """Whether an image shows one of the pairs kept for evaluation."""
    return any((item.color, item.shape) in HELD_OUT_PAIRS for item in reading.objects)


# --- conversations of the loop ----------------------------------------------------------------------------------------


def conversation_chat(
    rng: np.random.Generator, error_rate: float, show: Callable[[Sequence[Image]], Sequence[Image]]
) -> Chat:
    """Samples a conversation of the loop up to a random reply, with the verifier's report beside the last image.

    The reply is exact; those before it are often wrong, as a controller's own mistakes are, so that it is learned from
    the plan and the report and not from the reply before.

    Args:
      rng: numpy generator.
      error_rate: share of steps whose image is not what was requested.
      show: (images) -> the images as the model sees them, for example through an autoencoder.
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
    """Returns a trajectory up to its last reply, mostly with an exact report beside the last image.

    Args:
      rng: numpy generator.
      metadata: of the prompt.
      replies: replies of the trajectory; the last one is the target.
      canvases: images that follow the replies but the last.
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
    """Metadata, replies and images of the trajectories of a dataset that `clvr synth` made of the shapes world.

    Raises: ClvrError if there is no dataset, too much of it is corrupt, or it has no metadata of the shapes world.
    """
    recorded = []
    for _, record in TrajectoryDataset(dataset).scan():
        replies, images = conversation(record.trajectory)
        if len(replies) > 1:
            recorded.append((parse_metadata(record.metadata), list(replies), [pixels(image) for image in images]))
    return recorded


# --- comparisons ------------------------------------------------------------------------------------------------------


def comparisons_chat(rng: np.random.Generator, count: int) -> Chat:
    """Samples a description and requirements that are compared with it one after the other; half of them are met.

    A verifier compares each requirement in a conversation of its own. In training they share the description, which
    is most of the text, so that a batch holds several times as many comparisons.

    Args:
      rng: numpy generator.
      count: number of distinct requirements at most.
    """
    answers: dict[str, str] = {}
    while not answers:  # of an empty image, nothing but a false requirement can be drawn
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
    text, asked, replies = texts[0], texts[1::2], texts[2::2]
    messages: list[Message] = []
    for requirement_text, reply in zip(asked, replies, strict=True):
        question = verification.comparison_messages(text, requirement_text)
        if messages:
            question = [{"role": "user", "content": f"Required: {requirement_text}."}]
        messages += _said(question, reply)
    return Chat(messages)


def _described(rng: np.random.Generator) -> tuple[Reading, str, tuple[ShapesRequirement, ...]]:
    """Samples an image as read, the text that describes it or plans it, and the requirements of a prompt it is for."""
    options: tuple[ShapesRequirement, ...] = ()
    if rng.random() < 0.4:
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
    """A requirement near to what is there: one of its objects, often with another color, shape, place or relation."""
    kind = rng.random()
    if kind < 0.18 or not reading.objects:
        return ShapesRequirement(total=max(1, min(9, len(reading.objects) + int(rng.choice((-1, 0, 0, 0, 1))))))
    first = reading.objects[int(rng.integers(len(reading.objects)))]
    thing = _near(rng, first.color, first.shape, reading)
    if kind < 0.4:
        cell = first.cell if rng.random() < 0.75 else CELLS[int(rng.integers(len(CELLS)))]
        return ShapesRequirement(dataclasses.replace(thing, count=1), cell)
    if kind < 0.5 or len(reading.objects) < 2:
        return ShapesRequirement(thing)
    second = reading.objects[int(rng.integers(len(reading.objects)))]
    anchor = _near(rng, second.color, second.shape, reading, 0.12)
    if (anchor.color, anchor.shape) == (thing.color, thing.shape):
        return ShapesRequirement(thing)
    return ShapesRequirement(thing, None, RELATIONS[int(rng.integers(len(RELATIONS)))], anchor)


def _near(rng: np.random.Generator, color: str, shape: str, reading: Reading, change: float = 0.4) -> Thing:
    if rng.random() < change:
        # Mostly the same color and another shape, which is the mistake that is accepted most easily.
        pairs = [sample_pair(rng) for _ in range(40)]
        of_color, of_shape = ([pair for pair in pairs if pair[i] == (color, shape)[i]] for i in (0, 1))
        options = of_color if rng.random() < 0.65 else of_shape
        color, shape = next((pair for pair in options if pair != (color, shape)), pairs[0])
    there = sum(item.color == color and item.shape == shape for item in reading.objects)
    count = max(1, there) if rng.random() < 0.85 else int(rng.integers(1, 4))
    return Thing(count, shape, None if rng.random() < 0.1 else color)


# --- words ------------------------------------------------------------------------------------------------------------

_PLURAL = {"cross": "crosses"}
_NAMES = re.compile(
    r"\b(?:(an?) )?(" + "|".join([*COLORS, *(_PLURAL.get(shape, shape + "s") for shape in SHAPES), *SHAPES]) + r")\b",
    re.IGNORECASE,
)


def _renamed(rng: np.random.Generator, share: float, *texts: str) -> tuple[str, ...]:
    """The texts; in a `share` of cases some names of colors and shapes are made-up words, the same in all texts."""
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


def _said(messages: list[Message], reply: str) -> list[Message]:
    return [*messages, {"role": "assistant", "content": reply}]
