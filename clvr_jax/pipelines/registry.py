"""Names of models that come with the package, how a name or path becomes a folder, and a folder a pipeline."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from clvr_jax.convert.hub import local_directory
from clvr_jax.errors import ClvrError
from clvr_jax.files import read_json
from clvr_jax.json_input import shown

SHIPPED = Path(__file__).resolve().parent.parent / "shipped"


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A model in the package: its folder, and the subfolder its transformer is in."""

    folder: str
    transformer: str = "transformer"


MODELS = {
    "shapes-tiny": Shipped("shapes-tiny"),
    # The same pipeline in more steps: before it learned to follow trajectories, what merges start from; and after, what
    # reinforcement learning starts from.
    "shapes-tiny-base": Shipped("shapes-tiny", transformer="transformer_base"),
    "shapes-tiny-sft": Shipped("shapes-tiny", transformer="transformer_sft"),
}

FLUX2 = "Flux2KleinPipeline"
"""The class that takes images and runs in the closed loop."""

PIPELINES = {
    FLUX2: "clvr_jax.pipelines.flux2.Flux2Pipeline",
    "StableDiffusionXLPipeline": "clvr_jax.pipelines.sdxl.SDXLPipeline",
    "StableDiffusionPipeline": "clvr_jax.pipelines.sdxl.SDXLPipeline",
    "LatentConsistencyModelPipeline": "clvr_jax.pipelines.sdxl.SDXLPipeline",
}
"""diffusers' class, as model_index.json names it -> ours that reads its folder and draws."""


def load_pipeline(model: str, dtype: DTypeLike | None = "float32", **options: Any) -> Any:
    """The pipeline of a shipped name or a folder, of the class that reads it.

    Args: those of that class' `from_pretrained`.
    Raises: ClvrError for a folder of a class that is not in `PIPELINES`, and what `from_pretrained` raises.
    """
    path, _ = resolve(model)
    kind = class_of(path)
    if kind not in PIPELINES:
        raise ClvrError(f"{path}: a {kind}; what can be drawn with is {', '.join(PIPELINES)}")
    module, _, name = PIPELINES[kind].rpartition(".")
    return getattr(importlib.import_module(module), name).from_pretrained(model, dtype, **options)


def size_multiple(path: Path) -> int:
    """Returns the number of pixels that both sides of an image must be multiples of; reads configurations only.

    path: of the pipeline. Raises: ClvrError for a class that is not in `PIPELINES`, or a damaged configuration.
    """
    from clvr_jax.convert.architectures import AUTOENCODER_KL, FLUX2_VAE  # imports all models

    kind, config = class_of(path), read_json(path / "vae" / "config.json")
    if kind == FLUX2:
        return int(FLUX2_VAE.config_from_dict(config).token_pixels)
    return int(AUTOENCODER_KL.config_from_dict(config).downscale)


def read_settings(path: Path, *sections: str) -> dict[str, dict[str, Any]]:
    """Returns the sections of a pipeline's clvr.json, {} where there is none.

    Raises: ClvrError for a section of another name, which would be ignored, or one that is no object.
    """
    file = path / "clvr.json"
    given = read_json(file) if file.exists() else {}
    if unknown := sorted(given.keys() - set(sections)):
        raise ClvrError(f"{file}: unknown {', '.join(unknown)[:80]}; it may hold {' and '.join(sections)}")
    if wrong := [name for name, section in given.items() if not isinstance(section, dict)]:
        raise ClvrError(f"{file}: {wrong[0]} must be an object")
    return given


def class_of(path: Path) -> str:
    """Returns diffusers' class of the pipeline in a directory. Raises: ClvrError if model_index.json names none."""
    kind = read_json(path / "model_index.json").get("_class_name")
    if not isinstance(kind, str):
        raise ClvrError(f"{path / 'model_index.json'}: _class_name is {shown(kind)}; it must be a text")
    return kind


def resolve(model: str) -> tuple[Path, str]:
    """Model name, folder or Hugging Face id -> (pipeline folder, subfolder of the transformer).

    Raises: ClvrError for what is none of them or cannot be fetched, and for a folder without model_index.json.
    """
    if model in MODELS:
        path, transformer = SHIPPED / MODELS[model].folder, MODELS[model].transformer
    elif "/" not in model and not Path(model).exists():
        raise ClvrError(
            f"{model}: no such model; give a diffusers folder, a Hugging Face id or one of {', '.join(MODELS)}"
        )
    else:
        path, transformer = local_directory(model), "transformer"
    if not (path / "model_index.json").exists():
        raise ClvrError(f"{path}: not a pipeline folder, model_index.json is missing")
    return path, transformer
