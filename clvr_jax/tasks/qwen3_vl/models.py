"""Sizes of Qwen3-VL, and where a controller is loaded from."""

from pathlib import Path

from clvr_jax.convert.hub import local_directory
from clvr_jax.models.qwen3_vl import Qwen3VLConfig, Qwen3VLVisionConfig
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.pipelines.registry import MODELS, resolve

PRESETS = {
    "qwen3-vl-2b": Qwen3VLConfig.qwen3_vl_2b(),
    "qwen3-vl-4b": Qwen3VLConfig.qwen3_vl_4b(),
    "qwen3-vl-8b": Qwen3VLConfig.qwen3_vl_8b(),
}
"""Configurations of the published models, by name."""


def load_controller(model: str) -> Qwen3VLPipeline:
    """Loads a Qwen3-VL in float32: a model, or the `controller/` of a pipeline.

    Args:
      model: a directory, a Hugging Face id or a shipped name.
    """
    directory = resolve(model)[0] if model in MODELS else local_directory(model)
    controller = directory / "controller"
    return Qwen3VLPipeline.from_pretrained(controller if controller.is_dir() else Path(directory), "float32")


def token_side(vision: Qwen3VLVisionConfig) -> int:
    """Returns the height and width in pixels of what one token of an image shows."""
    return vision.patch_size * vision.spatial_merge_size
