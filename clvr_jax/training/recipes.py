"""Recipes: Python files that say what is trained. This loads one and runs it.

A recipe has `CONFIG`, a dataclass instance whose field `train` is a `TrainConfig`, and `task(config)`, which returns
the `Task` for such a config. Both are all the trainer needs, so a recipe may lie anywhere.
"""

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from clvr_jax.errors import ClvrError
from clvr_jax.outputs import check_folder
from clvr_jax.training.trainer import Task, TrainConfig, fit


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recipe file says.

    name: of the file, without suffix. config: its CONFIG. task: config -> what to train. description: first line of the
    file's docstring.
    """

    name: str
    config: Any
    task: Callable[[Any], Task]
    description: str = ""


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe file.

    Raises: ClvrError, one line, if there is no such file, if it cannot be imported, or if it is no recipe.
    """
    module = _import(Path(path))
    lacking = [name for name in ("CONFIG", "task") if not hasattr(module, name)]
    if lacking:
        raise ClvrError(f"{path}: not a recipe, it defines no {' and no '.join(lacking)}; see configs/shapes_vae.py")
    config = module.CONFIG
    if not dataclasses.is_dataclass(config) or not isinstance(getattr(config, "train", None), TrainConfig):
        raise ClvrError(f"{path}: CONFIG must be a dataclass instance with a field `train` of type TrainConfig")
    if not callable(module.task):
        raise ClvrError(f"{path}: task must be a function (config) -> Task, got {type(module.task).__name__}")
    return Recipe(Path(path).stem, config, module.task, (module.__doc__ or "").strip().split("\n")[0])


def train(recipe: Recipe, config: Any, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Runs a recipe.

    Args:
      recipe: what to run.
      config: the recipe's config, with overrides.
      out: folder of the run, see `fit`; checked before anything is built.
      resume: go on from the newest checkpoint in `out`.
    Returns: {"recipe", "out", "export", "steps"} for JSON.
    """
    check_folder(out)
    state = fit(recipe.task(config), config.train, out, resume=resume)
    return {"recipe": recipe.name, "out": str(out), "export": str(out / "export"), "steps": int(state.step)}


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise ClvrError(f"{path}: no such recipe; give a Python file such as configs/shapes_vae.py")
    name = f"clvr_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ClvrError(f"{path}: not a Python file; a recipe ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except ClvrError as error:
        raise ClvrError(f"{path}: {error}") from error
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ClvrError(f"{path}: cannot be imported ({type(error).__name__}: {reason})") from error
    return module
