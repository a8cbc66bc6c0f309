"""The model cards of what a run exports: the recipe, the base model, and the license that follows from it."""

from importlib.metadata import version
from pathlib import Path

from clvr_jax.convert.architectures import torch_class
from clvr_jax.convert.hub import repository_of
from clvr_jax.convert.model_card import (
    OF_SOURCE,
    OWN,
    Models,
    Provenance,
    front_matter,
    license_of_all,
    model_card,
    models_in,
)
from clvr_jax.display.tables import Table
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import write_text
from clvr_jax.files.recipe_files import Configuration
from clvr_jax.pipelines.registry import resolve

_BASE = ("model", "base", "start")
"""Fields of a recipe's configuration that name the model from which training starts."""


def add_export_cards(directory: Path, name: str, recipe: str, config: Configuration, steps: int) -> None:
    """Writes README.md into an exported directory, and into its `lora/` if it has one.

    A card that the export itself has written is replaced: it does not name the base model.

    Args:
      directory: the export; models in PyTorch's layout, or files of a LoRA.
      name: the title of the card.
      recipe: name of the recipe.
      config: its configuration; its field `model`, `base` or `start` names the base model.
      steps: number of optimizer steps.
    """
    source = base_of(config)
    made = Provenance(
        source=source or "random weights",
        command=f"clvr train {recipe}",
        version=version("clvr-jax"),
        format="torch",
        recipe=recipe,
        steps=steps,
        base_model=repository_of(source) if source else None,
        relation="finetune" if source else None,
    )
    if models := models_in(directory):
        write_text(directory / "README.md", model_card(name, made, models, OF_SOURCE if source else OWN))
    for adapter, title in ((directory, name), (directory / "lora", f"{name}, LoRA")):
        if source and _is_lora(adapter):
            write_text(adapter / "README.md", lora_card(title, made, _models_of(source)))


def base_of(config: Configuration) -> str | None:
    """Returns the model from which training starts, as the configuration names it; None for random weights."""
    values = (getattr(config, name, None) for name in _BASE)
    return next((str(value) for value in values if isinstance(value, str | Path) and str(value)), None)


def lora_card(name: str, made: Provenance, base: Models) -> str:
    """Returns the card of a LoRA.

    Args:
      name: the title.
      made: its origin; `source` is the base model.
      base: the models of the base, whose license holds for the LoRA, too; empty if they cannot be read any more.
    """
    binding = license_of_all(base)
    known = [made.base_model] if made.base_model else []
    rows = [
        ("Base", f"`{made.source}`"),
        ("Made by", f"`{made.command}`"),
        ("clvr-jax", made.version),
        ("Recipe", f"`{made.recipe}`"),
        ("Steps", f"{made.steps:,}"),
    ]
    lines = [
        *front_matter("torch", base, binding, known, "adapter", ("lora",)),
        f"\n# {name}\n",
        f"A LoRA of `{made.source}`, which diffusers and `clvr sample --lora` read.\n",
        *Table(("", ""), [rows], is_markdown=True).markdown(),
        "\n## License\n",
        f"That of the base. **{binding.notice}**"
        if binding.commercial is False
        else f"That of the base. {binding.notice}",
    ]
    return "\n".join(lines) + "\n"


def _is_lora(directory: Path) -> bool:
    return torch_class(directory) is None and any(directory.glob("*.safetensors"))


def _models_of(source: str) -> Models:
    """Returns the models of a pipeline; none if it is gone, which must not lose a finished run."""
    try:
        return models_in(resolve(source)[0])
    except ClvrError:
        return {}
