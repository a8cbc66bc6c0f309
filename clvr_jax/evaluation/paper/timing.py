"""What a prompt takes from beginning to end, one at a time, by the number of drawings it needed."""

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from typing_extensions import override

from clvr_jax.errors import ClvrError
from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline, Flux2Drawer
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.reasoning import loop
from clvr_jax.reasoning.protocols import Drawer, Drawing, DrawRequest


class _TimedDrawer(Drawer):
    """Knows how long it has been drawing, and how much of that was diffusion: the transformer's evaluations."""

    def __init__(self, pipeline: Flux2Pipeline):
        pipeline = copy.copy(pipeline)
        pipeline._denoise, self._denoise = self._timed_denoise, pipeline._denoise
        self._drawer = Flux2Drawer(pipeline)
        self.seconds = self.diffusion_seconds = 0.0

    @override
    def draw(self, requests: Sequence[DrawRequest]) -> list[Drawing]:
        began = time.perf_counter()
        drawings = self._drawer.draw(requests)
        self.seconds += time.perf_counter() - began
        return drawings

    def _timed_denoise(self, *arguments: Any) -> jax.Array:
        jax.block_until_ready(arguments[1:5])  # programs before it may still run: weights, noise, text, references
        began = time.perf_counter()
        latents = jax.block_until_ready(self._denoise(*arguments))
        self.diffusion_seconds += time.perf_counter() - began
        return latents


def loop_times(model: Path, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Runs the closed loop for one prompt after the other, twice: the first time compiles, the second is timed.

    Args:
      model: folder with a controller.
      prompts: what to draw.
    Returns: for each prompt {"prompt", "drawings", "nfe", "seconds", "drawing_seconds", "diffusion_seconds"}.
    """
    pipeline = ClosedLoopPipeline.from_pretrained(str(model))
    if pipeline.controller is None or pipeline.verifier is None:
        raise ClvrError(f"{model}: the directory has no controller/, which plans and verifies")
    found = []
    for is_timed in (False, True):
        for prompt in prompts:
            drawer = _TimedDrawer(pipeline.flux)
            began = time.perf_counter()
            (trajectory,) = loop.run(
                [prompt], pipeline.controller, drawer, verification="separate", verifier=pipeline.verifier
            )
            seconds = time.perf_counter() - began
            if is_timed:
                found.append({"prompt": prompt, "drawings": len(trajectory.drawings), "nfe": trajectory.nfe,
                              "seconds": seconds, "drawing_seconds": drawer.seconds,
                              "diffusion_seconds": drawer.diffusion_seconds})  # fmt: skip
    return found


def by_drawings(times: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Number of drawings -> {"prompts", "nfe", "seconds", "drawing_seconds", "per_drawing", "diffusion"}: medians; the
    last two are seconds for each drawing, text to pixels and of the diffusion in it."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for each in times:
        if each["drawings"]:
            groups.setdefault(each["drawings"], []).append(each)
    return {
        count: {
            "prompts": len(group),
            **{name: statistics.median(each[name] for each in group) for name in ("nfe", "seconds", "drawing_seconds")},
            "per_drawing": statistics.median(each["drawing_seconds"] / count for each in group),
            "diffusion": statistics.median(each["diffusion_seconds"] / count for each in group),
        }
        for count, group in sorted(groups.items())
    }
