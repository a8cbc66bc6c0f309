"""The provenance of a merged directory: merge.json for programs and the model card README.md.

merge.json, whose field `inputs` is a stable interface:

    {"method": "dswm", "formula": ..., "weights": {"distill": 1.0, "align": 1.0}, "component": "transformer",
     "inputs": {"base": {"source": ..., "revision": ..., "kind": "weights", "dtypes": [...], "files": {name: sha256}},
                "distill": ..., "align": ...},
     "dtypes": [...], "arithmetic": "float32", "scheduler": "base", "norms": {...}, "notes": [...], "versions": {...}}

The digest of the directory `params/` is that of the lines "sha256 name" of its files, without _CHECKPOINT_METADATA.
"""

import json
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from clvr_jax.convert.model_card import (
    FORMATS,
    Models,
    front_matter,
    license_of_all,
    models_and_license,
    models_in,
    titles,
)
from clvr_jax.display.tables import Table
from clvr_jax.files.atomic_io import write_json, write_text
from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.merging.norms import DeltaStatistics, total
from clvr_jax.merging.planning import MERGE, Merge
from clvr_jax.merging.sources import LoRADelta, Weights

_INPUT_COLUMNS = ("Input", "From", "Kind", "Weight", "License as its card states it")


def write_provenance(
    plan: Merge, directory: Path, name: str, command: str, sums: Mapping[str, DeltaStatistics]
) -> None:
    """Writes merge.json and README.md.

    Args:
      plan: the executed plan.
      directory: contains the merged models.
      name: the title of the card.
      command: the command line.
      sums: key -> statistics of each tensor, from `merge`.
    """
    made = record(plan, sums)
    write_json(directory / MERGE, made)
    write_text(directory / "README.md", card(plan, made, models_in(directory), name, command))


def record(plan: Merge, sums: Mapping[str, DeltaStatistics]) -> dict[str, JSON]:
    """Returns the content of merge.json; reads the rest of the inputs for their digests."""
    settings = plan.settings
    weights = {"distill": settings.distill_weight, "align": settings.align_weight}
    options = {"density": settings.density, "seed": settings.seed if settings.method == "dare" else None}
    return {
        "method": settings.method,
        "formula": settings.formula,
        "weights": {side: dict(weight) if isinstance(weight, Mapping) else weight for side, weight in weights.items()},
        **{option: value for option, value in options.items() if value is not None},
        "component": plan.base.component.name,
        "inputs": {side.role: _described(side) for side in plan.inputs},
        "dtypes": plan.base.dtypes,
        "arithmetic": "float32",
        "scheduler": plan.scheduler,
        "norms": total(sums.values()).to_json(),
        "forced": plan.force,
        "notes": list(plan.notes),
        "versions": {name: version(name) for name in ("clvr-jax", "jax", "numpy")}
        | {"python": platform.python_version()},
    }


def card(plan: Merge, made: UncheckedJSON, models: Models, name: str, command: str) -> str:
    """Returns the text of README.md: the three inputs, the formula and the licenses.

    Args:
      plan, name, command: as for `write_provenance`.
      made: the content of merge.json.
      models: component -> (PyTorch's class, config.json).
    """
    binding = license_of_all(models)
    ids = [side.origin.name.partition("@")[0] for side in plan.inputs if side.origin.revision]
    weights = [{"base": "1"} | {side: json.dumps(weight) for side, weight in made["weights"].items()}]
    inputs = [
        (side.role, _named(side), "LoRA" if isinstance(side, LoRADelta) else "weights", weights[0][side.role],
         stated_license(side) or "not stated")
        for side in plan.inputs
    ]  # fmt: skip
    norms = made["norms"]
    rows = [
        ("Method", f"{made['method']}: `{made['formula']}`, in float32"),
        *((option, str(made[option])) for option in ("density", "seed") if option in made),
        ("Made by", f"`{command}`"),
        ("clvr-jax", made["versions"]["clvr-jax"]),
        ("Layout", FORMATS[plan.base.component.source]),
        ("Numbers", ", ".join(made["dtypes"])),
        ("Relative norm of the deltas", f"distill {_percent(norms['distill'])}, align {_percent(norms['align'])}"),
        *([("Scheduler", f"that of {plan.scheduler}")] if plan.scheduler else []),
        ("Record", f"`{MERGE}`, with the sha256 of every file that was read"),
    ]
    merged = "the model" if plan.base.component.name == "." else f"`{plan.base.component.name}`"
    lines = [
        *front_matter(plan.base.component.source, models, binding, list(dict.fromkeys(ids)), "merge"),
        f"\n# {name}\n",
        f"{', '.join(titles(models))}. Merged is {merged}; everything else is the base's.\n",
        *Table(_INPUT_COLUMNS, [inputs], is_markdown=True).markdown(),
        "",
        *Table(("", ""), [rows], is_markdown=True).markdown(),
        *(f"\n{note[0].upper()}{note[1:]}." for note in plan.notes),
        *models_and_license(models, binding),
        "\nThe weights derive from all inputs: the license of each applies.",
    ]
    return "\n".join(lines) + "\n"


_MAX_FRONT_MATTER = 1 << 16
"""Number of bytes of a model card in which its front matter must end."""


def stated_license(side: Weights | LoRADelta) -> str | None:
    """Returns the license in the front matter of an input's README.md; None if there is none."""
    readme = (side.file.parent if isinstance(side, LoRADelta) else side.origin.path) / "README.md"
    if not readme.is_file():
        return None
    with readme.open("rb") as file:
        beginning = file.read(_MAX_FRONT_MATTER).decode("utf-8", "replace")
    front = re.match(r"---\r?\n(.*?)\n---", beginning, re.DOTALL)
    stated = dict(re.findall(r"^(license|license_name): *(\S+) *$", front[1], re.MULTILINE)) if front else {}
    return stated.get("license_name") or stated.get("license")


def _described(side: Weights | LoRADelta) -> dict[str, JSON]:
    return {
        "source": side.origin.name,
        "revision": side.origin.revision,
        "kind": "lora" if isinstance(side, LoRADelta) else "weights",
        "license": stated_license(side),
        "dtypes": side.dtypes,
        "files": side.digests.finish(),
    }


def _named(side: Weights | LoRADelta) -> str:
    return f"`{side.origin.name}`" + (f", revision `{side.origin.revision}`" if side.origin.revision else "")


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:.3g} %"
