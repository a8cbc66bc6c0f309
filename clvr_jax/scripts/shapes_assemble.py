"""Assembles the trained models of the shapes world into the directory that ships with the package.

python -m clvr_jax.scripts.shapes_assemble --out runs/shapes-tiny
"""

import shutil
from importlib.metadata import version
from pathlib import Path

from clvr_jax.arguments import run_script
from clvr_jax.convert.architectures import FLUX2_TRANSFORMER
from clvr_jax.convert.model_card import APACHE, Provenance, model_card, models_in
from clvr_jax.convert.models import load_model, save_model
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import atomic_directory, read_json, write_json, write_text

SAMPLING = ("num_inference_steps", "guidance_scale")


def main(
    out: Path = Path("runs/shapes-tiny"),
    merged: Path = Path("runs/shapes_merged"),
    base: Path = Path("runs/shapes_base/export"),
    sft: Path = Path("runs/shapes_sft/export"),
    controller: Path = Path("runs/shapes_controller/export"),
) -> None:
    """Assembles the shipped model: the merged pipeline, the other two transformers and the controller.

    All transformers are stored as float16; `clvr.json` holds how each of the other two is sampled, and attends to
    references.

    Args:
      out: Write the model to this directory.
      merged: Merged pipeline directory, from which everything but the other models is copied.
      base: Pipeline directory of the base model.
      sft: Pipeline directory of the fine-tuned model.
      controller: Directory of the controller.
    """
    others = {"transformer_base": base, "transformer_sft": sft}
    for directory in (merged, *others.values(), controller):
        if not directory.is_dir():
            raise ClvrError(f"{directory}: no such directory; train it first, see make reproduce")
    with atomic_directory(out) as temporary:
        left_out = shutil.ignore_patterns("transformer", "merge.json", "recipe.json", "report*", "README.md")
        shutil.copytree(merged, temporary, ignore=left_out, dirs_exist_ok=True)
        shutil.copytree(controller, temporary / "controller", ignore=shutil.ignore_patterns("README.md"))
        for name, directory in {"transformer": merged, **others}.items():
            model = load_model(directory / "transformer", FLUX2_TRANSFORMER)
            save_model(temporary / name, model, FLUX2_TRANSFORMER, "float16")
        settings = read_json(temporary / "clvr.json")
        write_json(temporary / "clvr.json", {**settings, "transformers": dict(map(_sampled, others.items()))})
        write_text(temporary / "README.md", shipped_card(temporary, out.name))


def shipped_card(directory: Path, name: str) -> str:
    """Returns the model card of the shipped directory: its models are under the license of this repository."""
    made = Provenance(
        source="random weights",
        command="make reproduce",
        version=version("clvr-jax"),
        format="torch",
        dtype="float16",
    )
    return model_card(name, made, models_in(directory), APACHE)


def _sampled(other: tuple[str, Path]) -> tuple[str, dict[str, object]]:
    name, directory = other
    settings = read_json(directory / "clvr.json")["flux2"]
    is_distilled = read_json(directory / "model_index.json")["is_distilled"]
    mode = settings.get("reference_cache", "none")  # none is not written
    return name, {"is_distilled": is_distilled, **{key: settings[key] for key in SAMPLING}, "reference_cache": mode}


if __name__ == "__main__":
    run_script(main)
