"""The content of an image of the shapes world: colored shapes in a 3 x 3 grid of cells.

Coordinates are in pixels with the origin at the top left corner of the canvas, x to the right and y down; the center
of the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from clvr_jax.errors import ClvrError

CANVAS = 64
BACKGROUND = (250, 250, 250)
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "orange": (240, 140, 30),
    "cyan": (40, 190, 200),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
HELD_OUT_PAIRS = frozenset({("purple", "star"), ("cyan", "triangle"), ("orange", "square"), ("green", "cross")})
"""(color, shape) pairs that no training prompt and no training scene contains."""

CELL_SIZE = CANVAS / 3
RADIUS_RANGE = (7.0, 9.0)
# Objects of neighboring cells are at least two pixels apart: edges are smoothed over half a pixel on each side, so that
# at least one full pixel of pure background separates them.
_MARGIN = 1.0
_NUM_OBJECTS_WEIGHTS = (0.2, 0.25, 0.2, 0.15, 0.1, 0.1)
_CELL_INDEX = {cell: index for index, cell in enumerate(CELLS)}


@dataclass(frozen=True)
class SceneObject:
    """An object to be rendered: names of color, shape and cell; center (x, y) and radius in pixels."""

    color: str
    shape: str
    cell: str
    x: float
    y: float
    radius: float

    def __post_init__(self) -> None:
        check_names(self.color, self.shape, self.cell)
        if not (math.isfinite(self.x) and math.isfinite(self.y) and math.isfinite(self.radius) and self.radius > 0):
            raise ClvrError(
                f"scene object: x, y, radius must be finite and radius > 0, got {self.x, self.y, self.radius}"
            )


@dataclass(frozen=True)
class Scene:
    """The content of an image: objects in the order in which they are rendered, at most one per cell."""

    objects: tuple[SceneObject, ...] = ()

    def __post_init__(self) -> None:
        cells = [item.cell for item in self.objects]
        if len(set(cells)) != len(cells):
            raise ClvrError(f"scene: two objects in one cell ({', '.join(cells)}); give every object its own cell")


def check_names(color: str, shape: str, cell: str) -> None:
    """Raises ClvrError unless color, shape and cell are valid names."""
    for kind, value, known in (("color", color, COLORS), ("shape", shape, SHAPES), ("cell", cell, CELLS)):
        if value not in known:
            raise ClvrError(f"shapes world: unknown {kind} {value!r}; known: {', '.join(known)}")


def cell_index(cell: str) -> int:
    """Returns the index of a cell in reading order, 0..8. Raises: ClvrError for other names."""
    if cell not in _CELL_INDEX:
        raise ClvrError(f"shapes world: unknown cell {cell!r}; known: {', '.join(CELLS)}")
    return _CELL_INDEX[cell]


def cell_center(cell: str) -> tuple[float, float]:
    """Returns the center (x, y) of a cell in pixels."""
    row, column = divmod(cell_index(cell), 3)
    return (column + 0.5) * CELL_SIZE, (row + 0.5) * CELL_SIZE


def cell_pixels(cell: str) -> tuple[slice, slice]:
    """Returns the rows and columns of an image that a cell covers."""
    x, y = cell_center(cell)
    half = CELL_SIZE / 2
    return slice(max(round(y - half), 0), round(y + half)), slice(max(round(x - half), 0), round(x + half))


def cell_at(x: float, y: float) -> str:
    """Returns the cell that contains a position in pixels, the nearest cell for positions outside the canvas."""
    row, column = (min(max(int(value / CELL_SIZE), 0), 2) for value in (y, x))
    return CELLS[3 * row + column]


def reading_order(cells: Iterable[str]) -> list[str]:
    """Returns the cells sorted row by row, left to right."""
    return sorted(cells, key=cell_index)


def place(color: str, shape: str, cell: str, rng: np.random.Generator) -> SceneObject:
    """Returns an object in a cell with random size and position, see `sample_position`."""
    return SceneObject(color, shape, cell, *sample_position(cell, rng))


def sample_position(cell: str, rng: np.random.Generator) -> tuple[float, float, float]:
    """Samples the position and size of an object in its cell.

    The radius is uniform in RADIUS_RANGE. The center is uniform in the range in which objects of neighboring cells have
    at least two pixels of background between them.

    Returns: x and y of the center, and the radius, in pixels.
    """
    radius, across, down = rng.random(3).tolist()
    low, high = RADIUS_RANGE
    radius = low + (high - low) * radius
    reach = CELL_SIZE / 2 - radius - _MARGIN
    x, y = cell_center(cell)
    return x + (2 * across - 1) * reach, y + (2 * down - 1) * reach, radius


def sample_pair(rng: np.random.Generator, allow_held_out: bool = False) -> tuple[str, str]:
    """Samples (color, shape) uniformly; without `allow_held_out` never one of HELD_OUT_PAIRS."""
    pairs = _ALL_PAIRS if allow_held_out else _TRAIN_PAIRS
    return pairs[int(rng.integers(len(pairs)))]


def sample_scene_random(
    rng: np.random.Generator, num_objects: int | None = None, allow_held_out: bool = False
) -> Scene:
    """Samples a scene.

    Args:
      rng: numpy generator; the same state gives the same scene.
      num_objects: 0..9; None samples 1..6, mostly 1..4.
      allow_held_out: also use HELD_OUT_PAIRS; never set it for training data.
    Raises: ClvrError for a number of objects out of range.
    """
    if num_objects is None:
        num_objects = int(rng.choice(len(_NUM_OBJECTS_WEIGHTS), p=_NUM_OBJECTS_WEIGHTS)) + 1
    if not 0 <= num_objects <= len(CELLS):
        raise ClvrError(f"sample_scene_random: num_objects must be 0..{len(CELLS)}, got {num_objects}")
    cells = rng.permutation(len(CELLS))[:num_objects]
    return Scene(tuple(place(*sample_pair(rng, allow_held_out), CELLS[cell], rng) for cell in cells))


_ALL_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
_TRAIN_PAIRS = tuple(pair for pair in _ALL_PAIRS if pair not in HELD_OUT_PAIRS)
