"""Exact roles of the data engine in the shapes world: programs that use its plans, its detector and its grammar.

The planner writes the replies of a controller of this world. The image generator receives the conditioning text of the
loop, the prompt and all replies so far, with all images of the path as references.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clvr_jax.data.engine.actions import ActionName, Turn
from clvr_jax.data.engine.roles.base import Check, History, PromptItem, Roles, Validation
from clvr_jax.data.engine.states import StateName
from clvr_jax.data.shapes_proxies import exact_proxies
from clvr_jax.data.trajectories.record import ProxyPrompts, TrajectoryRecord
from clvr_jax.errors import ClvrError
from clvr_jax.files.image_io import ImageLike, pixels
from clvr_jax.files.json_input import UncheckedJSON
from clvr_jax.reasoning.conversation.actions import strip_action
from clvr_jax.reasoning.conversation.context import conditioning_text
from clvr_jax.worlds.shapes.check import check
from clvr_jax.worlds.shapes.detect import Reading, detect
from clvr_jax.worlds.shapes.language.grammar import article
from clvr_jax.worlds.shapes.layout import PlannedObject, plan
from clvr_jax.worlds.shapes.metadata import parse_metadata
from clvr_jax.worlds.shapes.oracle import apply_edits, first_reply, next_reply, parse_edits, parse_plan
from clvr_jax.worlds.shapes.scene import CELLS

GeneratorText = Callable[[str, Sequence[str]], str]
"""(prompt, replies so far) -> the text for the image generator."""


def make_shapes_roles(item: PromptItem, *, judges: int = 2, text: GeneratorText = conditioning_text) -> Roles:
    """Returns the exact roles for a prompt of the shapes world.

    Args:
      item: the prompt, with its metadata.
      judges: number of judges; they are equal, so they never disagree.
      text: makes the text for the image generator; for a generator with a maximum length, `fit_history` of its
        pipeline.
    Raises: ClvrError for metadata that is not of this world.
    """
    exact = _ExactRoles(tuple(plan(parse_metadata(item.metadata))), item.metadata, text)
    return Roles(exact, exact, exact, (exact,) * judges)


def correct_images(record: TrajectoryRecord) -> tuple[bool, ...]:
    """Returns for each target image whether it shows what its step requested, by the detector."""
    before: Reading | tuple[()] = ()
    right = []
    for number, step in enumerate(record.trajectory.steps):
        if step.image is None or step.rolled_back:
            continue
        wanted = {(one.color, one.shape, one.cell) for one in apply_edits(before, parse_edits(step.reasoning))}
        before = _detect(step.image)
        seen = {(one.color, one.shape, one.cell) for one in before.objects}
        if number in record.generator_targets:
            right.append(seen == wanted and not before.unclear)
    return tuple(right)


def needed_corrections(record: TrajectoryRecord) -> int:
    """Returns the number of wrong images in a record that had to be corrected.

    The other wrong images show all that their step requested, and only additional objects that are planned for later
    steps.
    """
    before: Reading | tuple[()] = ()
    count = 0
    for number, step in enumerate(record.trajectory.steps):
        if step.image is None or step.rolled_back:
            continue
        wanted = {(one.color, one.shape, one.cell) for one in apply_edits(before, parse_edits(step.reasoning))}
        before = _detect(step.image)
        if number in record.mistakes:
            planned = {(one.color, one.shape, one.cell) for one in parse_plan(record.trajectory.steps[0].reasoning)}
            seen = {(one.color, one.shape, one.cell) for one in before.objects}
            count += bool(before.unclear) or not wanted <= seen <= wanted | planned
    return count


@dataclass(frozen=True)
class _ExactRoles:
    """All roles for one prompt.

    Attributes:
      plan: the objects of the image.
      metadata: metadata of the prompt.
      text: see `make_shapes_roles`.
    """

    plan: tuple[PlannedObject, ...]
    metadata: UncheckedJSON
    text: GeneratorText

    def turn(self, history: History, state: StateName, allowed: tuple[ActionName, ...], seed: int) -> str:
        reading = _detect(history.latest) if history.latest is not None else None
        reply = self._replies(history)[-1]
        seen = "an empty canvas" if reading is None else strip_action(reply)
        if "INITIAL_GENERATION" in allowed:
            return _turn(
                seen, "the first objects of the plan", "INITIAL_GENERATION", prompt=self._generator_text(history)
            )
        validations = [event.validation for event in history.events if event.validation]
        is_validated = history.events and history.events[-1].validation is not None
        if is_validated and validations[-1] and validations[-1].accepted and "END_TRAJECTORY" in allowed:
            return _turn(seen, "nothing is unmet", "END_TRAJECTORY")
        if not parse_edits(reply):
            return _turn(seen, "nothing seems unmet", "RESULT_VALIDATION")
        references = list(history.path)
        return _turn(
            seen, "something is unmet", "IMAGE_EDIT", prompt=self._generator_text(history), ref_img_list=references
        )

    def checklist(self, history: History, turn: Turn) -> tuple[str, ...]:
        """Returns one question for each cell, the cells that the turn changes first."""
        expected = {item.cell: item for item in self._expected(history)}
        changed = [edit.cell for edit in parse_edits(self._replies(history)[-1])]
        cells = [*changed, *(cell for cell in CELLS if cell not in changed)]
        return tuple(
            f"Is there {article(f'{expected[cell].color} {expected[cell].shape}')} at the {cell}?"
            if cell in expected
            else f"Is the {cell} empty?"
            for cell in cells
        )

    def check(self, history: History, turn: Turn, questions: tuple[str, ...], image: ImageLike) -> tuple[Check, ...]:
        reading = _detect(image)
        seen = {item.cell: article(f"{item.color} {item.shape}") for item in reading.objects}
        seen |= dict.fromkeys(reading.unclear, "something unclear")
        checks = []
        for question in questions:
            # Longer names first: "top" is contained in "top left".
            cell = next(cell for cell in sorted(CELLS, key=len, reverse=True) if f" the {cell}" in question)
            there = seen.get(cell)
            wanted = None if "empty" in question else question.partition(" there ")[2].partition(" at the ")[0]
            checks.append(Check(question, there == wanted, f"{there or 'nothing'} at the {cell}"))
        return tuple(checks)

    def validate(self, history: History) -> Validation:
        """Validates the latest image against the request; the plan is not used."""
        if history.latest is None:
            raise ClvrError("shapes engine: there is no image to validate")
        verdict = check(_detect(history.latest), parse_metadata(self.metadata))
        return Validation(verdict.correct, verdict.reasons, "; ".join(verdict.reasons))

    def prefer(
        self, prompt: str, first: ImageLike, second: ImageLike, seed: int
    ) -> Literal["first", "second", "neither"]:
        """Prefers a right image to a wrong one, else the image with fewer violations of the request."""
        violations = [len(check(_detect(one), parse_metadata(self.metadata)).reasons) for one in (first, second)]
        if violations[0] == violations[1]:
            return "neither"
        return "first" if violations[0] < violations[1] else "second"

    def replies(self, history: History, accepted: bool) -> tuple[str, ...]:
        return self._replies(history)

    def verdict(self, history: History, replies: tuple[str, ...]) -> str:
        return self._replies(history)[-1]

    def proxies(self, history: History) -> tuple[ProxyPrompts, ...]:
        # The expected content after a step depends on the content before it, mistakes included.
        canvases = [Reading(), *(_detect(history.images[number]) for number in history.path)]
        found = []
        for number, (reply, before) in enumerate(zip(self._replies(history)[:-1], canvases, strict=False)):
            edits = parse_edits(reply)
            found.append(exact_proxies(apply_edits(before, edits), edits, number - 1 if number else None))
        return tuple(found)

    def _replies(self, history: History) -> tuple[str, ...]:
        """Returns the reply before each image of the path, and the reply to the latest image."""
        readings = [_detect(history.images[number]) for number in history.path]
        return (first_reply(self.plan), *(next_reply(self.plan, reading) for reading in readings))

    def _generator_text(self, history: History) -> str:
        """Returns the text for the image generator."""
        return self.text(history.item.prompt, self._replies(history))

    def _expected(self, history: History) -> tuple[PlannedObject, ...]:
        """Returns the canvas after the current edits."""
        before = _detect(history.latest) if history.latest is not None else ()
        return apply_edits(before, parse_edits(self._replies(history)[-1]))


def _detect(image: ImageLike) -> Reading:
    values = pixels(image)
    return _reading(values.tobytes(), values.shape)


@functools.lru_cache(maxsize=4096)
def _reading(content: bytes, shape: tuple[int, ...]) -> Reading:
    """Detects objects. The results are cached, since each role reads each image of the path at each turn."""
    return detect(np.frombuffer(content, np.uint8).reshape(shape))


def _turn(perceive: str, reason: str, action: ActionName, **parameters: object) -> str:
    return json.dumps({"perceive": perceive, "reason": reason, "action": action, "parameters": parameters})
