"""Simulated images of the shapes world with labels, with the imperfections of image generators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from clvr_jax.data.shapes import Canvas, Image, corrupted_canvas
from clvr_jax.worlds.shapes.detect import Reading, detect, examine
from clvr_jax.worlds.shapes.render import coverage, window
from clvr_jax.worlds.shapes.requirements import describe
from clvr_jax.worlds.shapes.scene import CELL_SIZE, CELLS, HELD_OUT_PAIRS, cell_center, sample_scene_random

_TINT = 44.0
"""Greatest distance of an object's color from the named one, in units of the channels, which have 256 levels."""
_GRADIENT = 120.0
"""Greatest difference of color between two ends of an object, in the same units."""
_GRADIENT_SHARE = 0.5
"""Share of the images whose objects are unevenly colored."""
_SOFTNESS = 0.9
"""Greatest standard deviation of the blur of soft edges, in pixels."""


def random_canvas(rng: np.random.Generator) -> Canvas:
    """Samples a canvas of 0 to 9 objects, often with simulated mistakes."""
    number = int(rng.choice(10, p=(0.03, 0.05, 0.08, 0.12, 0.16, 0.18, 0.16, 0.1, 0.07, 0.05)))
    canvas = Canvas(sample_scene_random(rng, number), seed=int(rng.integers(2**31)))
    return corrupted_canvas(canvas, rng, int(rng.choice(4, p=(0.4, 0.3, 0.2, 0.1))), CELLS)


def add_noise(image: Image, rng: np.random.Generator) -> Image:
    """Returns the image with slight noise and a slight change of brightness."""
    changed = image + rng.normal(0, rng.uniform(0, 6), image.shape) + rng.uniform(-4, 4)
    return np.clip(np.round(changed), 0, 255).astype(np.uint8)


def blur_cells(image: Image, rng: np.random.Generator, cells: Sequence[str] = CELLS) -> Image:
    """Returns the image with one or two of the cells blurred, which simulates unfinished objects."""
    changed = image.copy()
    for index in rng.permutation(len(cells))[: int(rng.integers(1, 3))]:
        x, y = cell_center(cells[index])
        half = CELL_SIZE / 2
        rows, columns = (slice(max(round(value - half), 0), round(value + half)) for value in (y, x))
        sigma = rng.uniform(1.0, 4.0)
        changed[rows, columns] = ndimage.gaussian_filter(image[rows, columns], (sigma, sigma, 0), mode="nearest")
    return changed


def vary_appearance(canvas: Canvas, rng: np.random.Generator) -> Image:
    """Renders the canvas with slightly different or uneven colors and softer edges; no clear object becomes unclear.

    With these variations, the verifier cannot learn clear objects as a list of the pairs of the training set.
    Generators color objects unevenly, most of all pairs that they were not trained on.
    """
    sigma = rng.uniform(0.0, _SOFTNESS)
    strength = 1.0 if rng.random() < _GRADIENT_SHARE else 0.0
    for gradient in (strength, 0.5 * strength, 0.0):
        image = canvas.render().astype(np.float32)
        for item in canvas.scene.objects:
            rows, columns, x, y = window(item)
            change = rng.uniform(0, _TINT) * random_direction(rng, 3)
            change = change + gradient * color_gradient(rng, x, y, item.radius, _GRADIENT)
            image[rows, columns] += coverage(item.shape, x, y, item.radius)[..., None] * change
        changed: np.ndarray = np.clip(np.round(ndimage.gaussian_filter(image, (sigma, sigma, 0))), 0, 255).astype(
            np.uint8
        )
        if _same_content(detect(changed), canvas.reading()):
            return changed
    return canvas.render()


def color_gradient(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, radius: float, greatest: float
) -> np.ndarray:
    """Samples a change of color that grows along one direction of an object and is 0 in its center.

    Args:
      rng: numpy generator.
      x: offsets of the pixels from the center, (1, width).
      y: the same, (height, 1).
      radius: of the object, in the same units.
      greatest: greatest difference of color between two ends of the object, in levels of the channels.
    Returns: float array (height, width, 3).
    """
    along = random_direction(rng, 2)
    position = np.clip((along[0] * x + along[1] * y) / (2 * radius), -0.5, 0.5)
    out: np.ndarray = position[..., None] * (rng.uniform(0, greatest) * random_direction(rng, 3))
    return out


def random_direction(rng: np.random.Generator, dimensions: int) -> np.ndarray:
    """Samples a vector of length 1, all directions alike."""
    direction = rng.normal(size=dimensions)
    return direction / np.linalg.norm(direction)


def _same_content(first: Reading, second: Reading) -> bool:
    return describe(first) == describe(second)


def resembles_held_out_pair(image: Image) -> bool:
    """Returns whether an image shows one of HELD_OUT_PAIRS, or anything unclear that is most like one.

    If training showed unclear objects that look like these pairs, and never clear ones, it would teach that such a pair
    is unclear.
    """
    return not HELD_OUT_PAIRS.isdisjoint(examine(image).pairs)
