"""`clvr eval compare`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from clvr_jax.commands.common import Common, Flags, Result
from clvr_jax.console import console


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
        from clvr_jax.evaluation.contest import gather, hold
        from clvr_jax.evaluation.contest_report import contest_table, write_contest
        from clvr_jax.locks import locked_output
        from clvr_jax.outputs import check_folder
        from clvr_jax.plots import can_plot

        contestants = gather(self.results)
        check_folder(self.out)
        contest = hold(contestants)
        with locked_output(self.out):
            files = write_contest(contest, self.out)
        if not can_plot():
            console.print("[yellow]note:[/] no plots: matplotlib is not installed (pip install 'clvr-jax[plots]')")
        return Result({**contest, "out": str(self.out), "files": files}, contest_table(contest))
