"""Models that are shipped with the package, and the lookup from a name to a directory and to a pipeline class."""

import dataclasses
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from jax.typing import DTypeLike

from clvr_jax.convert.hub import local_directory
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import read_json
from clvr_jax.files.file_names import has_entry
from clvr_jax.files.json_input import JSON, shown

if TYPE_CHECKING:
    from clvr_jax.pipelines.flux2 import Flux2Pipeline
    from clvr_jax.pipelines.sdxl import SDXLPipeline

SHIPPED = Path(__file__).resolve().parent.parent / "shipped"


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A model in the package: its directory, and the subdirectory of its transformer."""

    directory: str
    transformer: str = "transformer"


MODELS = {
    "shapes-tiny": Shipped("shapes-tiny"),
    # The same pipeline before distillation, which takes more steps: the base of merges; and the base after SFT on
    # trajectories, from which RL starts.
    "shapes-tiny-base": Shipped("shapes-tiny", transformer="transformer_base"),
    "shapes-tiny-sft": Shipped("shapes-tiny", transformer="transformer_sft"),
}

FLUX2_CLASS, FLUX2_KV_CLASS = "Flux2KleinPipeline", "Flux2KleinKVPipeline"

FLUX2 = (FLUX2_CLASS, FLUX2_KV_CLASS)
"""diffusers' classes of the pipelines that take images and run in the closed loop."""

PIPELINES = {
    **dict.fromkeys(FLUX2, "clvr_jax.pipelines.flux2.Flux2Pipeline"),
    "StableDiffusionXLPipeline": "clvr_jax.pipelines.sdxl.SDXLPipeline",
    "StableDiffusionPipeline": "clvr_jax.pipelines.sdxl.SDXLPipeline",
    "LatentConsistencyModelPipeline": "clvr_jax.pipelines.sdxl.SDXLPipeline",
}
"""diffusers' class in model_index.json -> our class of the same pipeline."""


def load_pipeline(model: str, dtype: DTypeLike | None = "float32", **options: object) -> "Flux2Pipeline | SDXLPipeline":
    """Loads the pipeline of a shipped name, a directory or a Hugging Face id.

    Args: of the class's `from_pretrained`.
    Raises: ClvrError for a class that is not in `PIPELINES`, and the errors of `from_pretrained`.
    """
    path, _ = resolve(model)
    kind = class_of(path)
    if kind not in PIPELINES:
        raise ClvrError(f"{path}: a {kind}, which is not supported; the supported pipelines are {', '.join(PIPELINES)}")
    module, _, name = PIPELINES[kind].rpartition(".")
    loaded: Flux2Pipeline | SDXLPipeline = getattr(importlib.import_module(module), name).from_pretrained(
        model, dtype, **options
    )
    return loaded


def size_multiple(path: Path) -> int:
    """Returns the number of pixels that both sides of an image must be multiples of; reads configurations only.

    path: of the pipeline. Raises: ClvrError for a class that is not in `PIPELINES`, or a damaged configuration.
    """
    from clvr_jax.convert.architectures import AUTOENCODER_KL, FLUX2_VAE  # imports all models

    kind, config = class_of(path), read_json(path / "vae" / "config.json")
    if kind in FLUX2:
        return int(FLUX2_VAE.config_from_dict(config).token_pixels)
    return int(AUTOENCODER_KL.config_from_dict(config).downscale)


def read_settings(path: Path, *sections: str) -> dict[str, dict[str, JSON]]:
    """Returns the sections of a pipeline's clvr.json, {} where there is none.

    Raises: ClvrError for a section of another name, which would be ignored, or one that is no object.
    """
    file = path / "clvr.json"
    given = read_json(file) if has_entry(file) else {}
    if unknown := sorted(given.keys() - set(sections)):
        raise ClvrError(f"{file}: unknown {', '.join(unknown)[:80]}; it may contain {' and '.join(sections)}")
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
    """Returns the pipeline directory of a shipped name, directory or Hugging Face id, and its transformer's name.

    Raises: ClvrError for another name, for an id that cannot be downloaded, and for a directory without
      model_index.json.
    """
    if model in MODELS:
        path, transformer = SHIPPED / MODELS[model].directory, MODELS[model].transformer
    elif "/" not in model and not Path(model).exists():
        raise ClvrError(
            f"{model}: no such model; give a diffusers directory, a Hugging Face id or one of {', '.join(MODELS)}"
        )
    else:
        path, transformer = local_directory(model), "transformer"
    if not (path / "model_index.json").exists():
        raise ClvrError(f"{path}: not a pipeline directory, model_index.json is missing")
    return path, transformer
