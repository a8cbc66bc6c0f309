"""Detects the objects in images of the shapes world.

The detector is classical vision: pixels that differ from the background form connected components; each component is
assigned the nearest palette color and compared with all five shapes, whose position and size follow from its mass and
centroid. A component that does not match one color and one shape well, and clearly better than all others, is reported
as unclear.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.worlds.shapes.render import signed_distance
from clvr_jax.worlds.shapes.scene import (
    BACKGROUND,
    CANVAS,
    CELL_SIZE,
    CELLS,
    COLORS,
    RADIUS_RANGE,
    SHAPES,
    cell_at,
    cell_center,
    check_names,
    reading_order,
)

# Threshold on the largest channel difference from the background; a pixel that is half covered by a palette color
# differs by about 105.
_FOREGROUND = 50
_SPECK = 6
MAX_COLOR_DISTANCE = 48.0
"""Greatest distance of a clear object's color from the palette color, in levels of the channels."""
MIN_COLOR_MARGIN = 18.0
"""Least difference between the distances from the nearest and the second palette color."""
# Least overlap with the template, in the order of SHAPES; blur reduces it less for compact shapes.
_MIN_MATCH = (0.91, 0.9, 0.86, 0.81, 0.84)
_MIN_SHAPE_MARGIN = 0.04
_RADIUS_SLACK = 1.0
_MAX_OFFSET = 5.5
_MAX_EXTENT = 24
# Widths of the templates' edges in pixels: as rendered, and softer, as after an autoencoder. The better match is used.
_EDGES = (1.2, 2.0)


@dataclass(frozen=True)
class DetectedObject:
    """An object detected in an image; center (x, y) and radius in pixels."""

    color: str
    shape: str
    cell: str
    x: float
    y: float
    radius: float

    def __post_init__(self) -> None:
        check_names(self.color, self.shape, self.cell)

    def __str__(self) -> str:
        return f"{self.color} {self.shape} {self.cell}"


@dataclass(frozen=True)
class Reading:
    """The detected content of an image. A cell occurs at most once in the two attributes together.

    Attributes:
      objects: the clear objects, in reading order.
      unclear: cells that show something that is no clear object, in reading order.
    """

    objects: tuple[DetectedObject, ...] = ()
    unclear: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        cells = [item.cell for item in self.objects] + list(self.unclear)
        if len(set(cells)) != len(cells):
            raise ClvrError(f"reading: a cell occurs twice ({', '.join(cells)})")
        if reading_order(self.unclear) != list(self.unclear):
            raise ClvrError(f"reading: unclear cells must be in reading order, got {', '.join(self.unclear)}")


def detect(image: np.ndarray, slack: float = 0.0) -> Reading:
    """Detects the objects in an image.

    Args:
      image: uint8 (64, 64, 3), RGB.
      slack: by how much an object may miss a limit and still be clear, in units of `Examination.clarity`; a negative
        one asks for more than the limits do.
    Returns: the objects and the unclear cells. Objects that are faded, incomplete, merged, of a mixed color or between
      two cells are unclear.
    Raises: ClvrError for other shapes or dtypes.
    """
    return examine(image, slack).reading


class Examination(NamedTuple):
    """All that is measured in one pass over an image.

    Attributes:
      reading: see `detect`.
      pairs: the color and shape that every component is most like, clear or not; for an unclear one with and without
        its soft edge.
      clarity: float32 (9, 3), cells in reading order: 1 if the cell shows something, the margin of its color, and that
        of its shape. A margin is negative if it makes the object unclear, and limited to [-3, 3]; both are -3 for what
        is too large, too small, between cells, or one of two objects in a cell.
    """

    reading: Reading
    pairs: frozenset[tuple[str, str]]
    clarity: np.ndarray


def examine(image: np.ndarray, slack: float = 0.0) -> Examination:
    """Detects the objects in an image, and measures by how much each is clear; arguments and errors of `detect`."""
    from scipy import ndimage  # slow to import, and reading a prompt of this world needs no detector

    image = np.asarray(image)
    if image.shape != (CANVAS, CANVAS, 3) or image.dtype != np.uint8:
        raise ClvrError(f"detect: needs a uint8 image of shape (64, 64, 3), got {image.dtype} {image.shape}")
    difference = image.astype(np.float32) - _BACKGROUND
    labels, number = foreground_components(difference)
    objects: dict[str, DetectedObject] = {}
    unclear: set[str] = set()
    pairs = set()
    clarity = np.zeros((len(CELLS), 3), np.float32)
    for label, box in enumerate(ndimage.find_objects(labels, number), start=1):
        own = labels[box] == label
        if np.count_nonzero(own) < _SPECK:
            continue
        found = _measure(difference, labels, label, box, own)
        pairs.add((found.color, found.shape))
        is_clear = min(found.color_margin, found.shape_margin) >= -slack
        if not is_clear:  # a soft edge may look like another shape than the component by itself
            pairs.add(_pair_of_component(difference, box, own))
        cells = {found.item.cell} if found.item is not None and is_clear else _cells_of(own, box)
        if found.item is None or not is_clear or found.item.cell in objects:
            unclear.update(cells)
        else:
            objects[found.item.cell] = found.item
        for index in map(CELLS.index, cells):
            is_first = not clarity[index, 0]
            clarity[index] = (1, found.color_margin, found.shape_margin) if is_first else (1, -3, -3)
    clear = [cell for cell in reading_order(objects) if cell not in unclear]
    reading = Reading(tuple(objects[cell] for cell in clear), tuple(reading_order(unclear)))
    clarity[:, 1:] = np.clip(clarity[:, 1:], -3, 3)
    return Examination(reading, frozenset(pairs), clarity)


