"""Commands on a recipe, whose options the recipe decides."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import tyro

from clvr_jax.arguments import read_arguments
from clvr_jax.commands.common import Result, prepare_jax


@dataclass(frozen=True)
class RecipeCommand(abc.ABC):
    """A command on a recipe, which may change what the recipe says."""

    NAME: ClassVar[str]
    EXAMPLE: ClassVar[str]
    OVERRIDE: ClassVar[str]

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """Recipe: a Python file with CONFIG, such as configs/shapes_vae.py; it comes before the options."""

    def run(self) -> Result:
        """Does it as the recipe says."""
        recipe = self.load(self.config)
        return self.run_recipe(recipe, recipe.config)

    @staticmethod
    def load(path: Path) -> Any:
        """Reads a recipe; what comes has `config` and `description`. Recipes are those of training, unless a command
        has its own."""
        prepare_jax()
        from clvr_jax.training.recipes import load_recipe

        return load_recipe(path)

    @abc.abstractmethod
    def run_recipe(self, recipe: Any, config: Any) -> Result:
        """Does it with another config than the recipe's own."""


Kind = TypeVar("Kind", bound=RecipeCommand)


def parse_recipe_command(kind: type[Kind], arguments: Sequence[str]) -> Kind:
    """Reads the recipe first, since it says which options there are."""
    prog = f"clvr {kind.NAME}"
    path = next((argument for argument in arguments if not argument.startswith("-")), None)
    if path is None:
        return read_arguments(kind, arguments, prog, kind.__doc__, kind.EXAMPLE)
    recipe = kind.load(Path(path))
    options: Any = Annotated[type(recipe.config), tyro.conf.arg(name="")]

    @dataclass(frozen=True)
    class OnRecipe(kind):  # type: ignore[valid-type, misc]
        config_with_overrides: options = field(default_factory=lambda: recipe.config)

        def run(self) -> Result:
            return self.run_recipe(recipe, self.config_with_overrides)

    description = f"{path}: {recipe.description}"
    return read_arguments(OnRecipe, arguments, prog, description, f"{prog} {path} {kind.OVERRIDE}")
