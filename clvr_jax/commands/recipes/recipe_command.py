"""Commands on a recipe, whose fields become options of the command."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

import tyro

from clvr_jax.arguments import read_arguments
from clvr_jax.commands.common import Result, prepare_jax
from clvr_jax.files.recipe_files import Configuration, find_recipe


class LoadedRecipe(Protocol):
    """A recipe of any kind."""

    @property
    def config(self) -> Configuration:
        """Its configuration, whose fields become options."""
        ...

    @property
    def description(self) -> str:
        """The first line of its docstring."""
        ...


@dataclass(frozen=True)
class RecipeCommand(abc.ABC):
    """A command on a recipe, whose fields can be overridden on the command line."""

    NAME: ClassVar[str]
    EXAMPLE: ClassVar[str]
    OVERRIDE: ClassVar[str]
    """Options of the command for the example of a recipe in --help."""
    RECIPE_OVERRIDES: ClassVar[Mapping[str, str]] = {}
    """Options of recipes for this example: field of the config -> value; those that a recipe lacks are left out."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """Run this recipe: a name such as shapes_vae, or a Python file that defines CONFIG. Give it before the options."""

    def run(self) -> Result:
        """Runs the command with the recipe's configuration."""
        recipe = self.load(find_recipe(self.config))
        return self.run_recipe(recipe, recipe.config)

    @staticmethod
    def load(path: Path) -> LoadedRecipe:
        """Reads a recipe file.

        The default is for training recipes; a command with other recipes overrides this.
        """
        prepare_jax()
        from clvr_jax.training.recipes import load_recipe

        return load_recipe(path)

    @abc.abstractmethod
    def run_recipe(self, recipe: Any, config: Any) -> Result:
        """Runs the command with a configuration: the recipe's, or the recipe's with overrides."""


Kind = TypeVar("Kind", bound=RecipeCommand)


def parse_recipe_command(kind: type[Kind], arguments: Sequence[str]) -> Kind:
    """Parses a command line; the recipe is loaded first, because its fields are the options."""
    prog = f"clvr {kind.NAME}"
    path = next((argument for argument in arguments if not argument.startswith("-")), None)
    if path is None:
        return read_arguments(kind, arguments, prog, kind.__doc__, kind.EXAMPLE)
    on_recipe, description, example = command_on_recipe(kind, path)
    return read_arguments(on_recipe, arguments, prog, description, example)


def command_on_recipe(kind: type[Kind], path: str) -> tuple[type[Kind], str, str]:
    """Returns the command whose options are also the fields of a recipe, and the description and example in --help.

    Args:
      kind: the command.
      path: name or file of the recipe.
    """
    recipe = kind.load(find_recipe(path))
    options: Any = Annotated[type(recipe.config), tyro.conf.arg(name="")]

    @dataclass(frozen=True)
    class OnRecipe(kind):  # type: ignore[valid-type, misc]
        config_with_overrides: options = field(default_factory=lambda: recipe.config)

        def run(self) -> Result:
            found: Result = self.run_recipe(recipe, self.config_with_overrides)
            return found

    example = f"clvr {kind.NAME} {path} {_example_options(kind, recipe.config)}"
    return OnRecipe, f"{path}: {recipe.description}", example


def _example_options(kind: type[RecipeCommand], config: Configuration) -> str:
    """Returns options that a recipe accepts, for the example in --help."""
    options = []
    for name, value in kind.RECIPE_OVERRIDES.items():
        try:
            attrgetter(name)(config)
        except AttributeError:
            continue
        options.append(f"--{name.replace('_', '-')} {value}")
    return " ".join([*options, kind.OVERRIDE])
