"""Recipes: Python files that say what is trained. This loads one and runs it.

A recipe has `CONFIG`, a dataclass instance whose field `train` is a `TrainConfig`, and `task(config)`, which returns
the `Task` for such a config. Both are all the trainer needs, so a recipe may lie anywhere. One that is only planned,
such as a sampler, has `program(config)` instead, and a field `mesh`.
"""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from clvr_jax.errors import ClvrError
from clvr_jax.files import read_json, write_json
from clvr_jax.outputs import check_folder
from clvr_jax.sharding import Layout, MeshConfig, without_layout
from clvr_jax.training.checkpoint import restore_part
from clvr_jax.training.trainer import Task, TrainConfig, fit, mesh_of

_RECIPE = "recipe.json"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recipe file says.

    name: of the file, without suffix. config: its CONFIG. task: config -> what to train. description: first line of the
    file's docstring. path: the file. abstract_task: as task, with shapes in place of arrays, if the recipe has it.
    program: config -> `plan.Program`, of a recipe that is only planned.
    """

    name: str
    config: Any
    task: Callable[[Any], Task]
    description: str = ""
    path: Path = Path()
    abstract_task: Callable[[Any], Task] | None = None
    program: Callable[[Any], Any] | None = None


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe file.

    Raises: ClvrError, one line, if there is no such file, if it cannot be imported, or if it is no recipe.
    """
    module = _import(Path(path))
    description = (module.__doc__ or "").strip().split("\n")[0]
    program = getattr(module, "program", None)
    if program is not None and isinstance(getattr(getattr(module, "CONFIG", None), "mesh", None), MeshConfig):
        return Recipe(Path(path).stem, module.CONFIG, _only_planned, description, Path(path).absolute(), None, program)
    lacking = [name for name in ("CONFIG", "task") if not hasattr(module, name)]
    if lacking:
        raise ClvrError(f"{path}: not a recipe, it defines no {' and no '.join(lacking)}; see configs/shapes_vae.py")
    config = module.CONFIG
    if not dataclasses.is_dataclass(config) or not isinstance(getattr(config, "train", None), TrainConfig):
        raise ClvrError(f"{path}: CONFIG must be a dataclass instance with a field `train` of type TrainConfig")
    if not callable(module.task):
        raise ClvrError(f"{path}: task must be a function (config) -> Task, got {type(module.task).__name__}")
    return Recipe(
        Path(path).stem, config, module.task, description, Path(path).absolute(), getattr(module, "abstract_task", None)
    )


def _only_planned(config: Any) -> Task:
    raise ClvrError("this recipe is planned, not trained: clvr plan")


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
    with mesh_of(config.train):
        # What a recipe loads is laid out over the mesh as it is read.
        task = recipe.task(config)
        if jax.process_index() == 0:
            write_json(out / _RECIPE, {"recipe": str(recipe.path), "config": _plain(config)})
        state = fit(task, config.train, out, resume=resume)
    return {"recipe": recipe.name, "out": str(out), "export": str(out / "export"), "steps": int(state.step)}


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, which need not be finished."""
    return (folder / _RECIPE).exists() and (folder / "checkpoints").is_dir()


def export_run(run: Path, destination: Path, part: str = "ema") -> int:
    """Writes the newest checkpoint of a run as its recipe exports it: folders that PyTorch loads.

    Args:
      run: folder of the run; its recipe must still be where it was.
      destination: the new folder.
      part: "ema", the average, or "params".
    Returns: the step that was exported.
    Raises: ClvrError if it is no run, holds no checkpoint, or the recipe is gone or another one now.
    """
    if not is_run(run):
        raise ClvrError(f"{run}: not the folder of a run, which holds {_RECIPE} and checkpoints/")
    made = read_json(run / _RECIPE)
    recipe = load_recipe(made["recipe"])
    config = _rebuilt(recipe.config, made["config"])
    # On the devices that are here, whatever the run had.
    with Layout(MeshConfig(fsdp=-1).make()).active() as layout:
        task = recipe.task(config)
        shardings = layout.parameters(task.params)
        wanted = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), task.params, shardings
        )
        params, step = restore_part(run / "checkpoints", part, wanted)
        with without_layout():
            task.export(params, destination)
    return step


def _plain(config: Any) -> Any:
    """A configuration as JSON can hold it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _rebuilt(template: Any, values: Any) -> Any:
    """The inverse, for a configuration of the template's types."""
    if dataclasses.is_dataclass(template) and not isinstance(template, type):
        fields = {field.name: _rebuilt(getattr(template, field.name), values[field.name])
                  for field in dataclasses.fields(template) if field.name in values}  # fmt: skip
        return dataclasses.replace(template, **fields)
    if isinstance(template, Path):
        return Path(values)
    return tuple(values) if isinstance(template, tuple) else values


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
