"""Tests that images assembled from objects of other images show what their labels say."""

import numpy as np
import pytest

from clvr_jax.data.shapes_augmentation import blur_cells, random_canvas, resembles_held_out_pair
from clvr_jax.data.shapes_patches import assembled_image, cut_patches
from clvr_jax.worlds.shapes.detect import detect

SEED = 5


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(SEED)
    blurred = [blur_cells(random_canvas(rng).render(), rng) for _ in range(60)]
    return [image for image in blurred if not resembles_held_out_pair(image)]


@pytest.fixture(scope="module")
def patches(images):
    return cut_patches(images, [detect(image) for image in images])


def test_nearly_all_objects_are_cut_out(images, patches):
    readings = [detect(image) for image in images]
    clear, unclear = (sum(len(part) for part in parts) for parts in zip(*map(_parts, readings), strict=True))
    assert len(patches.clear) == clear  # a clear object never leaves its cell
    assert 0.8 * unclear <= len(patches.unclear) <= unclear  # a blurred one may


def _parts(reading):
    return reading.objects, reading.unclear


@pytest.mark.parametrize("unclear_share", [0.0, 1.0])
def test_clear_objects_stay_clear_and_unclear_ones_unclear(patches, unclear_share):
    rng = np.random.default_rng(SEED)
    readings = [assembled_image(rng, patches, unclear_share, distorted_share=0.0)[1].reading for _ in range(100)]
    clear = sum(len(reading.objects) for reading in readings)
    unclear = sum(len(reading.unclear) for reading in readings)
    share = unclear / (clear + unclear)
    # Cells begin at whole pixels, so a patch may move by one pixel beside the border that the detector judges by.
    assert abs(share - unclear_share) < 0.03, (clear, unclear)


def test_an_image_follows_from_its_seed_and_shows_no_held_out_pair(patches):
    first, second = (
        [assembled_image(rng, patches) for _ in range(50)] for rng in map(np.random.default_rng, (SEED, SEED))
    )
    for (image, examined), (again, _) in zip(first, second, strict=True):
        np.testing.assert_array_equal(image, again)
        assert examined.reading == detect(image)
        assert not resembles_held_out_pair(image)
    assert len({image.tobytes() for image, _ in first}) > 45


def test_distorted_objects_lie_on_both_sides_of_the_border(patches):
    rng = np.random.default_rng(SEED)
    readings = [assembled_image(rng, patches, 0.0, distorted_share=1.0)[1].reading for _ in range(60)]
    clear = sum(len(reading.objects) for reading in readings)
    unclear = sum(len(reading.unclear) for reading in readings)
    assert min(clear, unclear) > 0.15 * (clear + unclear), (clear, unclear)
