"""Closed-loop verified reasoning for image generation, in JAX.

The public names are imported on first use, so that `import clvr_jax` is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clvr_jax.merging.deltas import apply_delta, delta, dswm
    from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
    from clvr_jax.pipelines.flux2 import Flux2Pipeline
    from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline, Verifier
    from clvr_jax.pipelines.sdxl import SDXLPipeline

__all__ = [
    "ClosedLoopPipeline",
    "Flux2Pipeline",
    "Qwen3VLPipeline",
    "SDXLPipeline",
    "Verifier",
    "apply_delta",
    "delta",
    "dswm",
]

_MODULES = {
    "ClosedLoopPipeline": "clvr_jax.pipelines.closed_loop",
    "Flux2Pipeline": "clvr_jax.pipelines.flux2",
    "Qwen3VLPipeline": "clvr_jax.pipelines.qwen3_vl",
    "SDXLPipeline": "clvr_jax.pipelines.sdxl",
    "Verifier": "clvr_jax.pipelines.qwen3_vl",
    "apply_delta": "clvr_jax.merging.deltas",
    "delta": "clvr_jax.merging.deltas",
    "dswm": "clvr_jax.merging.deltas",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
