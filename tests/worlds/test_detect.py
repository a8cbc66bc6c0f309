from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage

from clvr_jax.data.shapes_augmentation import blur_cells, random_canvas
from clvr_jax.errors import ClvrError
from clvr_jax.worlds.shapes.detect import DetectedObject, Reading, detect, examine
from clvr_jax.worlds.shapes.render import coverage, render
from clvr_jax.worlds.shapes.scene import (
    BACKGROUND,
    CELLS,
    COLORS,
    Scene,
    SceneObject,
    cell_center,
    place,
    reading_order,
    sample_scene_random,
)

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def to_image(values: np.ndarray) -> np.ndarray:
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


def noise(image: np.ndarray, rng: np.random.Generator, sigma: float = 6) -> np.ndarray:
    return to_image(image + rng.normal(0, sigma, image.shape))


def blur(image: np.ndarray, rng: np.random.Generator, sigma: float = 0.6) -> np.ndarray:
    return to_image(ndimage.gaussian_filter(image.astype(np.float32), (sigma, sigma, 0)))


def tint(image: np.ndarray, rng: np.random.Generator, most: float = 12) -> np.ndarray:
    return to_image(image + rng.uniform(-most, most, 3))


def exact(scene: Scene, reading: Reading) -> bool:
    rendered = {item.cell: (item.color, item.shape) for item in scene.objects}
    return rendered == {item.cell: (item.color, item.shape) for item in reading.objects} and not reading.unclear


def exact_share(number: int, seed: int, change: Change | None = None) -> float:
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(number):
        scene = sample_scene_random(rng, allow_held_out=True)
        image = render(scene)
        hits += exact(scene, detect(image if change is None else change(image, rng)))
    return hits / number


def test_clean_images_are_detected_exactly() -> None:
    assert exact_share(400, seed=0) == 1.0


@pytest.mark.slow
def test_a_thousand_clean_images() -> None:
    assert exact_share(1_000, seed=1) >= 0.995


@pytest.mark.parametrize(
    "change",
    [
        noise,
        blur,
        tint,
        lambda image, rng: noise(image, rng, 12),
        lambda image, rng: noise(blur(image, rng), rng),
        lambda image, rng: tint(noise(blur(image, rng), rng), rng),
    ],
    ids=["noise", "blur", "tint", "strong noise", "blur and noise", "blur, noise and tint"],
)
def test_degraded_images_are_detected(change: Change) -> None:
    assert exact_share(150, seed=2, change=change) >= 0.99


def test_full_canvases_are_detected() -> None:
    rng = np.random.default_rng(3)
    for _ in range(30):
        scene = sample_scene_random(rng, 9)
        assert exact(scene, detect(noise(render(scene), rng)))


def test_position_and_size_are_measured_to_a_fraction_of_a_pixel() -> None:
    rng = np.random.default_rng(4)
    for _ in range(100):
        scene = sample_scene_random(rng)
        found = {item.cell: item for item in detect(render(scene)).objects}
        for item in scene.objects:
            seen = found[item.cell]
            assert (seen.x, seen.y, seen.radius) == pytest.approx((item.x, item.y, item.radius), abs=0.15)


def test_objects_are_in_reading_order() -> None:
    reading = detect(render(sample_scene_random(np.random.default_rng(5), 9)))
    assert [item.cell for item in reading.objects] == list(CELLS)


def test_an_empty_canvas_has_no_objects() -> None:
    assert detect(render(Scene())) == Reading()
    assert detect(noise(render(Scene()), np.random.default_rng(6), 10)) == Reading()


# --- unclear objects ------------------------------------------------------------------------------------------


def mask(item: SceneObject) -> np.ndarray:
    pixels = np.arange(64, dtype=np.float32) + 0.5
    return coverage(item.shape, pixels[None, :] - item.x, pixels[:, None] - item.y, item.radius)


def composed(*layers: tuple[np.ndarray, tuple[float, ...]]) -> np.ndarray:
    image = np.full((64, 64, 3), BACKGROUND, np.float32)
    for alpha, color in layers:
        image += alpha[..., None] * (np.array(color, np.float32) - image)
    return to_image(image)


def test_an_unclear_cell_does_not_hide_its_neighbors() -> None:
    star = SceneObject("red", "star", "top left", *cell_center("top left"), 8.0)
    cross = SceneObject("blue", "cross", "top", *cell_center("top"), 8.0)
    half = mask(cross) * (np.arange(64) < 32)
    reading = detect(composed((mask(star), COLORS["red"]), (half, COLORS["blue"])))
    assert [str(item) for item in reading.objects] == ["red star top left"]
    assert reading.unclear == ("top",)


def random_single(rng: np.random.Generator) -> SceneObject:
    return sample_scene_random(rng, 1).objects[0]


def test_incomplete_objects_are_unclear() -> None:
    rng = np.random.default_rng(7)
    accepted = 0
    for _ in range(200):
        item = random_single(rng)
        angle = rng.uniform(0, 2 * np.pi)
        pixels = np.arange(64) + 0.5
        side = (pixels[None, :] - item.x) * np.cos(angle) + (pixels[:, None] - item.y) * np.sin(angle)
        reading = detect(composed((mask(item) * (side < 0), COLORS[item.color])))
        assert reading.objects or reading.unclear == (item.cell,)
        accepted += len(reading.objects)
    assert accepted <= 4


