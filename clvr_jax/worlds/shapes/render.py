"""Renders scenes: anti-aliased shapes from analytic signed distance fields."""

from __future__ import annotations

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.worlds.shapes.scene import BACKGROUND, CANVAS, COLORS, Scene, SceneObject


def _star_vertices() -> list[tuple[float, float]]:
    # The outer radius of 1.05 and the shift of .1 make the bounding box 2 wide and center it on the origin.
    turns = [(1.05 if i % 2 == 0 else 0.47, np.pi * (i / 5 - 0.5)) for i in range(10)]
    return [(length * np.cos(angle), length * np.sin(angle) + 0.1) for length, angle in turns]


def _cross_vertices(half: float = 0.34) -> list[tuple[float, float]]:
    return [
        *((-half, -1.0), (half, -1.0), (half, -half), (1.0, -half), (1.0, half), (half, half)),
        *((half, 1.0), (-half, 1.0), (-half, half), (-1.0, half), (-1.0, -half), (-half, -half)),
    ]


# Corners at radius 1. Bounding boxes are centered, so that the center of an object is the center of its box.
_VERTICES: dict[str, np.ndarray] = {
    "square": np.array([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)], np.float32),
    "triangle": np.array([(0.0, -0.95), (1.0, 0.95), (-1.0, 0.95)], np.float32),
    "star": np.array(_star_vertices(), np.float32),
    "cross": np.array(_cross_vertices(), np.float32),
}


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Returns the distance to the outline of a shape in pixels, negative inside.

    Args:
      shape: one of SHAPES.
      x, y: offsets from the center of the object in pixels, arrays that broadcast to one shape.
      radius: size of the object in pixels.
    Returns: float32 array of the broadcast shape.
    Raises: ClvrError for an unknown shape.
    """
    if shape == "circle":
        out: np.ndarray = np.sqrt(x * x + y * y) - np.float32(radius)
        return out
    if shape not in _VERTICES:
        raise ClvrError(f"render: unknown shape {shape!r}; known: circle, {', '.join(_VERTICES)}")
    corners = _VERTICES[shape] * np.float32(radius)
    return polygon_distance(x, y, corners)


def polygon_distance(x: np.ndarray, y: np.ndarray, corners_n2: np.ndarray) -> np.ndarray:
    """Returns the exact signed distance to a simple polygon in pixels, negative inside.

    Args:
      x, y: offsets in pixels, arrays that broadcast to one shape.
      corners_n2: corners (x, y) in pixels, in order around the polygon.
    Returns: float32 array of the broadcast shape.
    """
    # The leading axis of the intermediate arrays runs over the edges.
    ones = (1,) * max(np.ndim(x), np.ndim(y))
    edges = np.roll(corners_n2, -1, axis=0) - corners_n2
    ax, ay = (corners_n2[:, i].reshape(-1, *ones) for i in (0, 1))
    ex, ey = (edges[:, i].reshape(-1, *ones) for i in (0, 1))
    px, py = x - ax, y - ay
    along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0.0, 1.0)
    squared = ((px - ex * along) ** 2 + (py - ey * along) ** 2).min(axis=0)
    # Even-odd rule with a ray to the right: an edge counts if it spans this height to the right of the point.
    spans = (py < 0) != (py < ey)
    right = (px * ey < py * ex) == (ey > 0)
    inside = np.logical_xor.reduce(spans & right, axis=0)
    out: np.ndarray = np.sqrt(squared) * np.where(inside, np.float32(-1), np.float32(1))
    return out


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Returns the share of each pixel that the object covers, in [0, 1]; arguments as in `signed_distance`."""
    return np.clip(0.5 - signed_distance(shape, x, y, radius), 0.0, 1.0)


def window(item: SceneObject) -> tuple[slice, slice, np.ndarray, np.ndarray]:
    """Returns the part of the canvas that an object can touch.

    Returns: row slice, column slice, x offsets (1, w) and y offsets (h, 1) of its pixel centers from the object's
    center.
    """
    # No corner is farther than 1.02 radius from the center in x or y; the smoothed edge adds half a pixel.
    reach = 1.02 * item.radius + 0.5
    left, right = (min(max(int(v), 0), CANVAS) for v in (item.x - reach, item.x + reach + 1))
    top, bottom = (min(max(int(v), 0), CANVAS) for v in (item.y - reach, item.y + reach + 1))
    x = np.arange(left, right, dtype=np.float32)[None, :] + np.float32(0.5 - item.x)
    y = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - item.y)
    return slice(top, bottom), slice(left, right), x, y


def render(scene: Scene) -> np.ndarray:
    """Renders a scene.

    Returns: uint8 (64, 64, 3), RGB; later objects cover earlier ones. Parts outside the canvas are cropped.
    """
    image = _BLANK.copy()
    for item in scene.objects:
        rows, columns, x, y = window(item)
        alpha = coverage(item.shape, x, y, item.radius)[..., None]
        patch = image[rows, columns]
        patch += alpha * (_RGB[item.color] - patch)
    return (image + 0.5).astype(np.uint8)


_BLANK = np.full((CANVAS, CANVAS, 3), BACKGROUND, np.float32)
_RGB = {name: np.array(rgb, np.float32) for name, rgb in COLORS.items()}
