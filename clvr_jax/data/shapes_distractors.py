"""Images with colors and shapes that no prompt of the shapes world names, to train the verifier on clear and unclear.

The world has 40 pairs of color and shape. A verifier that is trained on 36 clear pairs, and on blurred and mixed
objects as unclear, memorizes the 36 pairs and describes the held-out pairs as unclear. Seventeen additional
colors and eight additional shapes make eight times as many pairs, each of them rare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

from clvr_jax.data.shapes_augmentation import color_gradient, random_direction, resembles_held_out_pair
from clvr_jax.worlds.shapes.detect import (
    MAX_COLOR_DISTANCE,
    MIN_COLOR_MARGIN,
    Examination,
    Reading,
    detect,
    foreground_components,
)
from clvr_jax.worlds.shapes.render import polygon_distance, signed_distance
from clvr_jax.worlds.shapes.scene import (
    BACKGROUND,
    CANVAS,
    CELL_SIZE,
    CELLS,
    COLORS,
    HELD_OUT_PAIRS,
    SHAPES,
    cell_center,
    sample_position,
)

MORE_COLORS: dict[str, tuple[int, int, int]] = {
    "pink": (245, 150, 190),
    "tan": (205, 170, 120),
    "gray": (140, 140, 140),
    "lime": (150, 220, 40),
    "navy": (20, 30, 100),
    "olive": (120, 120, 30),
    "teal": (20, 110, 110),
    "lilac": (200, 150, 250),
    "plum": (150, 60, 120),
    "indigo": (80, 20, 170),
    "magenta": (235, 60, 190),
    "mint": (150, 235, 180),
    "sky": (130, 190, 245),
    "maroon": (110, 10, 40),
    "rose": (240, 60, 110),
    "emerald": (20, 200, 120),
    "violet": (110, 90, 250),
}
"""Additional colors; each is at least 70 levels from the named colors and from the others. Some are near every named
color: where all colors near a shape's held-out color are missing, the verifier takes the pair for unclear."""
_SOFT = 0.9
"""Greatest standard deviation, in pixels, of a blur that leaves an object clear; the detector's limit is about 1.1."""
_BLURRED = (1.5, 4.0)
"""Range of the standard deviation, in pixels, of a blur that makes an object unclear."""
_TINT = 25.0
"""Greatest distance of an object's color from the color of its name, in levels of the channels."""
_OFF_PALETTE = 12.0
"""Least distance of an additional color from what the detector takes for a named one, in the same units."""
_GRADIENT = 80.0
"""Greatest difference of color between two ends of an object, in the same units."""

Distance = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
"""(x offsets, y offsets, radius), all in pixels -> signed distance in pixels, negative inside."""


def _polygon(*corners: tuple[float, float]) -> Distance:
    corners_n2 = np.array(corners, np.float32)
    return lambda x, y, radius: polygon_distance(x, y, corners_n2 * np.float32(radius))


def _heart() -> Distance:
    turns = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = np.sin(turns) ** 3
    y = -(13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)) / 16 - 0.1
    return _polygon(*zip(x.tolist(), y.tolist(), strict=True))


