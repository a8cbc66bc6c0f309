"""Simulated images of the shapes world with labels, with the imperfections of image generators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from clvr_jax.data.shapes import Canvas, Image, corrupted_canvas
from clvr_jax.worlds.shapes.detect import Reading, detect
from clvr_jax.worlds.shapes.render import coverage, window
from clvr_jax.worlds.shapes.requirements import describe
from clvr_jax.worlds.shapes.scene import CELL_SIZE, CELLS, HELD_OUT_PAIRS, cell_center, sample_scene_random

_TINT = 44.0
"""Greatest distance of an object's color from the named one, in units of the channels, which have 256 levels."""
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
    """Renders the canvas with slightly different colors and softer edges, without making any object unclear.

    With these variations, the verifier cannot learn clear objects as a list of the pairs of the training set.
    """
    image = canvas.render().astype(np.float32)
    for item in canvas.scene.objects:
        rows, columns, x, y = window(item)
        direction = rng.normal(size=3)
        change = rng.uniform(0, _TINT) * direction / np.linalg.norm(direction)
        image[rows, columns] += coverage(item.shape, x, y, item.radius)[..., None] * change
    sigma = rng.uniform(0.0, _SOFTNESS)
    changed = np.clip(np.round(ndimage.gaussian_filter(image, (sigma, sigma, 0))), 0, 255).astype(np.uint8)
    return changed if _same_content(detect(changed), canvas.reading()) else canvas.render()


def _same_content(first: Reading, second: Reading) -> bool:
    return describe(first) == describe(second)


def has_held_out_object(reading: Reading) -> bool:
    """Returns whether an image shows one of HELD_OUT_PAIRS."""
    return any((item.color, item.shape) in HELD_OUT_PAIRS for item in reading.objects)
