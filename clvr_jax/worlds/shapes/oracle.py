"""An exact controller of the shapes world: plans, verifies and corrects images in the words of trained controllers.

A reply is text followed by one action token. The first reply contains the plan and requests its first objects. Each
later reply describes the last image, lists what is unmet, and requests at most two edits or stops. Edits exist as data
(`Edit`) and as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.worlds.shapes.detect import DetectedObject, Reading, detect
from clvr_jax.worlds.shapes.language.grammar import article
from clvr_jax.worlds.shapes.layout import PlannedObject, plan
from clvr_jax.worlds.shapes.metadata import Metadata
from clvr_jax.worlds.shapes.scene import CELLS, COLORS, SHAPES, Scene, SceneObject, cell_index, place

IMAGE_GEN = "<|image_gen|>"
TERMINATE = "<|terminate|>"
MAX_EDITS = 2
EMPTY_CANVAS = "an empty picture"

Plan = tuple[PlannedObject, ...]


@dataclass(frozen=True)
class Edit:
    """A change of one cell.

    Attributes:
      kind: "draw" (on the empty canvas), "add", "remove", "replace" or "clear".
      cell: the cell that changes.
      target: the object in the cell before the edit (remove; replace, where None means something unclear).
      object: the object in the cell after the edit (draw, add, replace).
    """

    kind: str
    cell: str
    target: PlannedObject | None = None
    object: PlannedObject | None = None

    def __post_init__(self) -> None:
        needs_object = {"draw": True, "add": True, "replace": True, "remove": False, "clear": False}
        if self.kind not in needs_object:
            raise ClvrError(f"edit: unknown kind {self.kind!r}; known: {', '.join(needs_object)}")
        if (self.object is not None) != needs_object[self.kind] or (self.kind == "remove" and self.target is None):
            raise ClvrError(f"edit: {self.kind} with target {self.target} and object {self.object} is invalid")
        cell_index(self.cell)
        if any(item is not None and item.cell != self.cell for item in (self.target, self.object)):
            raise ClvrError(
                f"edit: {self.kind} at {self.cell}, but target is {self.target} and object is {self.object}"
            )


@dataclass(frozen=True)
class Diff:
    """The differences of an image from a plan, first in the order of the plan, then in reading order.

    Attributes:
      met: planned objects that the image shows.
      missing: planned objects whose cell is empty.
      wrong: (planned, seen) for cells that show something else; seen is None if it is unclear.
      extra: objects in cells that the plan leaves empty.
      unclear: cells that the plan leaves empty and that show something unclear.
      edits: one edit for each difference, which together correct the image.
      unmet: one phrase for each difference, in the order of `edits`.
    """

    met: Plan = ()
    missing: Plan = ()
    wrong: tuple[tuple[PlannedObject, PlannedObject | None], ...] = ()
    extra: Plan = ()
    unclear: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = field(default=(), repr=False)
    unmet: tuple[str, ...] = ()


def compare(plan: Sequence[PlannedObject], reading: Reading) -> Diff:
    """Compares the detected content of an image with a plan."""
    seen = {item.cell: PlannedObject(item.color, item.shape, item.cell) for item in reading.objects}
    planned = {item.cell: item for item in plan}
    met, missing, wrong, edits, unmet = [], [], [], [], []
    for item in plan:
        found = seen.get(item.cell)
        if found == item:
            met.append(item)
            continue
        unmet.append(str(item))
        if found is None and item.cell not in reading.unclear:
            missing.append(item)
            edits.append(Edit("add", item.cell, object=item))
        else:
            wrong.append((item, found))
            edits.append(Edit("replace", item.cell, found, item))
    extra, unclear = [], []
    for cell in CELLS:
        if cell in planned:
            continue
        if cell in seen:
            extra.append(seen[cell])
            unmet.append(f"no {seen[cell]}")
            edits.append(Edit("remove", cell, target=seen[cell]))
        elif cell in reading.unclear:
            unclear.append(cell)
            unmet.append(f"nothing unclear {cell}")
            edits.append(Edit("clear", cell))
    return Diff(tuple(met), tuple(missing), tuple(wrong), tuple(extra), tuple(unclear), tuple(edits), tuple(unmet))


def first_edits(plan: Sequence[PlannedObject], limit: int = MAX_EDITS) -> tuple[Edit, ...]:
    """Returns the edits that draw the first `limit` objects of the plan on the empty canvas."""
    return tuple(Edit("draw", item.cell, object=item) for item in plan[: _checked(limit)])


def edits(plan: Sequence[PlannedObject], reading: Reading, limit: int = MAX_EDITS) -> tuple[Edit, ...]:
    """Returns the next edits, at most `limit`: objects of the plan in order, then removals."""
    return compare(plan, reading).edits[: _checked(limit)]


def _checked(limit: int) -> int:
    if limit < 1:
        raise ClvrError(f"oracle: the limit of edits per step must be at least 1, got {limit}")
    return limit


# --- edits as text ----------------------------------------------------------------------------------------------------


def _with_article(item: PlannedObject) -> str:
    return article(f"{item.color} {item.shape}")


def canvas_text(objects: Iterable[PlannedObject]) -> str:
    """Describes a whole canvas: "a red circle at the top, a blue star at the left"."""
    return ", ".join(f"{_with_article(item)} at the {item.cell}" for item in objects) or EMPTY_CANVAS


def _at(edit: Edit) -> str:
    return f"at the {edit.cell}"


def edit_text(edits: Sequence[Edit], first: bool = False) -> str:
    """Writes edits in words.

    Args:
      edits: the edits; with `first` at least one, all of kind "draw".
      first: write one sentence `Draw ...` for the empty canvas, else one sentence per edit.
    Raises: ClvrError if the kinds of the edits do not fit `first`.
    """
    if first:
        if not edits or any(edit.kind != "draw" for edit in edits):
            raise ClvrError("edit_text: with first=True there must be at least one edit, and only edits of kind draw")
        parts = [f"{_with_article(edit.object)} {_at(edit)}" for edit in edits if edit.object]
        return "Draw " + " and ".join([*([", ".join(parts[:-1])] if parts[:-1] else []), parts[-1]]) + "."
    return " ".join(_sentence(edit) for edit in edits)


def _sentence(edit: Edit) -> str:
    if edit.kind == "clear":
        return f"Clear the {edit.cell}."
    if edit.kind == "remove" and edit.target:
        return f"Remove the {edit.target.color} {edit.target.shape} {_at(edit)}."
    if edit.kind == "add" and edit.object:
        return f"Add {_with_article(edit.object)} {_at(edit)}."
    if edit.kind == "replace" and edit.object:
        old = f"{edit.target.color} {edit.target.shape}" if edit.target else _UNCLEAR
        return f"Replace the {old} {_at(edit)} with {_with_article(edit.object)}."
    raise ClvrError(f"edit_text: an edit of kind {edit.kind} needs first=True")


_UNCLEAR = "unclear thing"
_COLOR, _SHAPE = "|".join(COLORS), "|".join(SHAPES)
# Longer names first, so that "top left" is not read as "top".
_CELL = "|".join(sorted(CELLS, key=len, reverse=True))
_OBJECT = re.compile(rf"({_COLOR}) ({_SHAPE}) ({_CELL})")
_DRAWN = re.compile(rf"an? ({_COLOR}) ({_SHAPE}) at the ({_CELL})")
_EDIT = re.compile(
    rf"(?P<clear>Clear) the (?P<clear_cell>{_CELL})\."
    rf"|(?P<remove>Remove) the (?P<remove_object>(?:{_COLOR}) (?:{_SHAPE})) at the (?P<remove_cell>{_CELL})\."
    rf"|(?P<replace>Replace) the (?P<old>(?:{_COLOR}) (?:{_SHAPE})|{_UNCLEAR}) at the (?P<replace_cell>{_CELL})"
    rf" with an? (?P<new>(?:{_COLOR}) (?:{_SHAPE}))\."
    rf"|(?P<add>Add) an? (?P<add_object>(?:{_COLOR}) (?:{_SHAPE})) at the (?P<add_cell>{_CELL})\."
    rf"|(?P<draw>Draw) (?P<drawn>[^.]*)\."
)


def parse_edits(reply: str) -> tuple[Edit, ...]:
    """Parses the edits that a reply requests, in order; sentences that are not edits in this grammar are ignored."""
    found: list[Edit] = []
    for match in _EDIT.finditer(reply):
        if match["draw"]:
            drawn = [PlannedObject(*groups) for groups in _DRAWN.findall(match["drawn"])]
            found += [Edit("draw", item.cell, object=item) for item in drawn]
        elif match["clear"]:
            found.append(Edit("clear", match["clear_cell"]))
        elif match["remove"]:
            found.append(Edit("remove", match["remove_cell"], _object(match["remove_object"], match["remove_cell"])))
        elif match["add"]:
            found.append(Edit("add", match["add_cell"], object=_object(match["add_object"], match["add_cell"])))
        else:
            cell, old = match["replace_cell"], match["old"]
            target = None if old == _UNCLEAR else _object(old, cell)
            found.append(Edit("replace", cell, target, _object(match["new"], cell)))
    return tuple(found)


def _object(name: str, cell: str) -> PlannedObject:
    color, shape = name.split()
    return PlannedObject(color, shape, cell)


# --- replies ----------------------------------------------------------------------------------------------------------


def first_reply(plan: Sequence[PlannedObject], rng: np.random.Generator | None = None, limit: int = MAX_EDITS) -> str:
    """Writes the reply to a prompt when there is no image yet.

    Args:
      plan: all objects of the image, at least one.
      rng: samples the number of objects (1..limit) of the first step; None takes `limit`.
      limit: maximum number of objects in the first step.
    Raises: ClvrError for an empty plan or a limit below 1.
    """
    if not plan:
        raise ClvrError("first_reply: the plan is empty; it needs at least one object")
    if rng is not None:
        limit = int(rng.integers(1, _checked(limit) + 1))
    return f"Plan: {_listed(plan)}. {edit_text(first_edits(plan, limit), first=True)}{IMAGE_GEN}"


def next_reply(plan: Sequence[PlannedObject], reading: Reading, limit: int = MAX_EDITS) -> str:
    """Writes the reply to the last image: its content, what is unmet, and at most `limit` edits or the stop action."""
    difference = compare(plan, reading)
    clear = {item.cell: str(item) for item in reading.objects}
    seen = [clear.get(cell, f"something unclear {cell}") for cell in CELLS if cell in clear or cell in reading.unclear]
    text = f"I see {_listed(seen)}. Unmet: {_listed(difference.unmet)}."
    if not difference.unmet:
        return text + TERMINATE
    return f"{text} {edit_text(difference.edits[: _checked(limit)])}{IMAGE_GEN}"


def _listed(items: Iterable[object]) -> str:
    return "; ".join(map(str, items)) or "nothing"


def parse_plan(reply: str) -> Plan:
    """Parses the plan of a first reply.

    Raises: ClvrError if there is no `Plan:` sentence, an item is not `color shape cell`, or a cell is used twice.
    """
    sentence = re.search(r"Plan: ([^.]*)\.", reply)
    if not sentence:
        raise ClvrError(f"no sentence 'Plan: ... .' in the reply {reply[:80]!r}")
    found = []
    for item in sentence[1].split("; "):
        match = _OBJECT.fullmatch(item)
        if not match:
            raise ClvrError(f"plan item {item!r} is not '<color> <shape> <cell>'")
        found.append(PlannedObject(*match.groups()))
    if len({item.cell for item in found}) < len(found):
        raise ClvrError(f"plan uses a cell twice: {_listed(found)}")
    return tuple(found)


# --- what edits do ----------------------------------------------------------------------------------------------------


def apply_edits(state: Reading | Iterable[PlannedObject | DetectedObject | SceneObject], edits: Iterable[Edit]) -> Plan:
    """Returns the objects of a canvas after perfect edits, in reading order.

    An edit takes effect whatever its cell showed before. Unclear cells of a Reading that no edit names are left out.
    """
    objects = state.objects if isinstance(state, Reading) else state
    canvas = {item.cell: PlannedObject(item.color, item.shape, item.cell) for item in objects}
    for edit in edits:
        if edit.object is None:
            canvas.pop(edit.cell, None)
        else:
            canvas[edit.cell] = edit.object
    return tuple(canvas[cell] for cell in CELLS if cell in canvas)


def edited_scene(scene: Scene, edits: Iterable[Edit], rng: np.random.Generator) -> Scene:
    """Returns the scene after perfect edits.

    Objects that no edit names stay equal bit for bit. An object that replaces another takes over its position and size;
    an object in an empty cell gets a position and size that `rng` samples.
    """
    canvas = {item.cell: item for item in scene.objects}
    for edit in edits:
        old = canvas.get(edit.cell)
        if edit.object is None:
            canvas.pop(edit.cell, None)
        elif old is None:
            canvas[edit.cell] = place(edit.object.color, edit.object.shape, edit.cell, rng)
        else:
            canvas[edit.cell] = SceneObject(edit.object.color, edit.object.shape, edit.cell, old.x, old.y, old.radius)
    return Scene(tuple(canvas.values()))


class OracleController:
    """A controller that knows the metadata of each prompt and detects the content of images exactly."""

    def __init__(self, requests: Mapping[str, Metadata], limit: int = MAX_EDITS) -> None:
        """Initializes the controller.

        Args:
          requests: prompt -> metadata, for all prompts that it will receive.
          limit: maximum number of edits per step.
        """
        self._requests = dict(requests)
        self._limit = _checked(limit)

    def reply(self, prompt: str, replies: Sequence[str], images: Sequence[np.ndarray]) -> str:
        """Returns the next reply.

        Args:
          prompt: one of the known prompts.
          replies: the replies so far, oldest first; the plan is taken from the first.
          images: uint8 (64, 64, 3) each, the images generated so far; the last one is verified.
        Raises: ClvrError for an unknown prompt, replies without images, or a first reply without a plan.
        """
        if not replies:
            if prompt not in self._requests:
                raise ClvrError(f"the oracle has no metadata for the prompt {prompt!r}; add it to `requests`")
            return first_reply(plan(self._requests[prompt]), limit=self._limit)
        if not images:
            raise ClvrError("the oracle got replies but no image to verify; pass the images generated so far")
        return next_reply(parse_plan(replies[0]), detect(images[-1]), self._limit)