def foreground_components(difference: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels the connected pixels that differ from the background.

    Args:
      difference: float (h, w, 3), image minus background.
    Returns: int labels (h, w), 0 for the background, and the number of components.
    """
    from scipy import ndimage  # see `examine`

    labels, number = ndimage.label(np.abs(difference).max(axis=-1) > _FOREGROUND, structure=_EIGHT)
    return labels, number


def _pair_of_component(difference: np.ndarray, box: tuple[slice, slice], own: np.ndarray) -> tuple[str, str]:
    """Returns the nearest color and the best matching shape of a component without the pixels around it."""
    rows, columns = box
    rgb = np.median(difference[box][own], axis=0)
    color = _COLOR_NAMES[int(((_PALETTE - rgb) ** 2).sum(axis=-1).argmin())]
    alpha = np.where(own, (difference[box] @ rgb) / np.float32(rgb @ rgb), np.float32(0))
    x = np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5)
    y = np.arange(rows.start, rows.stop, dtype=np.float32) + np.float32(0.5)
    return color, SHAPES[int(_shape_matches(alpha, x, y).match.argmax())]


class _Measured(NamedTuple):
    """A component: what it is most like, and by how much; `item` is None if it is too large, too small or misplaced."""

    color: str
    shape: str
    color_margin: float
    shape_margin: float
    item: DetectedObject | None


def _measure(
    difference: np.ndarray, labels: np.ndarray, label: int, box: tuple[slice, slice], own: np.ndarray
) -> _Measured:
    rows, columns = box
    color, rgb, color_margin = _read_color(difference[box][own])
    # The smoothed edge extends beyond the component: include two more pixels, but none of other components.
    rows = slice(max(rows.start - 2, 0), min(rows.stop + 2, CANVAS))
    columns = slice(max(columns.start - 2, 0), min(columns.stop + 2, CANVAS))
    near = labels[rows, columns]
    alpha = (difference[rows, columns] @ rgb) / np.float32(rgb @ rgb)
    alpha = np.where(_grow(near == label) & ((near == label) | (near == 0)), alpha, np.float32(0))
    x = np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5)
    y = np.arange(rows.start, rows.stop, dtype=np.float32) + np.float32(0.5)
    shape, center_x, center_y, radius, shape_margin = _read_shape(alpha, x, y)
    cell = cell_at(center_x, center_y)
    middle = cell_center(cell)
    is_object = (
        max(own.shape) <= _MAX_EXTENT
        and min(own.shape) >= RADIUS_RANGE[0]
        and RADIUS_RANGE[0] - _RADIUS_SLACK <= radius <= RADIUS_RANGE[1] + _RADIUS_SLACK
        and max(abs(center_x - middle[0]), abs(center_y - middle[1])) <= _MAX_OFFSET
    )
    if not is_object:
        return _Measured(color, shape, -3.0, -3.0, None)
    return _Measured(
        color, shape, color_margin, shape_margin, DetectedObject(color, shape, cell, center_x, center_y, radius)
    )


def _read_color(difference_n3: np.ndarray) -> tuple[str, np.ndarray, float]:
    """Returns the nearest palette color of a component, its measured difference from the background, and its margin.

    The margin is negative if the color is unclear. It is 1 at 10 levels from the limits of the distances, and at 5 % of
    the pixels from the limit of mixed colors.
    """
    strength = np.abs(difference_n3).max(axis=-1)
    core = difference_n3[strength >= 0.8 * np.partition(strength, int(0.8 * len(strength)))[int(0.8 * len(strength))]]
    rgb = np.median(core, axis=0).astype(np.float32)
    distances = np.sqrt(((_PALETTE - rgb) ** 2).sum(axis=-1))
    first, second = np.partition(distances, 1)[:2]
    # An object has one color: at most a fifth of its core may be closer to another palette color.
    nearest = ((core[:, None] - _PALETTE) ** 2).sum(axis=-1).argmin(axis=-1)
    best = int(distances.argmin())
    mixed = np.count_nonzero(nearest != best)
    margins = (
        (MAX_COLOR_DISTANCE - first) / 10,
        (second - first - MIN_COLOR_MARGIN) / 10,
        (0.2 * len(core) - mixed) / (0.05 * len(core)),
    )
    return _COLOR_NAMES[best], rgb, float(min(margins))


def _read_shape(alpha: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[str, float, float, float, float]:
    """Returns the best shape of a component, center x and y, radius in pixels, and the margin of the shape.

    The margin is negative if the shape is unclear, and 1 at an overlap of 0.02 above the least one.

    Args:
      alpha: (h, w) share of each pixel that the component covers.
      x: (w,) pixel centers.
      y: (h,) pixel centers.
    """
    found = _shape_matches(alpha, x, y)
    match, best = found.match, int(found.match.argmax())
    second = np.partition(match, -2)[-2]
    margin = min(match[best] - _MIN_MATCH[best], match[best] - second - _MIN_SHAPE_MARGIN) / 0.02
    return SHAPES[best], found.center_x, float(found.center_y[best]), float(found.radius[best]), float(margin)


class _ShapeMatches(NamedTuple):
    """How well a component matches the five shapes: overlap (5,), center in pixels (y for each shape), radius (5,)."""

    match: np.ndarray
    center_x: float
    center_y: np.ndarray
    radius: np.ndarray


def _shape_matches(alpha: np.ndarray, x: np.ndarray, y: np.ndarray) -> _ShapeMatches:
    table = _templates()
    columns, rows = alpha.sum(axis=0), alpha.sum(axis=1)
    mass = max(float(columns.sum()), 1.0)
    radius = np.sqrt(mass / table.area)
    center_x = np.full(len(SHAPES), float(columns @ x) / mass)
    center_y = float(rows @ y) / mass - table.drop * radius
    inside = -table.distances(x, y, center_x, center_y, radius)
    match = np.zeros(len(SHAPES))
    for edge in _EDGES:
        expected = np.clip(0.5 + inside / np.float32(edge), 0.0, 1.0)
        # Intersection over union for masks with soft edges; sum |a - b| = either - both, sum a + b = either + both.
        apart = np.abs(expected - alpha).sum(axis=(1, 2))
        total = expected.sum(axis=(1, 2)) + mass
        match = np.maximum(match, (total - apart) / (total + apart))
    return _ShapeMatches(match, float(center_x[0]), center_y, radius)


class _Templates:
    """Signed distances of the five shapes at radius 1 on a fine grid, to render candidates by table lookup."""

    half, steps = 1.8, 96

    def __init__(self) -> None:
        axis = (np.arange(int(2 * self.half * self.steps) + 1, dtype=np.float32) / self.steps) - np.float32(self.half)
        fine = [signed_distance(shape, axis[None, :], axis[:, None], 1.0) for shape in SHAPES]
        self.distance = np.stack(fine).astype(np.float32)
        inside = self.distance < 0
        mass = inside.sum(axis=(1, 2))
        self.area = mass / self.steps**2
        self.drop = (inside.sum(axis=2) @ axis) / mass

    def distances(
        self, x: np.ndarray, y: np.ndarray, center_x: np.ndarray, center_y: np.ndarray, radius: np.ndarray
    ) -> np.ndarray:
        """Returns the signed distances (5, h, w) in pixels to each shape at its own center and radius, each (5,)."""
        column = self._index(x, center_x, radius)
        row = self._index(y, center_y, radius)
        shape = np.arange(len(SHAPES))[:, None, None]
        out: np.ndarray = self.distance[shape, row[:, :, None], column[:, None, :]] * radius[:, None, None].astype(
            np.float32
        )
        return out

    def _index(self, position: np.ndarray, center: np.ndarray, radius: np.ndarray) -> np.ndarray:
        unit = (position[None, :] - center[:, None]) / radius[:, None]
        out: np.ndarray = np.clip((unit + self.half) * self.steps + 0.5, 0, self.distance.shape[-1] - 1).astype(np.intp)
        return out


@functools.cache
def _templates() -> _Templates:
    return _Templates()


def _grow(mask: np.ndarray) -> np.ndarray:
    """Returns the mask (h, w) dilated by one pixel in all eight directions."""
    tall = mask.copy()
    tall[1:] |= mask[:-1]
    tall[:-1] |= mask[1:]
    wide = tall.copy()
    wide[:, 1:] |= tall[:, :-1]
    wide[:, :-1] |= tall[:, 1:]
    return wide


def _cells_of(own: np.ndarray, box: tuple[slice, slice]) -> set[str]:
    """Returns the cells with at least 12 pixels of a component, and always the cell with most of it."""
    rows, columns = np.nonzero(own)
    row = ((rows + box[0].start + 0.5) / CELL_SIZE).astype(int)
    column = ((columns + box[1].start + 0.5) / CELL_SIZE).astype(int)
    counts = np.bincount(3 * row + column, minlength=len(CELLS))
    enough = max(min(2 * _SPECK, int(counts.max())), 1)
    return {CELLS[index] for index in np.flatnonzero(counts >= enough)}


_EIGHT = np.ones((3, 3), dtype=int)
_BACKGROUND = np.array(BACKGROUND, np.float32)
_COLOR_NAMES = tuple(COLORS)
_PALETTE = np.array(list(COLORS.values()), np.float32) - _BACKGROUND
