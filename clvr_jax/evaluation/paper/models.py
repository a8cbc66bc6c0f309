"""The models that are compared, as pipeline folders: base, distilled, aligned, and what merging makes of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation.paper.stages import Stages, digest
from clvr_jax.files import read_json
from clvr_jax.merging.methods import Settings
from clvr_jax.merging.norms import DeltaStatistics
from clvr_jax.merging.planning import Merge, plan_merge
from clvr_jax.merging.provenance import write_provenance
from clvr_jax.merging.report import write_report
from clvr_jax.merging.streaming import merge
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.folder import copy_component
from clvr_jax.pipelines.registry import resolve

MERGES = {"merged": Settings(), **{method: Settings(method) for method in ("linear", "ties", "dare")}}
"""Name -> how distilled and aligned become one."""

_SHARED = ("vae", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class Sources:
    """What the comparison begins with, each a shipped name or a pipeline folder.

    base: before anything. distilled: draws in few steps. sft: fine-tuned on trajectories. pprl: what RL made of that;
    None if there is none. controller: a model in whose folder lies a controller/. aligned: "sft" or "pprl", which is
    merged; the last that there is if None.
    """

    base: str
    distilled: str
    sft: str
    pprl: str | None
    controller: str
    aligned: Literal["sft", "pprl"] | None = None

    @property
    def merged(self) -> Literal["sft", "pprl"]:
        """Which is merged. Raises: UsageError if it is not there."""
        if self.aligned == "pprl" and self.pprl is None:
            raise UsageError("--aligned pprl: give it with --pprl")
        return self.aligned or ("sft" if self.pprl is None else "pprl")


def model_folders(sources: Sources, stages: Stages) -> dict[str, Path]:
    """Name -> folder of every model; each has a controller, and float32 weights, so that small changes are not rounded.

    Beside those of `sources` and `MERGES`: "aligned", the one that is merged, and "aligned in few steps", the same
    sampled as the distilled one is.
    Raises: ClvrError if a model is missing, or the models do not share all but the transformer.
    """
    given = {"base": sources.base, "distilled": sources.distilled, "sft": sources.sft}
    if sources.pprl is not None:
        given["pprl"] = sources.pprl
    controller = resolve(sources.controller)[0] / "controller"
    if not controller.is_dir():
        raise ClvrError(f"{sources.controller}: has no controller/, which plans and looks")
    parts = {name: _digests(model) for name, model in given.items()}
    of_controller = digest(controller)
    folders = {}
    for name, model in given.items():
        inputs = {**parts[name], "controller": of_controller}
        folders[name] = stages.folder(f"model-{name}", inputs, _writer(model, controller))
        # As written, all in float32: sources may hold the same numbers in other types.
        if differing := [part for part in _SHARED if digest(folders[name] / part) != digest(folders["base"] / part)]:
            raise ClvrError(
                f"{model}: its {' and '.join(differing)} is not that of {sources.base}; the difference of their "
                "transformers is then no change of one base, and cannot be merged"
            )
    aligned = sources.merged
    settings = Flux2Pipeline.from_pretrained(str(folders["distilled"])).settings
    few = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": 1.0}
    folders["aligned in few steps"] = stages.folder(
        "model-few", {**parts[aligned], "controller": of_controller, **few}, _writer(given[aligned], controller, few)
    )
    folders["aligned"] = folders[aligned]
    merged = folders["base"], folders["distilled"], folders["aligned"]
    digests = [digest(folder) for folder in merged]
    for name, how in MERGES.items():
        inputs = {"models": digests, "settings": repr(how)}
        folders[name] = stages.folder(f"model-{name}", inputs, _merger(plan_merge(*merged, settings=how)))
    return folders


def _digests(model: str) -> dict[str, Any]:
    """What a pipeline consists of: part -> its digest, and what it says of itself."""
    path, transformer = resolve(model)
    said = {name: read_json(path / name) for name in ("model_index.json", "clvr.json") if (path / name).exists()}
    return {"transformer": digest(path / transformer), **{part: digest(path / part) for part in _SHARED}, **said}


def _writer(model: str, controller: Path, sampling: Mapping[str, Any] | None = None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        pipeline = Flux2Pipeline.from_pretrained(model)
        pipeline.settings = replace(pipeline.settings, **(sampling or {}))
        pipeline.save_pretrained(str(folder), dtype="float32")
        copy_component(controller, folder / "controller")

    return write


def _merger(plan: Merge) -> Callable[[Path], None]:
    def finish(folder: Path, sums: Mapping[str, DeltaStatistics], name: str) -> None:
        write_provenance(plan, folder, name, "python -m clvr_jax.configs.paper", sums)
        write_report(folder, sums)

    def write(folder: Path) -> None:
        if not folder.exists():
            merge(plan, folder, resume=True, finish=lambda where, sums: finish(where, sums, folder.name))

    return write
