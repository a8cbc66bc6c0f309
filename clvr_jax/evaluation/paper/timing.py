"""Wall time of the closed loop for one prompt at a time, by the number of images that the prompt needed."""

import copy
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import jax
from typing_extensions import override

from clvr_jax.errors import ClvrError
from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.image_generator import Flux2ImageGenerator
from clvr_jax.reasoning.conversation.protocols import GeneratedImage, GenerationRequest, ImageGenerator
from clvr_jax.reasoning.loop import loop


class LoopTime(TypedDict):
    """The cost of the closed loop for one prompt; seconds are wall time."""

    prompt: str
    images: int
    nfe: int
    seconds: float
    generation_seconds: float
    diffusion_seconds: float


class GroupTime(TypedDict):
    """Medians over the prompts with the same number of images; see `times_by_image_count`."""

    prompts: int
    nfe: float
    seconds: float
    generation_seconds: float
    per_generation: float
    diffusion: float


class _TimedGenerator(ImageGenerator):
    """An image generator that measures its total seconds, and those of diffusion: the transformer's evaluations."""

    def __init__(self, pipeline: Flux2Pipeline):
        pipeline = copy.copy(pipeline)
        pipeline._denoise, self._denoise = self._timed_denoise, pipeline._denoise
        self._generator = Flux2ImageGenerator(pipeline)
        self.seconds = self.diffusion_seconds = 0.0

    @override
    def generate(self, requests: Sequence[GenerationRequest]) -> list[GeneratedImage]:
        began = time.perf_counter()
        images = self._generator.generate(requests)
        self.seconds += time.perf_counter() - began
        return images

    def _timed_denoise(self, *arguments: object) -> jax.Array:
        jax.block_until_ready(arguments[1:5])  # earlier programs may still compute weights, noise, text and references
        began = time.perf_counter()
        latents: jax.Array = jax.block_until_ready(self._denoise(*arguments))
        self.diffusion_seconds += time.perf_counter() - began
        return latents


def loop_times(model: Path, prompts: Sequence[str]) -> list[LoopTime]:
    """Runs the closed loop twice for one prompt after the other: the first run compiles, the second is timed.

    Args:
      model: directory with a controller.
      prompts: the prompts.
    Returns: for each prompt {"prompt", "images": their number, "nfe", "seconds", "generation_seconds": seconds of
      generation, "diffusion_seconds"}.
    Raises: ClvrError if the model has no controller.
    """
    pipeline = ClosedLoopPipeline.from_pretrained(str(model))
    if pipeline.controller is None or pipeline.verifier is None:
        raise ClvrError(f"{model}: the directory has no controller/, which plans and verifies")
    found: list[LoopTime] = []
    for is_timed in (False, True):
        for prompt in prompts:
            generator = _TimedGenerator(pipeline.flux)
            began = time.perf_counter()
            (trajectory,) = loop.run(
                [prompt], pipeline.controller, generator, verification="separate", verifier=pipeline.verifier
            )
            seconds = time.perf_counter() - began
            if is_timed:
                found.append({"prompt": prompt, "images": len(trajectory.generated), "nfe": trajectory.nfe,
                              "seconds": seconds, "generation_seconds": generator.seconds,
                              "diffusion_seconds": generator.diffusion_seconds})  # fmt: skip
    return found


def times_by_image_count(times: Sequence[LoopTime]) -> dict[int, GroupTime]:
    """Groups times by number of images, with medians over prompts.

    Returns: number of images -> {"prompts", "nfe", "seconds", "generation_seconds", "per_generation", "diffusion"}; the
      last two are seconds per image, from text to pixels and of diffusion.
    """
    groups: dict[int, list[LoopTime]] = {}
    for each in times:
        if each["images"]:
            groups.setdefault(each["images"], []).append(each)
    return {
        count: {
            "prompts": len(group),
            "nfe": statistics.median(each["nfe"] for each in group),
            "seconds": statistics.median(each["seconds"] for each in group),
            "generation_seconds": statistics.median(each["generation_seconds"] for each in group),
            "per_generation": statistics.median(each["generation_seconds"] / count for each in group),
            "diffusion": statistics.median(each["diffusion_seconds"] / count for each in group),
        }
        for count, group in sorted(groups.items())
    }
