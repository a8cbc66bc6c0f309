"""The reward of the shapes world: a program reads picture and text, and marks each cell.

Texts are read by the world's own grammar: a description as the exact translator writes p_T2I, or the edits of p_I2I or
of a controller's reply. A text that is neither cannot be marked.
"""

from collections.abc import Iterable, Sequence

from clvr_jax.image_io import ImageLike, pixels
from clvr_jax.rewards.reward import UNREADABLE, EditJudge, Marks, PictureJudge
from clvr_jax.worlds.shapes.detect import Reading, detect
from clvr_jax.worlds.shapes.layout import PlannedObject
from clvr_jax.worlds.shapes.oracle import (
    EMPTY_CANVAS,
    Edit,
    apply_edits,
    canvas_text,
    compare,
    edit_text,
    parse_edits,
)

SUCCESS_WEIGHT = 0.6
"""Of doing the edit; the rest is of leaving everything else alone, as for UnifiedReward-Edit."""


class ShapesJudge(PictureJudge, EditJudge):
    """Both judges at once; marks lie in [0, 1] and are finer than right or wrong."""

    def picture(self, picture: ImageLike, text: str) -> Marks:
        """Objects that are right, of those asked for and those nobody asked for.

        A text of edits says nothing about the cells it does not name: of it only the edits are marked. The part "right"
        is 1 where nothing is left to be desired, else 0.
        """
        reading, asked = detect(pixels(picture)), parse_edits(text)
        expected = () if asked else described(text)
        if expected is None:
            return UNREADABLE
        value = _success(asked, reading) if asked else _agreement(expected, reading)
        return Marks(value, {"right": float(value == 1)})

    def edit(self, source: ImageLike, edited: ImageLike, instruction: str) -> Marks:
        """0.6 share of edits that were made + 0.4 agreement of all other cells with the source.

        Cells in which the source is unclear and which no edit names are left out.
        """
        asked = parse_edits(instruction)
        if not asked or edit_text(asked) != instruction:
            return UNREADABLE
        before, after = (detect(pixels(one)) for one in (source, edited))
        named = {edit.cell for edit in asked}
        kept = [item for item in apply_edits(before, asked) if item.cell not in named]
        parts = {
            "success": _success(asked, after),
            "preservation": _agreement(kept, _without(after, named.union(before.unclear))),
        }
        value = SUCCESS_WEIGHT * parts["success"] + (1 - SUCCESS_WEIGHT) * parts["preservation"]
        return Marks(value, parts)


def described(text: str) -> tuple[PlannedObject, ...] | None:
    """The objects of a description, "a red circle at the top, a blue star at the left"; None if it is none."""
    if text == EMPTY_CANVAS:
        return ()
    found = apply_edits((), parse_edits(f"Draw {text}."))
    return found if found and sorted(canvas_text(found).split(", ")) == sorted(text.split(", ")) else None


def _agreement(expected: Sequence[PlannedObject], reading: Reading) -> float:
    """Right objects of all that are expected or extra, in [0, 1]; 1 if there is to be nothing and is nothing."""
    found = compare(expected, reading)
    size = len(expected) + len(found.extra) + len(found.unclear)
    return len(found.met) / size if size else 1.0


def _success(edits: Sequence[Edit], reading: Reading) -> float:
    """Share of edits whose cell shows what they leave there."""
    seen: dict[str, PlannedObject | None] = dict.fromkeys(reading.unclear)
    seen |= {item.cell: PlannedObject(item.color, item.shape, item.cell) for item in reading.objects}
    made = [seen.get(edit.cell) == edit.object if edit.object is not None else edit.cell not in seen for edit in edits]
    return sum(made) / len(made)


def _without(reading: Reading, cells: Iterable[str]) -> Reading:
    """What is seen outside of some cells."""
    hidden = frozenset(cells)
    return Reading(
        tuple(item for item in reading.objects if item.cell not in hidden),
        tuple(cell for cell in reading.unclear if cell not in hidden),
    )
