"""`clvr synth`: the data engine."""

import logging
import webbrowser
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from clvr_jax.commands.common import Common, Directory, Flags, Result, prepare_jax
from clvr_jax.commands.recipes.recipe_command import RecipeCommand
from clvr_jax.errors import ClvrError, UsageError

if TYPE_CHECKING:
    from clvr_jax.data.engine.recipes import RecipeConfig, SynthRecipe


@dataclass(frozen=True)
class Synth(RecipeCommand):
    """Synthesizes verified trajectories for the prompts of a recipe. The same command resumes an interrupted run."""

    NAME: ClassVar = "synth"
    EXAMPLE: ClassVar = "clvr synth shapes_synth --count 200 --out runs/synth"
    OVERRIDE: ClassVar = "--out runs/synth"
    RECIPE_OVERRIDES: ClassVar = {"count": "200"}

    out: Directory = None
    """Write outcomes, dataset, statistics and dataset card to this directory; runs/NAME-OF-RECIPE if not given."""
    inspect: str = ""
    """Open the page of this finished prompt, given by its id or by its number (from 0, in the order of ids), and
    synthesize nothing."""
    sharegpt: Directory = None
    """Write the accepted trajectories to this directory as ShareGPT records as well; not written if not given."""
    common: Flags = field(default_factory=Common)

    @staticmethod
    def load(path: Path) -> "SynthRecipe":
        """Loads a recipe of the data engine."""
        prepare_jax()
        from clvr_jax.data.engine.recipes import load_synth_recipe

        return load_synth_recipe(path)

    def run_recipe(self, recipe: "SynthRecipe", config: "RecipeConfig") -> Result:
        """Synthesizes the trajectories, or opens the page of one."""
        from clvr_jax.data.engine.reporting.card import headline, warning
        from clvr_jax.data.engine.reporting.sharegpt import write_sharegpt
        from clvr_jax.data.engine.run import DATASET, PAGE, synthesize_dataset
        from clvr_jax.data.trajectories.dataset import TrajectoryDataset
        from clvr_jax.display.console import console

        out = self.out or Path("runs") / recipe.name
        if self.inspect:
            return self._inspect(recipe, config, out)
        if self.sharegpt is not None and self.sharegpt.exists():
            raise UsageError(f"--sharegpt {self.sharegpt}: exists already; choose another name or remove it")
        _load_beam(self.common.debug)
        found = synthesize_dataset(recipe, config, out)
        if self.sharegpt is not None:
            write_sharegpt((record for _, record in TrajectoryDataset(out / DATASET).scan()), self.sharegpt)
        if caution := warning(found):
            console.print(caution, style="yellow")
        if unfinished := found["unfinished"]["sentence"]:
            raise ClvrError(f"{unfinished}; {out / DATASET} has the others")
        return Result({**found, "out": str(out)}, f"{headline(found)}\n{out / DATASET}  {out / PAGE}")

    def _inspect(self, recipe: "SynthRecipe", config: "RecipeConfig", out: Path) -> Result:
        from clvr_jax.data.engine.run import open_run

        store = open_run(recipe, config, out)
        ids = sorted(store.ids())
        if self.inspect in ids:
            id = self.inspect
        elif self.inspect.isdecimal() and int(self.inspect) < len(ids):
            id = ids[int(self.inspect)]
        else:
            raise UsageError(f"--inspect {self.inspect}: {out} has {len(ids)} finished prompts, but not this one")
        finished, trajectory = store.read(id), store.trajectory(id)
        if trajectory is None:
            raise ClvrError(f"{id}: discarded before the first image ({finished.reason}: {finished.detail})")
        page = trajectory.save(out / "inspected" / id) / "index.html"
        webbrowser.open(page.absolute().as_uri())
        return Result({**finished.content, "page": str(page)}, str(page))


def _load_beam(debug: bool) -> None:
    """Imports Apache Beam without its log messages; errors of workers are raised in any case.

    Raises: ClvrError if it is not installed.
    """
    logging.getLogger("apache_beam").setLevel(logging.INFO if debug else logging.CRITICAL)
    logging.disable(logging.WARNING)  # it logs warnings about optional packages to the root logger
    try:
        import apache_beam  # noqa: F401
    except ImportError as error:
        raise ClvrError("clvr synth needs Apache Beam: pip install 'clvr-jax[synth]'") from error
    finally:
        logging.disable(logging.NOTSET)
