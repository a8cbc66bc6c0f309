"""Recipes: Python files that define what is trained. This module loads and runs them.

A recipe has `CONFIG`, a dataclass instance whose field `train` is a `TrainConfig`, and `task(config)`, which returns
the `Task` for such a config. The trainer needs nothing else, so a recipe may be stored anywhere. A recipe of RL names
`rl.fit` as its `fit`; its `task` and `train` are then a `PPRLTask` and a `PPRLConfig`. A recipe that is planned by
`program(config)`, not by a train step, has that function and `CONFIG.mesh`; without `task` it is only planned.
"""

import contextlib
import dataclasses
import inspect
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

import jax

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.atomic_io import located, write_json
from clvr_jax.files.buckets.objects import has_entry
from clvr_jax.files.buckets.paths import is_bucket, storage_path
from clvr_jax.files.buckets.run_files import run_files
from clvr_jax.files.json_input import read_object
from clvr_jax.files.locks import check_lock, locked_output, new_directory
from clvr_jax.files.output_paths import check_output_directory
from clvr_jax.files.recipe_files import Configuration, config_from_json, config_to_json, exits_refused, import_recipe
from clvr_jax.processes import broadcast_from_host0
from clvr_jax.sharding import MeshConfig, MeshLayout, without_layout
from clvr_jax.training.checkpoint import refuse_occupied, restore_part
from clvr_jax.training.loop import mesh_of
from clvr_jax.training.monitoring.clock import Goodput
from clvr_jax.training.trainer import Task, TrainConfig, TrainState, fit

if TYPE_CHECKING:
    from clvr_jax.training.plan import Program

RECIPE = "recipe.json"
"""File of a run that names its recipe and holds its configuration."""


class RecipeConfig(Configuration, Protocol):
    """The `CONFIG` of a recipe; its other fields are the recipe's own.

    In a recipe of RL, `train` is a `PPRLConfig`. Only a recipe with a `program` has `mesh`, and one without `task` has
    no `train`.
    """

    @property
    def train(self) -> TrainConfig:
        """Configuration of the training run."""
        ...

    @property
    def mesh(self) -> MeshConfig:
        """Configuration of the device mesh of a program that is planned."""
        ...


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The content of a recipe file.

    name: of the file, without suffix. config: its CONFIG. task: config -> what to train. description: first line of the
    file's docstring. path: of the file. abstract_task: as `task`, with shapes in place of arrays, if the recipe has it.
    program: config -> `plan.Program`, of a recipe that is planned by it. fit: trains the task.
    """

    name: str
    config: RecipeConfig
    task: Callable[[RecipeConfig], Task]
    description: str = ""
    path: Path = Path()
    abstract_task: Callable[[RecipeConfig], Task] | None = None
    program: "Callable[[RecipeConfig], Program | Sequence[Program]] | None" = None
    fit: Callable[..., TrainState] = fit


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe file.

    Raises: ClvrError, one line, if there is no such file, if it cannot be imported, or if it is no recipe.
    """
    module = import_recipe(Path(path))
    description = (module.__doc__ or "").strip().split("\n")[0]
    loop, program = getattr(module, "fit", fit), getattr(module, "program", None)
    if not isinstance(getattr(getattr(module, "CONFIG", None), "mesh", None), MeshConfig):
        program = None
    if program is not None and not hasattr(module, "task"):
        return Recipe(Path(path).stem, module.CONFIG, _only_planned, description, Path(path).absolute(), None, program)
    lacking = [name for name in ("CONFIG", "task") if not hasattr(module, name)]
    if lacking:
        raise ClvrError(f"{path}: not a recipe, it defines no {' and no '.join(lacking)}; see configs/shapes_vae.py")
    config: RecipeConfig = module.CONFIG
    is_ours = loop is fit  # another loop takes what it likes
    if not dataclasses.is_dataclass(config) or (
        is_ours and not isinstance(getattr(config, "train", None), TrainConfig)
    ):
        raise ClvrError(f"{path}: CONFIG must be a dataclass instance with a field `train` of type TrainConfig")
    if not callable(module.task):
        raise ClvrError(f"{path}: task must be a function (config) -> Task, got {type(module.task).__name__}")
    abstract_task = getattr(module, "abstract_task", None)
    return Recipe(
        Path(path).stem, config, module.task, description, Path(path).absolute(), abstract_task, program, loop
    )


def _only_planned(config: RecipeConfig) -> Task:
    raise ClvrError("this recipe is planned, not trained: clvr plan")


