"""`clvr train` and `clvr plan`."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from clvr_jax.arguments import StoragePath
from clvr_jax.commands.common import Common, Flags, Result
from clvr_jax.commands.recipes.recipe_command import RecipeCommand
from clvr_jax.display.console import progress
from clvr_jax.errors import ClvrError, UsageError

if TYPE_CHECKING:
    from clvr_jax.training.plan import Trial
    from clvr_jax.training.recipes import Recipe, RecipeConfig

_MAX_CHIPS = 1 << 16  # planning for a larger number, which must be a typing error, would not end


@dataclass(frozen=True)
class Train(RecipeCommand):
    """Trains a recipe. `clvr train CONFIG --help` lists the options of the recipe."""

    NAME: ClassVar = "train"
    EXAMPLE: ClassVar = "clvr train shapes_vae --train.steps 500 --out runs/try"
    OVERRIDE: ClassVar = "--out runs/try"
    RECIPE_OVERRIDES: ClassVar = {"train.steps": "500", "train.epochs": "2"}

    out: StoragePath | None = None
    """Write checkpoints, metrics and the exported weights to this directory, which may be in a bucket, such as
    gs://NAME/PREFIX; to runs/NAME-OF-RECIPE if not given."""
    resume: bool = False
    """Resume from the newest checkpoint in --out; without it a run starts at step 0."""
    common: Flags = field(default_factory=Common)

    def run_recipe(self, recipe: "Recipe", config: "RecipeConfig") -> Result:
        """Trains the recipe."""
        from clvr_jax.training.monitoring.clock import process_began
        from clvr_jax.training.recipes import train

        out = self.out or Path("runs") / recipe.name
        result = train(recipe, config, out, resume=self.resume, began=process_began())
        return Result(result, result["export"] or result["out"])


@dataclass(frozen=True)
class Plan(RecipeCommand):
    """Compiles a recipe for a topology without its devices: does it fit in memory, and what does a step cost?"""

    NAME: ClassVar = "plan"
    EXAMPLE: ClassVar = "clvr plan flux2_sft --preset klein-9b --topology v6e:16x16"
    OVERRIDE: ClassVar = "--topology v5e:4x4"

    topology: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """Plan for these chips: v5e:AxB, v6e:AxB, v5p:AxBxC, the names of Google Cloud (v5e-256, v6e-256, v5p-128), h100:N,
    or cpu:N. It must be given."""
    search: bool = False
    """Try several meshes and rank them by model FLOPs utilization; each takes minutes to compile."""
    batch_sizes: tuple[int, ...] = ()
    """With --search: try these batch sizes; only the recipe's own if not given."""
    dollars_per_chip_hour: float | None = None
    """Price of a chip for an hour, in dollars, from which the cost of the run is computed; no cost if not given."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the report to this file as JSON as well; it is only printed if not given."""
    common: Flags = field(default_factory=Common)

    def run_recipe(self, recipe: "Recipe", config: "RecipeConfig") -> Result:
        """Compiles the recipe and returns its report."""
        from clvr_jax.files.atomic_io import write_json
        from clvr_jax.training.plan import plan

        if not self.topology:
            raise UsageError("--topology is missing; give the chips, such as v6e:16x16, v5p-128 or cpu:8")
        if math.prod(int(side) for side in re.findall(r"\d+", self.topology.partition(":")[2])) > _MAX_CHIPS:
            raise UsageError(f"--topology {self.topology}: give at most {_MAX_CHIPS:,} chips")
        if self.search:
            result = self._search(recipe, config)
        else:
            report = plan(recipe, config, self.topology, dollars_per_chip_hour=self.dollars_per_chip_hour)
            result = Result(report.to_json(), report.table())
        if self.out:
            write_json(self.out, result.data)
        return result

    def _search(self, recipe: "Recipe", config: "RecipeConfig") -> Result:
        from clvr_jax.cost_model.hardware import parse_topology
        from clvr_jax.training.plan import meshes, ranked, search, trials_table

        total = len(meshes(parse_topology(self.topology))) * max(len(self.batch_sizes), 1)
        trials: list[Trial] = []
        with progress(f"{recipe.name} on {self.topology}", total) as advance:
            for trial in search(
                recipe,
                config,
                self.topology,
                batch_sizes=self.batch_sizes,
                dollars_per_chip_hour=self.dollars_per_chip_hour,
            ):
                trials.append(trial)
                advance(len(trials), trial.summary)
        best = ranked(trials)
        if best[0].report is None:
            raise ClvrError(f"{recipe.name} on {self.topology}: nothing fits; {best[0].summary}")
        return Result({"trials": [trial.to_json() for trial in best]}, trials_table(best))
