"""The models of the comparison, as pipeline directories: base, distilled, aligned, and merged models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation.paper.stages import Stages, digest
from clvr_jax.files.atomic_io import read_json
from clvr_jax.merging.methods import Settings
from clvr_jax.merging.norms import DeltaStatistics
from clvr_jax.merging.planning import Merge, plan_merge
from clvr_jax.merging.provenance import write_provenance
from clvr_jax.merging.report import write_report
from clvr_jax.merging.streaming import merge
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.io import copy_component
from clvr_jax.pipelines.registry import resolve

MERGES = {"merged": Settings(), **{method: Settings(method) for method in ("linear", "ties", "dare")}}
"""Name -> settings with which the distilled and the aligned model are merged."""

_SHARED = ("vae", "text_encoder", "tokenizer")


class _Sampling(TypedDict):
    num_inference_steps: int
    guidance_scale: float


@dataclass(frozen=True)
class Sources:
    """The given models of the comparison, each a shipped name or a pipeline directory.

    Attributes:
      base: the base model.
      distilled: generates in few steps; if None, it is recovered from the shipped models, see `recover_distilled`.
      sft: fine-tuned on trajectories.
      pprl: the fine-tuned model after RL; None if there is none.
      controller: a model with a controller/ in its directory.
      aligned: the model that is merged, "sft" or "pprl"; if None, "pprl" if it is given.
    """

    base: str
    distilled: str | None
    sft: str
    pprl: str | None
    controller: str
    aligned: Literal["sft", "pprl"] | None = None

    @property
    def merged(self) -> Literal["sft", "pprl"]:
        """The name of the model that is merged. Raises: UsageError if that model is not given."""
        if self.aligned == "pprl" and self.pprl is None:
            raise UsageError("--aligned pprl: give the model with --pprl")
        return self.aligned or ("sft" if self.pprl is None else "pprl")


def model_directories(sources: Sources, stages: Stages) -> dict[str, Path]:
    """Writes all models with a controller, in float32, so that small differences are not rounded.

    Returns: name -> directory of the models of `sources` and `MERGES`, and of "aligned", the model that is merged, and
      "aligned in few steps", the same model with the sampling settings of the distilled one.
    Raises: ClvrError if a model is missing, or models differ in more than the transformer.
    """
    distilled = sources.distilled or str(recover_distilled(stages))
    given = {"base": sources.base, "distilled": distilled, "sft": sources.sft}
    if sources.pprl is not None:
        given["pprl"] = sources.pprl
    controller = resolve(sources.controller)[0] / "controller"
    if not controller.is_dir():
        raise ClvrError(f"{sources.controller}: has no controller/; give a model with a controller")
    parts = {name: _digests(model) for name, model in given.items()}
    controller_digest = digest(controller)
    directories = {}
    for name, model in given.items():
        inputs = {**parts[name], "controller": controller_digest}
        directories[name] = stages.directory(f"model-{name}", inputs, _writer(model, controller))
        # Compared as written, in float32, because sources may have the same values in other types.
        if differing := [
            part for part in _SHARED if digest(directories[name] / part) != digest(directories["base"] / part)
        ]:
            raise ClvrError(
                f"{model}: its {' and '.join(differing)} differs from that of {sources.base}; give models that differ "
                "in their transformer only, because others cannot be merged"
            )
    aligned = sources.merged
    settings = Flux2Pipeline.from_pretrained(str(directories["distilled"])).settings
    few: _Sampling = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": 1.0}
    directories["aligned in few steps"] = stages.directory(
        "model-few",
        {**parts[aligned], "controller": controller_digest, **few},
        _writer(given[aligned], controller, few),
    )
    directories["aligned"] = directories[aligned]
    merged = directories["base"], directories["distilled"], directories["aligned"]
    digests = [digest(directory) for directory in merged]
    for name, how in MERGES.items():
        inputs = {"models": digests, "settings": repr(how)}
        directories[name] = stages.directory(f"model-{name}", inputs, _merger(plan_merge(*merged, settings=how)))
    return directories


def recover_distilled(stages: Stages) -> Path:
    """Writes the distilled model that the shipped merged one was made from: merged - fine-tuned + base.

    Equal to it up to the rounding of the shipped weights to float16, since DSWM is a sum.

    Returns: its pipeline directory.
    """
    directories = {}
    for name in ("sft", "merged", "base"):
        shipped = "shapes-tiny" if name == "merged" else f"shapes-tiny-{name}"
        directories[name] = stages.directory(f"shipped-{name}", _digests(shipped), _pipeline_writer(shipped))
    # Forced: their bases differ for the check of a merge, which expects deltas from one base.
    plan = plan_merge(
        directories["sft"], directories["merged"], directories["base"], force=True, references_of="distill"
    )
    inputs = {"models": [digest(directory) for directory in directories.values()]}
    return stages.directory("recovered-distilled", inputs, _merger(plan))


def _digests(model: str) -> dict[str, object]:
    """Returns the digests of a pipeline's components, and the content of its model_index.json and clvr.json."""
    path, transformer = resolve(model)
    indices = {name: read_json(path / name) for name in ("model_index.json", "clvr.json") if (path / name).exists()}
    return {"transformer": digest(path / transformer), **{part: digest(path / part) for part in _SHARED}, **indices}


def _pipeline_writer(model: str, sampling: _Sampling | None = None) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        pipeline = Flux2Pipeline.from_pretrained(model)
        pipeline.settings = pipeline.settings if sampling is None else replace(pipeline.settings, **sampling)
        pipeline.save_pretrained(str(directory), dtype="float32")

    return write


def _writer(model: str, controller: Path, sampling: _Sampling | None = None) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        _pipeline_writer(model, sampling)(directory)
        copy_component(controller, directory / "controller")

    return write


def _merger(plan: Merge) -> Callable[[Path], None]:
    def finish(directory: Path, sums: Mapping[str, DeltaStatistics], name: str) -> None:
        write_provenance(plan, directory, name, "python -m clvr_jax.scripts.paper", sums)
        write_report(directory, sums)

    def write(directory: Path) -> None:
        if not directory.exists():
            merge(plan, directory, resume=True, finish=lambda where, sums: finish(where, sums, directory.name))

    return write
