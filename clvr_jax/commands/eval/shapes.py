"""`clvr eval shapes`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro
from rich.console import Group

from clvr_jax.arguments import at_least_one
from clvr_jax.commands.common import Common, Count, Directory, Flags, Result, prepare_jax
from clvr_jax.commands.eval.run_progress import progress_on_first_report
from clvr_jax.commands.eval.system import Systems

if TYPE_CHECKING:
    from clvr_jax.evaluation.harness.results import Results
    from clvr_jax.worlds.shapes.metadata import Metadata


@dataclass(frozen=True)
class EvalShapes:
    """Generates images for prompts of the shapes world, where a program verifies them. The same command resumes an
    interrupted run."""

    EXAMPLE: ClassVar = "clvr eval shapes --split complex --limit 60 --model shapes-tiny --out out/complex"

    system: Systems
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Write the images in the layout of GenEval and results.json to this directory."""
    split: Literal["eval", "complex", "dense", "second"] = "eval"
    """Set of prompts. eval: 553 prompts with GenEval's tags. complex: 300 prompts with 3 to 6 objects. dense: 300 with
    7 to 9. second: 300 with 3 to 6, worded by a grammar that is not used in training."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """Use the prompts of this file, in the format of GenEval's metadata, in place of --split."""
    limit: Count = None
    """Use at most this many prompts, spread evenly over the set; all of them if not given."""
    against: Directory = None
    """Compare with the run in this directory, on the same prompts and in pairs; no comparison if not given."""
    common: Flags = field(default_factory=Common)

    def __post_init__(self) -> None:
        at_least_one("--limit", self.limit)

    def run(self) -> Result:
        """Generates and scores the images, and writes results.json."""
        prepare_jax()
        from clvr_jax.evaluation.benchmarks.shapes import shapes_prompts
        from clvr_jax.evaluation.comparison.pairs import compare, comparison_table, load_results
        from clvr_jax.evaluation.reporting.run import rich_results
        from clvr_jax.files.locks import locked_output
        from clvr_jax.files.output_paths import check_output_directory

        other = load_results(self.against) if self.against else None  # before generation, which takes minutes
        self.system.check()
        metadata = shapes_prompts(self.split, self.prompts, self.limit)
        check_output_directory(self.out)
        prompts = self.prompts.name if self.prompts else self.split
        title = f"shapes {prompts}, {self.system.title}"
        with locked_output(self.out):
            results = self._run(metadata, prompts, title)
        data = {key: value for key, value in results.items() if key != "pictures"}
        table = rich_results(results, title)
        if other is None:
            return Result({**data, "out": str(self.out)}, table)
        comparison = compare(other, results)
        both = Group(table, comparison_table(comparison, title=f"{self.against} and {self.out}").rich())
        return Result({**data, "out": str(self.out), "comparison": comparison}, both)

    def _run(self, metadata: "list[Metadata]", prompts: str, title: str) -> "Results":
        """Generates and scores missing images; returns the content of results.json."""
        from clvr_jax.evaluation.benchmarks.shapes import run_shapes

        system = self.system.build(metadata)
        with progress_on_first_report(title) as on_progress:
            return run_shapes(
                system,
                metadata,
                self.out,
                prompts=prompts,
                limit=self.limit,
                seed=self.system.seed,
                on_progress=on_progress,
            )