def _ring(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    out: np.ndarray = np.abs(np.sqrt(x * x + y * y) - 0.75 * radius) - 0.25 * radius
    return out


def _moon(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    bite = 0.85 * radius - np.sqrt((x - 0.55 * radius) ** 2 + y * y)
    out: np.ndarray = np.maximum(signed_distance("circle", x, y, radius), bite)
    return out


MORE_SHAPES: dict[str, Distance] = {
    "kite": _polygon((0, -1), (0.75, 0), (0, 1), (-0.75, 0)),
    "heart": _heart(),
    "ring": _ring,
    "moon": _moon,
    "bar": _polygon((-1, -0.4), (1, -0.4), (1, 0.4), (-1, 0.4)),
    "arrow": _polygon((-1, -0.3), (0, -0.3), (0, -0.9), (1, 0), (0, 0.9), (0, 0.3), (-1, 0.3)),
    "wedge": _polygon((-1, -0.95), (1, -0.95), (0, 0.95)),
    "bow": _polygon((-0.9, -0.95), (0.9, -0.95), (0.15, 0), (0.9, 0.95), (-0.9, 0.95), (-0.15, 0)),
}
"""Additional shapes."""


def distractor_image(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Samples an image of 0 to 7 objects of all colors and shapes, some of them blurred or mixed with another.

    Args:
      rng: numpy generator; the same state gives the same image.
    Returns: the image, uint8 (64, 64, 3), and its description. No clear object is one of HELD_OUT_PAIRS.
    """
    image = np.full((CANVAS, CANVAS, 3), BACKGROUND, np.float32)
    number = int(rng.choice(10, p=(0.02, 0.08, 0.15, 0.23, 0.25, 0.17, 0.08, 0.02, 0.0, 0.0)))
    chosen = sorted(int(index) for index in rng.permutation(len(CELLS))[:number])
    clauses = []
    for index in chosen:
        cell = CELLS[index]
        is_clear = rng.random() < 0.72
        color, shape, patch = (
            _clear_object(rng, cell) if is_clear else ("something", "unclear", _unclear_patch(rng, cell))
        )
        image[_area(cell)] = patch
        clauses.append(f"{color} {shape} {cell}")
    return np.clip(np.round(image), 0, 255).astype(np.uint8), f"I see {'; '.join(clauses) or 'nothing'}."


def _clear_object(rng: np.random.Generator, cell: str) -> tuple[str, str, np.ndarray]:
    color, shape = _sample_pair(rng)
    return color, shape, _blurred(_patch(rng, color, shape, cell), rng.uniform(0, _SOFT))


def _unclear_patch(rng: np.random.Generator, cell: str) -> np.ndarray:
    """Samples a blurred object or a mixture of two, which is not most like one of HELD_OUT_PAIRS."""
    while True:
        color, shape = _sample_pair(rng)
        patch = _patch(rng, color, shape, cell)
        if rng.random() < 0.5:
            patch = _blurred(patch, rng.uniform(*_BLURRED))
        else:
            patch = _blurred(_mixed(rng, patch, shape, cell), rng.uniform(0, _SOFT))
        canvas = np.full((CANVAS, CANVAS, 3), BACKGROUND, np.uint8)
        canvas[_area(cell)] = np.clip(np.round(patch), 0, 255)
        if not detect(canvas).objects and not resembles_held_out_pair(canvas):
            return patch


def _blurred(patch: np.ndarray, sigma: float) -> np.ndarray:
    out: np.ndarray = ndimage.gaussian_filter(patch, (sigma, sigma, 0), mode="nearest")
    return out


def recolor_objects(image: np.ndarray, reading: Reading, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Gives the objects of an image other colors, each with the imperfections that it had.

    What makes an object of a generator unclear, uneven color or a ragged outline, then depends on no pair of color and
    shape. Colors are shifted, so that the distance from the named color, which the detector judges, stays the same.

    Args:
      image: uint8 (64, 64, 3).
      reading: what the detector reads in it.
      rng: numpy generator; the same state gives the same image.
    Returns: the image and its description. No object is given one of HELD_OUT_PAIRS, and no unclear object a color of
      these; an object that would be unclear in its new color, or clear only there, keeps its color.
    """
    difference = image.astype(np.float32) - np.array(BACKGROUND, np.float32)
    changed = image.astype(np.float32)
    clauses = {cell: f"something unclear {cell}" for cell in reading.unclear}
    clauses |= {item.cell: str(item) for item in reading.objects}
    labels, number = foreground_components(difference)
    owners = {int(labels[int(item.y), int(item.x)]): item for item in reading.objects}
    for label in range(1, number + 1):
        own = labels == label
        item = owners.get(label)
        if np.count_nonzero(own) < _LEAST_RECOLORED:
            continue
        rgb = np.median(difference[own], axis=0)
        distances = np.linalg.norm(_NAMED - rgb, axis=1)
        name = list(COLORS)[int(distances.argmin())] if item is None else item.color
        color, shift = _other_color(rng, name, None if item is None else item.shape)
        if not _keeps_clarity(rgb, shift, item is not None, color):
            continue
        changed += _color_change(difference, labels, label, rgb, shift)
        if item is not None:
            clauses[item.cell] = f"{color} {item.shape} {item.cell}"
    seen = [clauses[cell] for cell in CELLS if cell in clauses]
    return np.clip(np.round(changed), 0, 255).astype(np.uint8), f"I see {'; '.join(seen) or 'nothing'}."


def random_colors(image: np.ndarray, examined: Examination, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Gives each object of an image a random color, which need not have a name, with the imperfections that it had.

    How clear an outline is then depends on no pair of color and shape, and the colors all around the held-out ones are
    seen.

    Args:
      image: uint8 (64, 64, 3).
      examined: what the detector measures in it.
      rng: numpy generator; the same state gives the same image.
    Returns: the image, and its clarity as in `Examination`, float32 (9, 3), but NaN for the margins of colors. Nothing
      is given a color like that of a held-out pair of its shape, and nothing unclear a color like that of any; an image
      that shows such a pair all the same is returned as it was.
    """
    difference = image.astype(np.float32) - np.array(BACKGROUND, np.float32)
    changed = image.astype(np.float32)
    labels, number = foreground_components(difference)
    shapes = {int(labels[int(item.y), int(item.x)]): item.shape for item in examined.reading.objects}
    for label in range(1, number + 1):
        if np.count_nonzero(labels == label) >= _LEAST_RECOLORED:
            rgb = np.median(difference[labels == label], axis=0)
            shift = _random_color(rng, shapes.get(label)) - np.array(BACKGROUND, np.float32) - rgb
            changed += _color_change(difference, labels, label, rgb, shift)
    recolored = np.clip(np.round(changed), 0, 255).astype(np.uint8)
    # The color of an uneven object is not that of its median pixel.
    if not HELD_OUT_PAIRS.isdisjoint((item.color, item.shape) for item in detect(recolored).objects):
        return image, examined.clarity
    clarity = examined.clarity.copy()
    clarity[clarity[:, 0] > 0, 1] = np.nan
    return recolored, clarity


def _random_color(rng: np.random.Generator, shape: str | None) -> np.ndarray:
    """Samples a color far from the background, and from those of the shape's held-out pairs; of all without a shape."""
    avoided = [COLORS[color] for color, held_out in HELD_OUT_PAIRS if shape in (None, held_out)]
    while True:
        color = rng.uniform(0, 255, 3)
        is_visible = np.linalg.norm(color - np.array(BACKGROUND)) >= _LEAST_CONTRAST
        if is_visible and all(np.linalg.norm(color - other) >= MAX_COLOR_DISTANCE + _OFF_PALETTE for other in avoided):
            return color.astype(np.float32)


def _color_change(
    difference: np.ndarray, labels: np.ndarray, label: int, rgb: np.ndarray, shift: np.ndarray
) -> np.ndarray:
    """Returns what is added to an image to shift the color of one component and of its soft edge."""
    own = labels == label
    coverage = np.clip(difference @ rgb / (rgb @ rgb), 0, 1)
    near = ndimage.binary_dilation(own, iterations=2) & (own | (labels == 0))
    change: np.ndarray = np.where(near, coverage, 0.0)[..., None] * shift
    return change.astype(np.float32)


def _other_color(rng: np.random.Generator, name: str, shape: str | None) -> tuple[str, np.ndarray]:
    """Samples a color and returns a tint of it less the named one; without a shape, it is like no held-out pair's."""
    if shape is None:
        options: Sequence[str] = _UNCLEAR_COLORS
    else:
        options = [color for color in _COLOR_NAMES if (color, shape) not in HELD_OUT_PAIRS]
    color = options[int(rng.integers(len(options)))]
    tint = rng.uniform(0, _TINT) * random_direction(rng, 3)
    return color, (np.array(_COLORS[color]) - np.array(_COLORS[name]) + tint).astype(np.float32)


def _keeps_clarity(rgb: np.ndarray, shift: np.ndarray, is_clear: bool, color: str) -> bool:
    """Whether an object that is shifted to a color is as near to it, compared with all others, as it must be."""
    distances = np.linalg.norm(_ALL - (rgb + shift), axis=1)
    own = distances[_COLOR_NAMES.index(color)]
    others = np.delete(distances, _COLOR_NAMES.index(color)).min()
    if is_clear:
        named = np.inf if color in COLORS else np.linalg.norm(_NAMED - (rgb + shift), axis=1).min()
        is_itself = own <= MAX_COLOR_DISTANCE and others - own >= MIN_COLOR_MARGIN
        return bool(is_itself and named >= MAX_COLOR_DISTANCE + _OFF_PALETTE)
    before = np.sort(np.linalg.norm(_NAMED - rgb, axis=1))
    is_between = before[0] <= MAX_COLOR_DISTANCE and before[1] - before[0] < MIN_COLOR_MARGIN
    return not is_between and bool(others >= own or own > MAX_COLOR_DISTANCE)


def _sample_pair(rng: np.random.Generator) -> tuple[str, str]:
    while True:
        pair = (_COLOR_NAMES[int(rng.integers(len(_COLOR_NAMES)))], _SHAPE_NAMES[int(rng.integers(len(_SHAPE_NAMES)))])
        if pair not in HELD_OUT_PAIRS:
            return pair


def _area(cell: str) -> tuple[slice, slice]:
    """Returns the rows and columns of the canvas that belong to a cell."""
    x, y = cell_center(cell)
    half = CELL_SIZE / 2
    return slice(round(y - half), round(y + half)), slice(round(x - half), round(x + half))


def _patch(rng: np.random.Generator, color: str, shape: str, cell: str) -> np.ndarray:
    """Renders one object on the background: float32 (height, width, 3) of its cell."""
    center_x, center_y, radius = sample_position(cell, rng)
    rows, columns = _area(cell)
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] + np.float32(0.5 - center_x)
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + np.float32(0.5 - center_y)
    more = MORE_SHAPES.get(shape)
    distance = signed_distance(shape, x, y, radius) if more is None else more(x, y, radius)
    alpha = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    tint = rng.uniform(0, _TINT) * random_direction(rng, 3)
    if rng.random() < 0.4:
        tint = tint + color_gradient(rng, x, y, radius, _GRADIENT)
    background = np.array(BACKGROUND, np.float32)
    return (background + alpha * (np.array(_COLORS[color]) + tint - background)).astype(np.float32)


def _mixed(rng: np.random.Generator, patch: np.ndarray, shape: str, cell: str) -> np.ndarray:
    """Mixes an object with another one: halves of both, or a blend."""
    while (pair := _sample_pair(rng))[1] == shape:  # a blend of two colors of one shape would be a clear object
        pass
    other = _patch(rng, *pair, cell)
    if rng.random() < 0.5:
        share = rng.uniform(0.3, 0.7)
        return share * patch + (1 - share) * other
    mixed = patch.copy()
    if rng.random() < 0.5:
        mixed[len(mixed) // 2 :] = other[len(mixed) // 2 :]
    else:
        mixed[:, mixed.shape[1] // 2 :] = other[:, mixed.shape[1] // 2 :]
    return mixed


_COLORS = {**COLORS, **MORE_COLORS}
_LEAST_CONTRAST = 120.0
"""Least distance of a random color from the background, in levels of the channels."""
_LEAST_RECOLORED = 24
"""Least number of pixels of an object that is recolored."""
_COLOR_NAMES = tuple(_COLORS)
_SHAPE_NAMES = (*SHAPES, *MORE_SHAPES)
_UNCLEAR_COLORS = ("red", "yellow", "blue", "black", "pink", "gray", "navy", "olive")
"""Colors for objects of no clear shape: none is most like a color of HELD_OUT_PAIRS."""
_NAMED = np.array(list(COLORS.values()), np.float32) - np.array(BACKGROUND, np.float32)
_ALL = np.array(list(_COLORS.values()), np.float32) - np.array(BACKGROUND, np.float32)
