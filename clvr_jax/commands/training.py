"""`clvr train`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from clvr_jax.arguments import read_arguments
from clvr_jax.commands.common import Common, Flags, Folder, Result, prepare_jax

if TYPE_CHECKING:
    from clvr_jax.training.recipes import Recipe


@dataclass(frozen=True)
class Train:
    """Runs a recipe. `clvr train CONFIG --help` lists what the recipe lets you change."""

    EXAMPLE: ClassVar = "clvr train configs/shapes_vae.py --train.steps 500 --out runs/try"

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """Recipe: a Python file with CONFIG and task(config); it comes before the options."""
    out: Folder = None
    """Folder for checkpoints, metrics and the exported weights; runs/NAME-OF-RECIPE if not given."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""
    common: Flags = field(default_factory=Common)

    def run(self) -> Result:
        """Trains as the recipe says."""
        recipe = _load_recipe(self.config)
        return self.run_recipe(recipe, recipe.config)

    def run_recipe(self, recipe: "Recipe", config: Any) -> Result:
        """Trains with another config than the recipe's own."""
        from clvr_jax.training.recipes import train

        result = train(recipe, config, self.out or Path("runs") / recipe.name, resume=self.resume)
        return Result(result, result["export"])


def parse_train(arguments: Sequence[str]) -> Train:
    """Reads the recipe first, since it says which options there are."""
    path = next((argument for argument in arguments if not argument.startswith("-")), None)
    if path is None:
        return read_arguments(Train, arguments, "clvr train", Train.__doc__, Train.EXAMPLE)
    recipe = _load_recipe(Path(path))
    options: Any = Annotated[type(recipe.config), tyro.conf.arg(name="")]

    @dataclass(frozen=True)
    class TrainRecipe(Train):
        config_with_overrides: options = field(default_factory=lambda: recipe.config)

        def run(self) -> Result:
            return self.run_recipe(recipe, self.config_with_overrides)

    example = f"clvr train {path} --train.steps 500 --out runs/try"
    return read_arguments(TrainRecipe, arguments, "clvr train", f"{path}: {recipe.description}", example)


def _load_recipe(path: Path) -> "Recipe":
    prepare_jax()
    from clvr_jax.training.recipes import load_recipe

    return load_recipe(path)