class TrainResult(TypedDict):
    """The result of a run: name of the recipe, directory of the run, that of the exported model (None if the run was
    asked to stop), and number of optimizer steps.
    """

    recipe: str
    out: str
    export: str | None
    steps: int


def train(
    recipe: Recipe,
    config: RecipeConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    began: float | None = None,
) -> TrainResult:
    """Runs a recipe.

    Args:
      recipe: what to run.
      config: the recipe's config, with overrides.
      out: directory of the run, see `fit`; it may be in a bucket, and is checked before anything is built.
      resume: continue from the newest checkpoint in `out`.
      began: time of the start of the program in seconds since 1970, from which its wall time is counted; now if not
        given.
    """
    began = began or time.time()
    run = storage_path(out)
    own = inspect.signature(recipe.fit).parameters
    if is_bucket(run) and "on_export" not in own:
        raise UsageError(f"{run}: {recipe.path} has a `fit` of its own without `on_export`; choose a --out on a disk")
    check_output_directory(run)

    def on_begin() -> None:
        if jax.process_index() == 0:
            write_json(run / RECIPE, {"recipe": str(recipe.path), "config": config_to_json(config)})

    def on_export(directory: Path, steps: int) -> None:
        from clvr_jax.training.export_card import add_export_cards  # imports all architectures

        add_export_cards(directory, run.name, recipe.name, config, steps)

    with run_lock(run), run_files(run, lambda: check_lock(run)), Goodput(began):
        refuse_occupied(run / "checkpoints", resume=resume)
        with mesh_of(config.train.mesh), exits_refused(recipe.path):
            # Weights that a recipe loads are sharded over the mesh while they are read.
            task = recipe.task(config)
            # The recipe.json of a finished run is not overwritten before this run is known to begin.
            calls = {"on_begin": on_begin, "on_export": on_export}
            if "on_begin" not in own:
                on_begin()
            known = {name: call for name, call in calls.items() if name in own}
            state = recipe.fit(task, config.train, run, resume=resume, **known)
    # A run that was asked to stop has exported nothing.
    is_done = int(state.iteration) == config.train.loop(recipe.name).iterations
    if is_done and "on_export" not in own and jax.process_index() == 0 and (run / "export").is_dir():
        on_export(run / "export", int(state.step))
    export = str(run / "export") if is_done else None
    return {"recipe": recipe.name, "out": str(run), "export": export, "steps": int(state.step)}


@contextlib.contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Holds the lock of a run's directory, for all its processes in process 0; an empty directory is not left behind.

    Raises: ClvrError, on every process, if another run writes there.
    """
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            stack.enter_context(locked_output(out))

        broadcast_from_host0(hold)
        yield


def is_run(directory: Path) -> bool:
    """Returns whether a directory is that of a run, which need not be finished."""
    return has_entry(directory / RECIPE) and (is_bucket(directory) or (directory / "checkpoints").is_dir())


def export_run(run: str | os.PathLike[str], destination: Path, part: str = "ema") -> int:
    """Writes the newest checkpoint of a run as its recipe exports it: directories that PyTorch loads.

    Args:
      run: directory of the run, which may be in a bucket; its recipe must still be where it was.
      destination: the new directory.
      part: "ema", the EMA of the parameters, or "params".
    Returns: the step that was exported.
    Raises: ClvrError if it is no run, holds no checkpoint, the recipe is gone or another one now, or another process
      writes to `destination`; UsageError if `destination` exists.
    """
    source = storage_path(run)
    if not is_run(source):
        raise ClvrError(f"{source}: not the directory of a run, which holds {RECIPE} and checkpoints/")
    with new_directory(destination, "export") as directory:
        return _export_part(source, directory, part, destination.name)


def _export_part(run: Path, directory: Path, part: str, name: str) -> int:
    """Writes a part of the newest checkpoint with a card of this title; returns its step."""
    made = read_object(run / RECIPE)
    recipe = load_recipe(made.text("recipe"))
    with located(run / RECIPE):
        config = config_from_json(recipe.config, dict(made.nested("config").content))
    # On the devices of this machine, whatever devices the run had.
    with MeshLayout(MeshConfig(fsdp=-1).make()).active() as layout:
        task = recipe.task(config)
        shardings = layout.parameters(task.params)
        wanted = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), task.params, shardings
        )
        params, step = restore_part(run / "checkpoints", part, wanted)
        with without_layout():
            task.export(params, directory)
    from clvr_jax.training.export_card import add_export_cards

    add_export_cards(directory, name, recipe.name, config, step)
    return step
