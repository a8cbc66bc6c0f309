"""Compares image preprocessing with transformers' image processor."""

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from clvr_jax.data.preprocessing.qwen3_vl_images import Qwen3VLImageProcessor, processor_from_dict, processor_to_dict
from clvr_jax.errors import ClvrError


def reference(processor: Qwen3VLImageProcessor) -> Qwen2VLImageProcessorPil:
    given = processor_to_dict(processor)
    return Qwen2VLImageProcessorPil(**{key: given[key] for key in given if key not in ("image_processor_type",)})


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


SMALL = Qwen3VLImageProcessor(patch_size=8, min_pixels=64 * 64, max_pixels=160 * 160)


@pytest.mark.parametrize("processor", [Qwen3VLImageProcessor(), SMALL], ids=["full", "small"])
@pytest.mark.parametrize("size", [(64, 64), (333, 77), (256, 256), (31, 410), (700, 513), (3, 5)])
def test_patches_equal_the_reference(processor: Qwen3VLImageProcessor, size: tuple[int, int]) -> None:
    image = random_image(*size)
    pixel_values, grid_thw = processor([image])
    expected = reference(processor)([image], return_tensors="np")
    assert grid_thw == tuple(map(tuple, expected["image_grid_thw"].tolist()))
    np.testing.assert_array_equal(pixel_values, expected["pixel_values"])
    assert pixel_values.dtype == np.float32


def test_several_images_are_packed_in_order() -> None:
    images = [random_image(64, 64, 1), random_image(100, 47, 2), random_image(61, 140, 3)]
    pixel_values, grid_thw = SMALL(images)
    expected = reference(SMALL)(images, return_tensors="np")
    np.testing.assert_array_equal(pixel_values, expected["pixel_values"])
    assert len(set(grid_thw)) == 3
    tokens = sum(SMALL.tokens(image.height, image.width) for image in images)
    assert pixel_values.shape[0] == 4 * tokens


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "CMYK"])
def test_all_modes_are_converted_to_rgb_as_in_the_reference(mode: str) -> None:
    image = random_image(64, 64)
    image.putalpha(Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64), dtype=np.uint8)))
    image = image.convert("RGB").convert(mode) if mode in ("CMYK", "P") else image.convert(mode)
    expected = reference(SMALL)([image], return_tensors="np")
    np.testing.assert_array_equal(SMALL([image])[0], expected["pixel_values"])


def test_arrays_and_pil_images_give_equal_patches() -> None:
    image = random_image(72, 64)
    np.testing.assert_array_equal(SMALL([np.asarray(image)])[0], SMALL([image])[0])
    gray = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(SMALL([gray[..., None]])[0], SMALL([image.convert("L")])[0])


def test_sizes_of_the_released_models() -> None:
    processor = Qwen3VLImageProcessor()
    assert processor.tokens(1024, 1024) == 1024
    assert processor.resized(64, 64) == (256, 256)
    height, width = processor.resized(9000, 5000)
    assert height % 32 == width % 32 == 0
    assert height * width <= 16_777_216
    assert SMALL.tokens(64, 64) == 16


def test_config_round_trip() -> None:
    assert processor_from_dict(processor_to_dict(SMALL)) == SMALL
    assert processor_from_dict({"min_pixels": 4096, "max_pixels": 8192, "patch_size": 8}).min_pixels == 4096
    assert reference(SMALL).size["longest_edge"] == 160 * 160
    with pytest.raises(ClvrError, match="do_resize"):
        processor_from_dict({"do_resize": False})


def test_invalid_images_are_errors() -> None:
    with pytest.raises(ClvrError, match="too long"):
        SMALL([random_image(1000, 3)])
    with pytest.raises(ClvrError, match="float64"):
        SMALL([np.zeros((64, 64, 3))])
    with pytest.raises(ClvrError, match="no images"):
        SMALL([])
