"""Image preprocessing for the vision tower of Qwen3-VL: resizing, normalization, patches. NumPy and PIL only.

Source: transformers `Qwen2VLImageProcessorPil`, the processor of Qwen3-VL; the results are equal bit for bit.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import located, read_json
from clvr_jax.files.file_names import has_entry
from clvr_jax.files.json_input import JSON, JsonObject, UncheckedJSON, shown

MAX_ASPECT_RATIO = 200

PROCESSOR_NAME, NESTED_NAME = "preprocessor_config.json", "processor_config.json"
"""Files of the image processor in transformers 4 and in transformers 5, which reads both."""

ImageLike = Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True)
class Qwen3VLImageProcessor:
    """Converts images of any size to patches; the defaults are those of the released Qwen3-VL models.

    Attributes:
      patch_size: side of a patch in pixels.
      temporal_patch_size: number of frames in a patch; an image is repeated.
      merge_size: side in patches of the square that becomes one token.
      min_pixels, max_pixels: bounds on height x width after resizing.
      image_mean, image_std: mean and standard deviation of each channel, for pixels in [0, 1].
    Raises: ClvrError for values out of range.
    """

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 65_536
    max_pixels: int = 16_777_216
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ClvrError(f"image processor: min_pixels {self.min_pixels} and max_pixels {self.max_pixels}")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ClvrError(f"image processor: image_mean {self.image_mean} and image_std {self.image_std}")
        if min(self.patch_size, self.temporal_patch_size, self.merge_size) < 1:
            raise ClvrError("image processor: patch_size, temporal_patch_size and merge_size must be at least 1")

    @property
    def factor(self) -> int:
        """Side of a token in pixels; sides after resizing are multiples of it."""
        return self.patch_size * self.merge_size

    def __call__(self, images: Sequence[ImageLike]) -> tuple[np.ndarray, tuple[tuple[int, int, int], ...]]:
        """Resizes (bicubic), normalizes and divides each image into patches.

        Args:
          images: PIL images of any mode (transparency is blended with white) or uint8 arrays (h, w), (h, w, 1 | 3 | 4).
        Returns: pixel_values (patches of all images, 3 * temporal * patch * patch) float32, and grid_thw, the
          (1, rows, columns) of patches of each image.
        Raises: ClvrError for an empty list, an array of another kind, or an aspect ratio above 200.
        """
        if not images:
            raise ClvrError("image processor: no images given")
        patches, grids = zip(*(self._patches(image) for image in images), strict=True)
        return np.concatenate(patches), grids

    def tokens(self, height: int, width: int) -> int:
        """Returns the number of tokens of an image of this size in pixels."""
        rows, columns = self.resized(height, width)
        return rows * columns // self.factor**2

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width in pixels to which an image is resized.

        They are multiples of `factor`, within the bounds on pixels, and close to the aspect ratio of the image.
        Raises: ClvrError for an aspect ratio above 200.
        """
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ClvrError(
                f"image processor: an image of {width} x {height} pixels is too long: its aspect ratio is above "
                f"{MAX_ASPECT_RATIO}; crop it"
            )
        factor = self.factor
        sides = [round(side / factor) * factor for side in (height, width)]
        if sides[0] * sides[1] > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
        elif sides[0] * sides[1] < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
        return sides[0], sides[1]

    def _patches(self, image: ImageLike) -> tuple[np.ndarray, tuple[int, int, int]]:
        rgb = _rgb(image)
        height, width = self.resized(rgb.height, rgb.width)
        pixels_hwc = np.asarray(rgb.resize((width, height), resample=Image.Resampling.BICUBIC))
        normalized_chw = np.stack([table[pixels_hwc[..., i]] for i, table in enumerate(self._tables())])

        patch, merge = self.patch_size, self.merge_size
        rows, columns = height // patch, width // patch
        blocks = normalized_chw.reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
        blocks = blocks.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]  # blocks, patches of a block, c, t, h, w
        frames = (*blocks.shape[:5], self.temporal_patch_size, patch, patch)
        return np.broadcast_to(blocks, frames).reshape(rows * columns, -1), (1, rows, columns)

    def _tables(self) -> np.ndarray:
        """Returns (3, 256) the normalized value of each byte in each channel, with the rounding of the reference."""
        unit = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
        mean, std = (np.array(values, dtype=np.float32)[:, None] for values in (self.image_mean, self.image_std))
        return (unit - mean) / std


