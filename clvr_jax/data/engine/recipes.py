"""Recipes of the data engine: Python files that define prompts, models and limits.

A recipe has `CONFIG`, a dataclass instance with a field `synth` of type `SynthConfig`, and these functions:

    prompts(config) -> the prompts, as `PromptItem`
    worker_context(config) -> the models, a `WorkerContext`; called once in each worker process
    evaluation_prompts(config) -> texts that must not be in the dataset; optional
    audit(record) -> whether each target image of a record is right, by an exact check; optional
    corrections(record) -> number of wrong images of a record that had to be corrected, by an exact check; optional, all
        wrong images count by default
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from clvr_jax.data.engine.engine import Settings
from clvr_jax.data.engine.intake import MAX_CHARACTERS
from clvr_jax.data.engine.metering import UsageTracker
from clvr_jax.data.engine.roles.base import PromptItem, Roles
from clvr_jax.data.engine.roles.prompted import TEMPLATES_VERSION
from clvr_jax.data.trajectories.record import TrajectoryRecord
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.json_input import JSON
from clvr_jax.files.recipe_files import Configuration, config_from_json, config_to_json, import_recipe
from clvr_jax.files.redaction import redact_urls
from clvr_jax.interfaces import ImageModel

_COUNT_FIELDS = ("count", "prompts")
_SPEED_FIELDS = ("in_flight", "beam", "max_failures")
_ENDPOINT = {"model", "base_url", "key_variable"}


@dataclass(frozen=True)
class SynthConfig:
    """The configuration of a synthesis run.

    Attributes:
      seed: seed of the run; all other seeds are derived from it and the id of a prompt.
      max_turns, max_pictures: budget of a prompt, see `engine.Settings`.
      verify: passive verification of each image; disabled only to measure its effect.
      keep_mistakes: a wrong image stays in the history as context, never as a target of the image generator, and is
        corrected; without it one wrong image discards the trajectory, as in the paper.
      max_characters: maximum length of a prompt; longer prompts are refused.
      near_duplicate: see `intake.EvaluationPrompts`.
      in_flight: number of concurrent prompts in each worker process.
      beam: options of Apache Beam in one string, for example "--runner=DataflowRunner --project=P --region=R".
      max_failures: number of consecutive prompts that may fail, without an outcome between them, before the run stops;
        otherwise a provider that is down would be called for each prompt.
      outcomes: directory or bucket that all workers can access; empty is OUT/outcomes, for one machine.
    Raises: UsageError for values out of range.
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
            raise UsageError(f"synth: near_duplicate must be in (0, 1], got {self.near_duplicate}")

    @property
    def settings(self) -> Settings:
        """The settings of the engine."""
        versions = {"templates": str(TEMPLATES_VERSION)}
        return Settings(self.max_turns, self.max_pictures, self.verify, self.keep_mistakes, versions=versions)


class WorkerContext(Protocol):
    """The models of a worker process."""

    @property
    def image_model(self) -> ImageModel:
        """The image generator of all prompts."""
        ...

    def roles(self, item: PromptItem, tracker: UsageTracker) -> Roles:
        """Returns the roles for a prompt; their models must be wrapped by `tracker.model(role, model)`."""
        ...


class RecipeConfig(Configuration, Protocol):
    """The `CONFIG` of a recipe of the data engine; its other fields are the recipe's own."""

    @property
    def synth(self) -> SynthConfig:
        """The options that all recipes have."""
        ...


@dataclass(frozen=True)
class SynthRecipe:
    """The content of a recipe file, see the docstring of this module."""

    name: str
    config: RecipeConfig
    description: str
    path: Path
    prompts: Callable[[RecipeConfig], Iterable[PromptItem]]
    evaluation_prompts: Callable[[RecipeConfig], Iterable[str]]
    audit: Callable[[TrajectoryRecord], Sequence[bool]] | None
    corrections: Callable[[TrajectoryRecord], int] | None


def load_synth_recipe(path: Path) -> SynthRecipe:
    """Reads a recipe file. Raises: ClvrError, one line, if it cannot be imported or is no recipe of the engine."""
    module = import_recipe(path)
    if missing := [name for name in ("CONFIG", "prompts", "worker_context") if not hasattr(module, name)]:
        raise ClvrError(
            f"{path}: not a recipe of the data engine, it defines no {' and no '.join(missing)}; see "
            "configs/shapes_synth.py"
        )
    config: RecipeConfig = module.CONFIG
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
    """A serializable function that makes a recipe's worker context in any process.

    Attributes:
      name: name of the recipe.
      text: content of the recipe file.
      config: the config as JSON.
    """

    name: str
    text: str
    config: str

    @classmethod
    def from_recipe(cls, recipe: SynthRecipe, config: RecipeConfig) -> "RecipeWorkerContext":
        """Returns the function for a recipe with a config, which may differ from `CONFIG`."""
        return cls(recipe.name, recipe.path.read_text(encoding="utf-8"), json.dumps(config_to_json(config)))

    def __call__(self) -> WorkerContext:
        """Loads the models."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / f"{self.name}.py"
            path.write_text(self.text, encoding="utf-8")
            module = import_recipe(path)
        context: WorkerContext = module.worker_context(config_from_json(module.CONFIG, json.loads(self.config)))
        return context


def identity(recipe: SynthRecipe, config: RecipeConfig) -> dict[str, JSON]:
    """Returns the values that must be equal when a run is resumed.

    These are all values except the number of prompts, the speed, and the calls of endpoints: a key, a timeout or a
      price
    may be changed. Credentials in URLs are redacted, since the result is stored.
    """
    values = {name: value for name, value in config_to_json(config).items() if name not in _COUNT_FIELDS}
    values["synth"] = {name: value for name, value in config_to_json(config.synth).items() if name not in _SPEED_FIELDS}
    return _comparable_object({"recipe": recipe.name, "config": values, "templates": TEMPLATES_VERSION})


def comparable(value: JSON) -> JSON:
    """Returns an identity, possibly of an earlier version, with only model and redacted URL of each endpoint."""
    if not isinstance(value, dict):
        return redact_urls(value)
    return _comparable_object(value)


def _comparable_object(value: Mapping[str, JSON]) -> dict[str, JSON]:
    names = ("model", "base_url") if value.keys() >= _ENDPOINT else value.keys()
    return {name: comparable(value[name]) for name in names}
