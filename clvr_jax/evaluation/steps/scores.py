"""Scores of one step: the image that was generated against the request and the last reference, cell by cell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clvr_jax.evaluation.steps.states import State
from clvr_jax.worlds.shapes.detect import Reading, detect
from clvr_jax.worlds.shapes.layout import PlannedObject
from clvr_jax.worlds.shapes.oracle import apply_edits

SCORES = ("right", "edits_made", "rest_preserved", "drawn_early")


@dataclass(frozen=True)
class StepScore:
    """What an image of a step is like.

    Attributes:
      right: the edits are made, the rest is preserved, and nothing is drawn early.
      edits_made: every cell that the request names shows what it requests.
      rest_preserved: every other cell shows what the last reference shows. Cells that were unclear there are ignored,
        and so is what is drawn early.
      drawn_early: an empty cell that the request does not name shows what the plan has there. It costs a loop nothing.
    """

    right: bool
    edits_made: bool
    rest_preserved: bool
    drawn_early: bool


def score_step(image: np.ndarray, state: State) -> StepScore:
    """Scores an image.

    Args:
      image: uint8 (64, 64, 3).
      state: its history and request.
    """
    before = detect(state.images[-1]) if state.images else Reading()
    shown = _content(detect(image))
    named = {edit.cell for edit in state.edits}
    wanted: dict[str, PlannedObject | None] = {item.cell: item for item in apply_edits(before, state.edits)}
    early = {
        item.cell
        for item in state.plan
        if item.cell not in named | set(before.unclear) | set(wanted) and shown.get(item.cell) == item
    }
    rest = (set(wanted) | set(shown)) - named - early - set(before.unclear)
    # A cell that is unclear has the content None, which no request wants.
    edits_made = all((cell in shown) == (cell in wanted) and shown.get(cell) == wanted.get(cell) for cell in named)
    rest_preserved = all(cell in shown and cell in wanted and shown[cell] == wanted[cell] for cell in rest)
    return StepScore(edits_made and rest_preserved and not early, edits_made, rest_preserved, bool(early))


def _content(reading: Reading) -> dict[str, PlannedObject | None]:
    """Returns what each cell shows that is not empty; None where it is unclear."""
    content: dict[str, PlannedObject | None] = dict.fromkeys(reading.unclear)
    return content | {item.cell: PlannedObject(item.color, item.shape, item.cell) for item in reading.objects}