def test_faded_objects_are_unclear() -> None:
    rng = np.random.default_rng(8)
    for _ in range(50):
        item = random_single(rng)
        assert detect(composed((0.6 * mask(item), COLORS[item.color]))) == Reading((), (item.cell,))


def test_mixtures_of_two_colors_are_unclear() -> None:
    rng = np.random.default_rng(9)
    accepted = 0
    for _ in range(200):
        item, other = random_single(rng), random_single(rng)
        if item.color == other.color:
            continue
        mixed = (np.array(COLORS[item.color]) + COLORS[other.color]) / 2
        accepted += len(detect(composed((mask(item), tuple(mixed)))).objects)
        left = mask(item) * (np.arange(64) + 0.5 < item.x)
        sides = composed((mask(item), COLORS[item.color]), (left, COLORS[other.color]))
        assert detect(sides) == Reading((), (item.cell,))
    # Half red and half yellow *is* about orange.
    assert accepted <= 16


def test_mixtures_of_two_shapes_are_unclear() -> None:
    rng = np.random.default_rng(10)
    accepted = 0
    for _ in range(200):
        item, other = random_single(rng), random_single(rng)
        if item.shape == other.shape:
            continue
        both = SceneObject(item.color, other.shape, item.cell, item.x, item.y, item.radius)
        accepted += len(detect(composed((0.5 * mask(item) + 0.5 * mask(both), COLORS[item.color]))).objects)
    # A square with soft corners is nearly a circle.
    assert accepted <= 6


def test_objects_of_wrong_size_or_between_cells_are_unclear() -> None:
    for radius in (4.0, 12.0):
        reading = detect(composed((mask(SceneObject("red", "circle", "center", 32.0, 32.0, radius)), COLORS["red"])))
        assert reading == Reading((), ("center",))
    between = SceneObject("red", "circle", "center", 64 / 3, 32.0, 8.0)
    assert detect(composed((mask(between), COLORS["red"]))) == Reading((), ("left", "center"))


def test_merged_objects_are_unclear_in_both_cells() -> None:
    left = SceneObject("green", "square", "left", 14.0, 32.0, 9.0)
    right = SceneObject("green", "square", "center", 28.0, 32.0, 9.0)
    reading = detect(composed((mask(left), COLORS["green"]), (mask(right), COLORS["green"])))
    assert reading == Reading((), ("left", "center"))


@pytest.mark.slow
def test_noise_blobs_are_rarely_detected_as_objects() -> None:
    rng = np.random.default_rng(11)
    accepted = 0
    for _ in range(200):
        field = ndimage.gaussian_filter(rng.normal(size=(64, 64)), rng.uniform(1.5, 5))
        alpha = np.clip((field / field.std() - 1.2) * 3, 0, 1)
        accepted += len(detect(composed((alpha, COLORS[random_single(rng).color]))).objects)
    assert accepted <= 8
    assert len(detect(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).objects) == 0


def test_invalid_input_is_an_error() -> None:
    with pytest.raises(ClvrError, match=r"float32 \(64, 64, 3\)"):
        detect(np.zeros((64, 64, 3), np.float32))
    with pytest.raises(ClvrError, match=r"uint8 \(32, 64, 3\)"):
        detect(np.zeros((32, 64, 3), np.uint8))
    thing = DetectedObject("red", "star", "top", 32.0, 10.0, 8.0)
    with pytest.raises(ClvrError, match="a cell occurs twice"):
        Reading((thing,), ("top",))
    with pytest.raises(ClvrError, match="reading order"):
        Reading((), tuple(reversed(reading_order(["top", "bottom"]))))


def test_margins_are_negative_exactly_for_what_is_read_as_unclear():
    rng = np.random.default_rng(7)
    unclear = 0
    for _ in range(60):
        image = blur_cells(random_canvas(rng).render(), rng)
        reading, _, clarity = examine(image)
        assert reading == detect(image)
        cells = {cell: row for cell, row in zip(CELLS, clarity, strict=True) if row[0]}
        assert set(cells) == {item.cell for item in reading.objects} | set(reading.unclear)
        assert {cell for cell, row in cells.items() if row[1:].min() < 0} == set(reading.unclear)
        assert np.abs(clarity[:, 1:]).max() <= 3
        unclear += len(reading.unclear)
    assert unclear > 20


def test_a_larger_difference_from_the_palette_has_a_smaller_margin():
    clear = render(Scene((place("red", "circle", "center", np.random.default_rng(0)),)))
    margins = []
    for change in (0, 20, 40, 60):
        tinted = np.where(clear[..., 1:2] < 200, np.clip(clear + np.array([0, change, 0]), 0, 255), clear)
        margins.append(examine(tinted.astype(np.uint8)).clarity[CELLS.index("center"), 1])
    assert margins == sorted(margins, reverse=True)
    assert margins[0] > 0 > margins[-1]
