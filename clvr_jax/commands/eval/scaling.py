"""`clvr eval scaling`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from clvr_jax.arguments import at_least_one, check_seed
from clvr_jax.commands.common import Common, Count, Flags, Result, prepare_jax
from clvr_jax.commands.eval.system import SystemOptions
from clvr_jax.commands.generation.budget import BudgetOptions
from clvr_jax.display.console import Advance, console, progress
from clvr_jax.errors import UsageError

if TYPE_CHECKING:
    from clvr_jax.evaluation.comparison.scaling import Scaling
    from clvr_jax.evaluation.harness.run_directory import RunDirectory

Mode = Literal["one-shot", "open-loop", "best-of", "closed-loop"]


@dataclass(frozen=True)
class EvalScaling:
    """Measures how scores grow with images, network evaluations and seconds. Images are generated once, under the
    largest budget; the results of smaller budgets are computed from them."""

    EXAMPLE: ClassVar = (
        "clvr eval scaling --model shapes-tiny --split complex --limit 60 --max-steps 16 --out out/scaling"
    )

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Write scaling.json, scaling.md, the plot, and the images of each system to this directory."""
    results: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME=]DIR")] = ()
    """Include these directories of finished `clvr eval shapes` runs, beside or in place of --model."""
    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Generate with this model in each of --modes: a shipped name, a directory in diffusers layout, or a Hugging Face
    id. Only --results are measured if not given."""
    base_model: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Generate one-shot images with this model, such as the one before training on trajectories; --model if not given.
    """
    modes: tuple[Mode, ...] = ("one-shot", "open-loop", "best-of", "closed-loop")
    """Measure these modes; best-of and closed-loop may generate --max-steps images for each prompt."""
    controller: Literal["vlm", "oracle"] = "vlm"
    """Who plans and corrects. vlm: the controller of the model. oracle: the oracle of the shapes world."""
    max_steps: int = 8
    """Largest budget, in images for each prompt."""
    split: Literal["eval", "complex", "dense", "second"] = "complex"
    """Set of prompts, as in `clvr eval shapes`."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """Use the prompts of this file, in the format of GenEval's metadata, in place of --split."""
    limit: Count = None
    """Use at most this many prompts, spread evenly over the set; all of them if not given."""
    seed: int = 0
    """The same seed gives the same images."""
    common: Flags = field(default_factory=Common)

    def __post_init__(self) -> None:
        at_least_one("--limit", self.limit)
        check_seed(self.seed)
        if self.max_steps < 2:
            raise UsageError(f"--max-steps must be at least 2 to scale anything, got {self.max_steps}")
        if not self.model and not self.results:
            raise UsageError("give --model, or directories of finished runs")
        if len(set(self.modes)) < len(self.modes) or not self.modes:
            raise UsageError("--modes must name at least one mode, and each mode once")

    def run(self) -> Result:
        """Generates missing images, computes the curves, and writes the report."""
        from clvr_jax.display.plots import can_plot
        from clvr_jax.evaluation.comparison.pairs import parse_named_path
        from clvr_jax.evaluation.harness.run_directory import RunDirectory
        from clvr_jax.evaluation.reporting.scaling import scaling_table
        from clvr_jax.files.locks import locked_output
        from clvr_jax.files.output_paths import check_output_directory

        given = {name: RunDirectory(path) for name, path in map(parse_named_path, self.results)}
        for directory in given.values():
            directory.identity()
        check_output_directory(self.out)
        with locked_output(self.out):
            scaling, files = self._report(given)
        if not can_plot():
            console.print("[yellow]note:[/] no plot: matplotlib is not installed (pip install 'clvr-jax[plots]')")
        return Result({**scaling, "out": str(self.out), "files": files}, scaling_table(scaling).rich())

    def _report(self, given: "dict[str, RunDirectory]") -> "tuple[Scaling, list[str]]":
        """Generates missing images; returns the curves, and the names of the files that were written."""
        from clvr_jax.evaluation.comparison.scaling import from_trajectories
        from clvr_jax.evaluation.reporting.scaling import write_scaling

        directories = {**(self._generate() if self.model else {}), **given}
        with progress("scaling, judging images", len(directories)) as advance:
            scaling = from_trajectories(directories, advance)
        return scaling, write_scaling(scaling, self.out)

    def _generate(self) -> dict[str, "RunDirectory"]:
        """Returns the directory of a finished run for each mode."""
        prepare_jax()
        from clvr_jax.evaluation.benchmarks.shapes import run_shapes, shapes_prompts
        from clvr_jax.evaluation.harness.run_directory import RunDirectory

        metadata = shapes_prompts(self.split, self.prompts, self.limit)
        prompts = self.prompts.name if self.prompts else self.split
        chosen: dict[str, SystemOptions] = {mode: self._system(mode) for mode in self.modes}
        for options in chosen.values():
            options.check()
        for mode, options in chosen.items():
            system = options.build(metadata)
            with progress(f"scaling, {options.title}", len(metadata)) as advance:

                def on_progress(done: int, total: int, advance: Advance = advance) -> None:
                    advance(done)

                run_shapes(
                    system,
                    metadata,
                    self.out / mode,
                    prompts=prompts,
                    limit=self.limit,
                    seed=self.seed,
                    on_progress=on_progress,
                )
        return {mode: RunDirectory(self.out / mode) for mode in chosen}

    def _system(self, mode: Mode) -> SystemOptions:
        assert self.model is not None
        budgets: dict[str, BudgetOptions] = {
            "best-of": BudgetOptions(candidates=self.max_steps),
            "closed-loop": BudgetOptions(max_steps=self.max_steps),
        }
        return SystemOptions(
            (self.base_model if mode == "one-shot" else None) or self.model,
            mode,
            controller="vlm" if mode == "one-shot" else self.controller,
            budget=budgets.get(mode, BudgetOptions()),
            seed=self.seed,
        )