def load_processor(directory: Path) -> Qwen3VLImageProcessor:
    """Loads the image processor of a Qwen3-VL directory, in the layout of transformers 4 or 5.

    Version 5 writes one `processor_config.json` with the fields under `image_processor`, and reads it first; version 4
    writes `preprocessor_config.json`, which both read.
    Raises: ClvrError if there is neither, or the processor has steps that are not supported.
    """
    nested = directory / NESTED_NAME
    if has_entry(nested) and (found := read_json(nested).get("image_processor")) is not None:
        if not isinstance(found, Mapping):
            raise ClvrError(f"{nested}: image_processor is {shown(found)}; it must be an object")
        with located(nested):
            return processor_from_dict(found)
    file = directory / PROCESSOR_NAME
    if not file.exists():
        raise ClvrError(f"{directory}: holds neither {PROCESSOR_NAME} nor {NESTED_NAME} with image_processor")
    with located(file):
        return processor_from_dict(read_json(file))


def processor_from_dict(given: UncheckedJSON) -> Qwen3VLImageProcessor:
    """Converts the content of transformers' `preprocessor_config.json` to a Qwen3VLImageProcessor.

    Bounds are read from `size` (shortest_edge and longest_edge, which are numbers of pixels) or min_pixels and
    max_pixels.
    Raises: ClvrError for a processor with steps that are not supported.
    """
    given = _typed(given)
    for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if given.get(step) is False:
            raise ClvrError(f"preprocessor_config.json: {step} = false is not supported")
    for name, only in (("resample", 3), ("rescale_factor", 1 / 255)):
        if given.get(name) is not None and not math.isclose(given[name], only):
            raise ClvrError(f"preprocessor_config.json: {name} = {given[name]} is not supported, only {only}")
    size = given.get("size") or {}
    values: dict[str, Any] = {
        "min_pixels": given.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": given.get("max_pixels") or size.get("longest_edge"),
        **{name: given.get(name) for name in ("patch_size", "temporal_patch_size", "merge_size")},
        **{name: tuple(given[name]) for name in ("image_mean", "image_std") if given.get(name)},
    }
    return Qwen3VLImageProcessor(**{name: value for name, value in values.items() if value is not None})


def _typed(given: UncheckedJSON) -> UncheckedJSON:
    """Validates the types and ranges of the fields, and returns those that are not null."""
    fields = JsonObject({name: value for name, value in given.items() if value is not None}, "image processor")
    size = fields.nested("size", None)
    for owner in (fields, size):
        for name in ("min_pixels", "max_pixels", "shortest_edge", "longest_edge"):
            if owner is not None:
                owner.integer(name, None, low=1, high=2**31 - 1)
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        fields.integer(name, None, low=1, high=4096)
    for name in ("rescale_factor", "resample"):
        fields.number(name, None)
    for name in ("image_mean", "image_std"):
        values = fields.content.get(name)
        if values is not None:
            if not isinstance(values, list | tuple):
                raise ClvrError(f"image processor: {name} is {shown(values)}; it must be a list of three numbers")
            for channel, value in enumerate(values):
                JsonObject({f"{name}[{channel}]": value}, "image processor").number(
                    f"{name}[{channel}]", low=-10, high=10
                )
    return fields.content


def processor_to_dict(processor: Qwen3VLImageProcessor) -> dict[str, JSON]:
    """Converts a Qwen3VLImageProcessor to the content of `preprocessor_config.json` for transformers' processor."""
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels},
        "patch_size": processor.patch_size,
        "temporal_patch_size": processor.temporal_patch_size,
        "merge_size": processor.merge_size,
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
    }


def _rgb(image: ImageLike) -> Image.Image:
    if isinstance(image, np.ndarray):
        shape = image.shape
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and shape[-1] in (1, 3, 4))):
            raise ClvrError(f"image processor: need uint8 (h, w) or (h, w, 1 | 3 | 4), got {image.dtype} {shape}")
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and shape[-1] == 1 else image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")
