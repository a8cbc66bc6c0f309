"""`clvr curves`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from clvr_jax.arguments import StoragePath, at_least_one
from clvr_jax.commands.common import Common, Flags, Result

if TYPE_CHECKING:
    from clvr_jax.training.curves import CurveSummary


@dataclass(frozen=True)
class Curves:
    """Plots metrics of one or more runs. Runs that differ only in their seed become one line with a band."""

    EXAMPLE: ClassVar = "clvr curves runs/pprl-0 runs/pprl-1 runs/simple-0 --metrics reward kl --out out/curves.png"

    runs: Annotated[tuple[StoragePath, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Plot these run directories, finished or not; they may be in a bucket (gs://NAME/PREFIX)."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.png")]
    """Write the plot to this file; the suffix may also be .svg or .pdf."""
    metrics: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ()
    """Plot these metrics, named as in metrics.jsonl; the usual losses, rewards and distances if not given."""
    smooth: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Plot the mean over this many entries; 1 plots the entries themselves."""
    common: Flags = field(default_factory=Common)

    def __post_init__(self) -> None:
        at_least_one("--smooth", self.smooth)
        at_least_one("the number of runs", len(self.runs))

    def run(self) -> Result:
        """Writes the plot, and returns the last values of the curves."""
        from clvr_jax.display.tables import Table
        from clvr_jax.files.bucket_copies import files_on_disk
        from clvr_jax.training.curves import FILES, curves, summary, write_plot

        with files_on_disk(self.runs, FILES) as runs:
            found = curves(runs, self.metrics, self.smooth)
        write_plot(self.out, found)
        ends = summary(found)
        header = ("metric", "runs of", "number", "last step", "mean", "range")
        rows = [(metric, name, *_cells(end)) for metric, lines in ends.items() for name, end in lines.items()]
        table = Table(header, [rows], title=str(self.out)).rich()
        return Result({"out": str(self.out), "ends": ends}, table)


def _cells(end: "CurveSummary") -> tuple[str, ...]:
    low, high = end["range"]
    return str(end["runs"]), str(end["step"]), f"{end['mean']:.4g}", f"{low:.4g} .. {high:.4g}"
