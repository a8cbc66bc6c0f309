"""New images of the shapes world from single objects of generated images.

A few thousand images of a generator show each unclear object in one place beside the same neighbors, and a verifier
learns them by heart. Cut out and put together anew, the same objects make millions of images, and unclear objects,
which are rare in the images of a good generator, can be shown as often as clear ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from clvr_jax.data.shapes import Image
from clvr_jax.data.shapes_augmentation import add_noise, random_direction
from clvr_jax.worlds.shapes.detect import Examination, Reading, examine, foreground_components
from clvr_jax.worlds.shapes.scene import BACKGROUND, CANVAS, CELL_SIZE, CELLS, HELD_OUT_PAIRS, cell_at

_SPECK = 6
"""Components of fewer pixels are no objects, as for the detector."""
_MARGIN = 2
"""Pixels around a component that belong to its soft edge."""
_DISTORTION = 2.4
"""Greatest displacement of the outline of a distorted object, in pixels."""
_STAIN = 130.0
"""Greatest change of color of a part of a distorted object, in levels of the channels."""
_COUNTS = (0.02, 0.06, 0.12, 0.2, 0.22, 0.18, 0.12, 0.05, 0.02, 0.01)
"""Probabilities of 0 to 9 objects in an image."""


class Patch(NamedTuple):
    """An object: its difference from the background, int16 (height, width, 3), and where it begins in its cell."""

    difference: np.ndarray
    row: int
    column: int


class Patches(NamedTuple):
    """Objects that were cut out of images: the clear ones and the unclear ones."""

    clear: list[Patch]
    unclear: list[Patch]


def cut_patches(images: Sequence[Image], readings: Sequence[Reading]) -> Patches:
    """Cuts out the objects that lie in one cell and touch no other object.

    Args:
      images: uint8 (64, 64, 3) each.
      readings: what the detector reads in them.
    """
    patches = Patches([], [])
    for image, reading in zip(images, readings, strict=True):
        unclear = set(reading.unclear)
        for cell, patch in _patches_of(image):
            (patches.unclear if cell in unclear else patches.clear).append(patch)
    return patches


def _patches_of(image: Image) -> Iterator[tuple[str, Patch]]:
    difference = image.astype(np.int16) - np.array(BACKGROUND, np.int16)
    labels, number = foreground_components(difference)
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels, number), start=1):
        own = labels[rows, columns] == label
        if np.count_nonzero(own) < _SPECK:
            continue
        cell = cell_at((columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2)
        top, left = _corner(cell)
        grown = (
            slice(max(rows.start - _MARGIN, top), min(rows.stop + _MARGIN, top + _side())),
            slice(max(columns.start - _MARGIN, left), min(columns.stop + _MARGIN, left + _side())),
        )
        holds_all = grown[0].start <= rows.start and grown[0].stop >= rows.stop
        holds_all = holds_all and grown[1].start <= columns.start and grown[1].stop >= columns.stop
        if holds_all and set(np.unique(labels[grown])) <= {0, label}:
            yield cell, Patch(difference[grown], grown[0].start - top, grown[1].start - left)


def assembled_image(
    rng: np.random.Generator, patches: Patches, unclear_share: float = 0.25, distorted_share: float = 0.25
) -> tuple[Image, Examination]:
    """Puts objects in random cells of an empty image, and adds slight noise.

    Args:
      rng: numpy generator; the same state gives the same image.
      patches: objects to choose from.
      unclear_share: probability that an object is one of the unclear ones.
      distorted_share: probability that an object is distorted, see `_distorted`.
    Returns: the image, uint8 (64, 64, 3), and what the detector measures in it. Nothing resembles a held-out pair.
    """
    while True:
        image = np.full((CANVAS, CANVAS, 3), BACKGROUND, np.int16)
        for index in rng.permutation(len(CELLS))[: int(rng.choice(len(_COUNTS), p=_COUNTS))]:
            options = patches.unclear if rng.random() < unclear_share else patches.clear
            patch = options[int(rng.integers(len(options)))]
            top, left = _corner(CELLS[index])
            height, width = patch.difference.shape[:2]
            is_mirrored = rng.random() < 0.5  # every shape is its own mirror image
            row, column = top + patch.row, left + (_side() - patch.column - width if is_mirrored else patch.column)
            shown = patch.difference[:, ::-1] if is_mirrored else patch.difference
            if rng.random() < distorted_share:
                shown = _distorted(shown, rng)
            image[row : row + height, column : column + width] += shown
        assembled = add_noise(np.clip(image, 0, 255).astype(np.uint8), rng)
        examined = examine(assembled)
        if HELD_OUT_PAIRS.isdisjoint(examined.pairs):
            return assembled, examined


def _distorted(difference: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns an object with its outline bent, or a part of it in another tint.

    These are the ways in which a generator misses an object, so many of the results lie close to the border between
    clear and unclear, on either side.

    Args:
      difference: int16 (height, width, 3) from the background.
      rng: numpy generator.
    """
    height, width = difference.shape[:2]
    if rng.random() < 0.7:
        strength = rng.uniform(0.2, _DISTORTION)
        moves = [ndimage.gaussian_filter(rng.normal(size=(height, width)), 3.0, mode="reflect") for _ in range(2)]
        rows, columns = (strength * move / max(float(np.abs(move).max()), 1e-6) for move in moves)
        grid = np.mgrid[:height, :width] + np.stack([rows, columns])
        bent = [ndimage.map_coordinates(channel, grid, order=1) for channel in np.moveaxis(difference, -1, 0)]
        return np.stack(bent, axis=-1)
    center = rng.uniform(0, (height, width))
    offsets = np.mgrid[:height, :width] - center[:, None, None]
    spot = np.exp(-(offsets**2).sum(axis=0) / (2 * rng.uniform(2, 6) ** 2))
    strongest = max(int(np.abs(difference).max()), 1)
    inside = np.abs(difference).max(axis=-1) / strongest
    change = rng.uniform(0, _STAIN) * random_direction(rng, 3)
    stained: np.ndarray = np.round(difference + (spot * inside)[..., None] * change).astype(np.int16)
    return stained


def _corner(cell: str) -> tuple[int, int]:
    """The first row and column of a cell."""
    index = CELLS.index(cell)
    return round(index // 3 * CELL_SIZE), round(index % 3 * CELL_SIZE)


def _side() -> int:
    return int(CELL_SIZE)
