"""Recipes of the data engine: Python files that say which prompts, which models, and how hard they are pressed.

A recipe has `CONFIG`, a dataclass instance with a field `synth` of type `SynthConfig`, and these functions:

    prompts(config) -> the prompts, as `PromptItem`
    worker_context(config) -> what makes trajectories of them, a `WorkerContext`; called once in each worker process
    evaluation_prompts(config) -> texts that must not be learned from; may be left out
    audit(record) -> for each picture of a record that is a target whether it is right, where a program can tell; may be
        left out
    corrections(record) -> how many wrong images of a record had to be corrected, where a program can tell; if it is
        left out, all of them count
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from clvr_jax.data.engine.engine import Settings
from clvr_jax.data.engine.intake import MAX_CHARACTERS
from clvr_jax.data.engine.metering import UsageTracker
from clvr_jax.data.engine.prompted_roles import TEMPLATES_VERSION
from clvr_jax.data.engine.roles import PromptItem, Roles
from clvr_jax.data.trajectory_record import TrajectoryRecord
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.interfaces import ImageModel
from clvr_jax.recipe_files import import_recipe, plain, rebuilt
from clvr_jax.redaction import redact_urls

_HOW_MANY = ("count", "prompts")
_HOW_FAST = ("in_flight", "beam", "max_failures")
_ENDPOINT = {"model", "base_url", "key_variable"}


@dataclass(frozen=True)
class SynthConfig:
    """How trajectories are made.

    Attributes:
      seed: of the run; with a prompt's id it decides every other seed.
      max_turns, max_pictures: budget of a prompt, see `engine.Settings`.
      verify: passive verification; without it only for measuring what it is worth.
      keep_mistakes: a wrong image stays in the history as context, never as a target of the image generator, and is
        corrected; without it one wrong image discards the trajectory, as in the paper.
      max_characters: of a prompt; longer ones are refused.
      near_duplicate: see `intake.EvaluationPrompts`.
      in_flight: prompts at once in each worker process.
      beam: options of Apache Beam in one string, e.g. "--runner=DataflowRunner --project=P --region=R".
      max_failures: prompts that may fail one after the other, with no outcome between them, before the run stops; a
        provider that is down would else be asked about every prompt.
      outcomes: folder or bucket that all workers reach; OUT/outcomes if empty, which is right on one machine.
    """

    seed: int = 0
    max_turns: int = 24
    max_pictures: int = 8
    verify: bool = True
    keep_mistakes: bool = True
    max_characters: int = MAX_CHARACTERS
    near_duplicate: float = 0.8
    in_flight: int = 64
    beam: str = ""
    max_failures: int = 16
    outcomes: str = ""

    def __post_init__(self) -> None:
        for name in ("in_flight", "max_turns", "max_pictures", "max_characters", "max_failures"):
            if getattr(self, name) < 1:
                raise UsageError(f"synth: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.near_duplicate <= 1:
            raise UsageError(f"synth: near_duplicate must lie in (0, 1], got {self.near_duplicate}")

    @property
    def settings(self) -> Settings:
        """As the engine takes them."""
        versions = {"templates": str(TEMPLATES_VERSION)}
        return Settings(self.max_turns, self.max_pictures, self.verify, self.keep_mistakes, versions=versions)


class WorkerContext(Protocol):
    """The models of a worker process."""

    @property
    def image_model(self) -> ImageModel:
        """What draws, for all prompts."""
        ...

    def roles(self, item: PromptItem, tracker: UsageTracker) -> Roles:
        """Who plays the roles for a prompt; models are metered, `tracker.model(role, model)`."""
        ...


@dataclass(frozen=True)
class SynthRecipe:
    """What a recipe file says; see the top of this file."""

    name: str
    config: Any
    description: str
    path: Path
    prompts: Callable[[Any], Iterable[PromptItem]]
    evaluation_prompts: Callable[[Any], Iterable[str]]
    audit: Callable[[TrajectoryRecord], Sequence[bool]] | None
    corrections: Callable[[TrajectoryRecord], int] | None


def load_synth_recipe(path: Path) -> SynthRecipe:
    """Reads a recipe file. Raises: ClvrError, one line, if it cannot be imported or is no recipe of the engine."""
    module = import_recipe(path)
    if lacking := [name for name in ("CONFIG", "prompts", "worker_context") if not hasattr(module, name)]:
        raise ClvrError(
            f"{path}: not a recipe of the data engine, it defines no {' and no '.join(lacking)}; see "
            "configs/shapes_synth.py"
        )
    config = module.CONFIG
    if not dataclasses.is_dataclass(config) or not isinstance(getattr(config, "synth", None), SynthConfig):
        raise ClvrError(f"{path}: CONFIG must be a dataclass instance with a field `synth` of type SynthConfig")
    return SynthRecipe(
        path.stem,
        config,
        (module.__doc__ or "").strip().split("\n")[0],
        path.absolute(),
        module.prompts,
        getattr(module, "evaluation_prompts", lambda config: ()),
        getattr(module, "audit", None),
        getattr(module, "corrections", None),
    )


@dataclass(frozen=True)
class RecipeWorkerContext:
    """Makes a recipe's worker_context, wherever it is called: the recipe travels as text, its config as JSON."""

    name: str
    text: str
    config: str

    @classmethod
    def of(cls, recipe: SynthRecipe, config: Any) -> "RecipeWorkerContext":
        """That of a recipe with a config, which need not be its own."""
        return cls(recipe.name, recipe.path.read_text(encoding="utf-8"), json.dumps(plain(config)))

    def __call__(self) -> WorkerContext:
        """Loads the models."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{self.name}.py"
            path.write_text(self.text, encoding="utf-8")
            module = import_recipe(path)
        return module.worker_context(rebuilt(module.CONFIG, json.loads(self.config)))


def identity(recipe: SynthRecipe, config: Any) -> dict[str, Any]:
    """What must be the same when a run goes on.

    It is everything but how many prompts there are, how fast it goes, and how endpoints are called: a key, a time limit
    or a price may be corrected. Logins in addresses are left out, for this is written down.
    """
    values = {name: value for name, value in plain(config).items() if name not in _HOW_MANY}
    values["synth"] = {name: value for name, value in values["synth"].items() if name not in _HOW_FAST}
    return comparable({"recipe": recipe.name, "config": values, "templates": TEMPLATES_VERSION})


def comparable(value: Any) -> Any:
    """An identity, also one of an earlier version, with the model and the redacted address of each endpoint only."""
    if not isinstance(value, dict):
        return redact_urls(value)
    names = ("model", "base_url") if value.keys() >= _ENDPOINT else value.keys()
    return {name: comparable(value[name]) for name in names}
