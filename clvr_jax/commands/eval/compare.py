"""`clvr eval compare`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from clvr_jax.commands.common import Common, Flags, Result
from clvr_jax.display.console import console


@dataclass(frozen=True)
class EvalCompare:
    """Compares two or more results on the same prompts: tables, paired tests, cost, complexity, plots."""

    EXAMPLE: ClassVar = "clvr eval compare base=out/one-shot loop=out/loop-0 loop=out/loop-1 --out out/report"

    results: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME=]DIR")]
    """Compare these directories with results.json, each with the first one; runs of one name that differ in their seed
    are pooled."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Write comparison.json, comparison.md and, if matplotlib is installed, plots to this directory."""
    common: Flags = field(default_factory=Common)

    def run(self) -> Result:
        """Compares and writes the report."""
        from clvr_jax.display.plots import can_plot
        from clvr_jax.evaluation.comparison.systems import compare_systems, load_systems
        from clvr_jax.evaluation.reporting.comparison import systems_table, write_comparison
        from clvr_jax.files.locks import locked_output
        from clvr_jax.files.output_paths import check_output_directory

        systems = load_systems(self.results)
        check_output_directory(self.out)
        comparison = compare_systems(systems)
        with locked_output(self.out):
            files = write_comparison(comparison, self.out)
        if not can_plot():
            console.print("[yellow]note:[/] no plots: matplotlib is not installed (pip install 'clvr-jax[plots]')")
        return Result({**comparison, "out": str(self.out), "files": files}, systems_table(comparison).rich())
