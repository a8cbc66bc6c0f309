import itertools

import numpy as np
import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.worlds.shapes.render import coverage, render
from clvr_jax.worlds.shapes.scene import (
    BACKGROUND,
    CELLS,
    COLORS,
    HELD_OUT_PAIRS,
    SHAPES,
    Scene,
    SceneObject,
    cell_at,
    cell_center,
    place,
    reading_order,
    sample_scene_random,
)


def test_cells_are_named_row_by_row() -> None:
    assert [cell_at(*cell_center(cell)) for cell in CELLS] == list(CELLS)
    assert cell_center("top right") == pytest.approx((320 / 6, 64 / 6))
    assert reading_order(["bottom", "center", "top right", "top left"]) == ["top left", "top right", "center", "bottom"]


def test_held_out_pairs_have_different_colors_and_shapes() -> None:
    assert len(HELD_OUT_PAIRS) == 4
    assert len({color for color, _ in HELD_OUT_PAIRS}) == len({shape for _, shape in HELD_OUT_PAIRS}) == 4


def test_random_scenes_are_valid() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene_random(rng) for _ in range(500)]
    sizes = np.bincount([len(scene.objects) for scene in scenes], minlength=7)
    assert sizes[0] == 0
    assert (sizes[1:7] > 0).all()
    assert sizes[1:5].sum() > 350
    for item in itertools.chain.from_iterable(scene.objects for scene in scenes):
        assert (item.color, item.shape) not in HELD_OUT_PAIRS
        assert 7 <= item.radius <= 9
        assert cell_at(item.x, item.y) == item.cell
    wild = [item for _ in range(200) for item in sample_scene_random(rng, allow_held_out=True).objects]
    assert {(item.color, item.shape) for item in wild} >= HELD_OUT_PAIRS


def test_the_same_seed_gives_the_same_scene() -> None:
    first, second = (sample_scene_random(np.random.default_rng(5)) for _ in range(2))
    assert first == second


def test_neighbors_keep_background_between_them() -> None:
    """Checks that two objects of a full row or column are separated by a line of pixels of pure background."""
    rng = np.random.default_rng(1)
    for _ in range(100):
        foreground = (render(sample_scene_random(rng, 9)) != BACKGROUND).any(axis=-1)
        for first, second in ((0, 1), (1, 2)):
            start, stop = (round((index + 0.5) * 64 / 3) for index in (first, second))
            for row in range(3):
                band = slice(round(row * 64 / 3), round((row + 1) * 64 / 3))
                assert (~foreground[band, start:stop].any(axis=0)).any()
                assert (~foreground[start:stop, band].any(axis=1)).any()


def test_render_puts_the_palette_color_on_the_background() -> None:
    for color, shape in itertools.product(COLORS, SHAPES):
        image = render(Scene((SceneObject(color, shape, "right", *cell_center("right"), 8.0),)))
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8
        assert tuple(image[32, 53]) == COLORS[color]
        rows, columns = np.nonzero((image != BACKGROUND).any(axis=-1))
        assert rows.min() >= 23
        assert rows.max() <= 41
        assert columns.min() >= 44


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_the_share_of_each_pixel(shape: str) -> None:
    """Compares with 16 x 16 samples per pixel; the distance field is exact at straight edges and softer at corners."""
    pixels = np.arange(-12, 12, dtype=np.float32) + 0.5
    analytic = coverage(shape, pixels[None, :] - 0.3, pixels[:, None] + 0.2, 8.3)
    fine = (np.arange(24 * 16, dtype=np.float32) + 0.5) / 16 - 12
    inside = coverage(shape, fine[None, :] - 0.3, fine[:, None] + 0.2, 8.3) > 0.5
    sampled = inside.reshape(24, 16, 24, 16).mean(axis=(1, 3))
    assert np.abs(analytic - sampled).max() < 0.3
    assert np.abs(analytic - sampled).mean() < 0.01
    assert analytic.sum() == pytest.approx(sampled.sum(), rel=0.01)


def test_shapes_are_distinct_at_the_smallest_radius() -> None:
    pixels = np.arange(-12, 12, dtype=np.float32) + 0.5
    masks = {shape: coverage(shape, pixels[None, :], pixels[:, None], 7.0) for shape in SHAPES}
    for first, second in itertools.combinations(SHAPES, 2):
        overlap = np.minimum(masks[first], masks[second]).sum() / np.maximum(masks[first], masks[second]).sum()
        assert overlap < 0.87, (first, second, overlap)


def test_objects_outside_the_canvas_are_cropped() -> None:
    image = render(Scene((SceneObject("red", "circle", "top left", -20.0, 3.0, 8.0),)))
    assert (image == BACKGROUND).all()
    image = render(Scene((SceneObject("red", "circle", "bottom right", 64.0, 64.0, 8.0),)))
    assert tuple(image[63, 63]) == COLORS["red"]


def test_invalid_scenes_are_errors() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ClvrError, match="unknown color 'pink'"):
        place("pink", "circle", "top", rng)
    with pytest.raises(ClvrError, match="unknown cell 'middle'"):
        place("red", "circle", "middle", rng)
    with pytest.raises(ClvrError, match="radius > 0"):
        SceneObject("red", "circle", "top", 1.0, 1.0, 0.0)
    with pytest.raises(ClvrError, match="two objects in one cell"):
        Scene((place("red", "circle", "top", rng), place("blue", "star", "top", rng)))
    with pytest.raises(ClvrError, match=r"0\.\.9, got 10"):
        sample_scene_random(rng, 10)
