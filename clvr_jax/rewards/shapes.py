"""The judge of the shapes world: a program that parses image and text, and compares them cell by cell.

Texts are parsed by the grammar of the oracle: a description, as the exact translator writes p_T2I, or edits, as in
p_I2I and in the replies of controllers. Any other text has no score.
"""

from collections.abc import Iterable, Sequence

from clvr_jax.files.image_io import ImageLike, pixels
from clvr_jax.rewards.reward import UNREADABLE, EditJudge, ImageJudge, Score
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
"""Weight of the success of an edit; the rest is the weight of preservation, as in UnifiedReward-Edit."""


class ShapesJudge(ImageJudge, EditJudge):
    """Judges both images and edits by a program; scores are in [0, 1]."""

    def score_image(self, image: ImageLike, text: str) -> Score:
        """Returns the number of right objects divided by the number of requested and additional objects.

        For a text of edits, only the cells that it names count. The part "right" is 1 if the score is 1, else 0.
        """
        reading, requested = detect(pixels(image)), parse_edits(text)
        expected = () if requested else parse_description(text)
        if expected is None:
            return UNREADABLE
        value = _success(requested, reading) if requested else _agreement(expected, reading)
        return Score(value, {"right": float(value == 1)})

    def score_edit(self, source: ImageLike, edited: ImageLike, instruction: str) -> Score:
        """Returns 0.6 x the share of edits that were made + 0.4 x the agreement of all other cells with the source.

        Cells that are unclear in the source and that no edit names are ignored.
        """
        requested = parse_edits(instruction)
        if not requested or edit_text(requested) != instruction:
            return UNREADABLE
        before, after = (detect(pixels(one)) for one in (source, edited))
        named = {edit.cell for edit in requested}
        kept = [item for item in apply_edits(before, requested) if item.cell not in named]
        parts = {
            "success": _success(requested, after),
            "preservation": _agreement(kept, _without(after, named.union(before.unclear))),
        }
        value = SUCCESS_WEIGHT * parts["success"] + (1 - SUCCESS_WEIGHT) * parts["preservation"]
        return Score(value, parts)


def parse_description(text: str) -> tuple[PlannedObject, ...] | None:
    """Parses a description, "a red circle at the top, a blue star at the left"; returns None for any other text."""
    if text == EMPTY_CANVAS:
        return ()
    found = apply_edits((), parse_edits(f"Draw {text}."))
    return found if found and sorted(canvas_text(found).split(", ")) == sorted(text.split(", ")) else None


def _agreement(expected: Sequence[PlannedObject], reading: Reading) -> float:
    """Returns the share of right objects among all expected or additional ones, in [0, 1]; 1 if there are none."""
    found = compare(expected, reading)
    size = len(expected) + len(found.extra) + len(found.unclear)
    return len(found.met) / size if size else 1.0


def _success(edits: Sequence[Edit], reading: Reading) -> float:
    """Returns the share of edits, in [0, 1], whose cell shows their result."""
    seen: dict[str, PlannedObject | None] = dict.fromkeys(reading.unclear)
    seen |= {item.cell: PlannedObject(item.color, item.shape, item.cell) for item in reading.objects}
    made = [seen.get(edit.cell) == edit.object if edit.object is not None else edit.cell not in seen for edit in edits]
    return sum(made) / len(made)


def _without(reading: Reading, cells: Iterable[str]) -> Reading:
    """Returns the content of an image outside of some cells."""
    hidden = frozenset(cells)
    return Reading(
        tuple(item for item in reading.objects if item.cell not in hidden),
        tuple(cell for cell in reading.unclear if cell not in hidden),
    )
