"""Curves of runs from their metrics and goodput; runs that differ only in the seed are one line with a band."""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from clvr_jax.display.plots import can_plot, new_figure
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.atomic_io import write_atomically
from clvr_jax.files.file_names import has_entry, is_regular_file
from clvr_jax.files.json_input import JSON, JsonObject, parse_object, read_object, stream_lines
from clvr_jax.training.metrics import METRICS
from clvr_jax.training.monitoring.ledger import FILE as GOODPUT
from clvr_jax.training.monitoring.ledger import read_ledgers
from clvr_jax.training.recipes import RECIPE
from clvr_jax.trees import some

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USUAL = (
    "loss",
    "reward",
    "reward_t2i",
    "reward_i2i",
    "parts/t2i/right",
    "kl",
    "norm_ratio",
    "zero_variance_groups",
    "goodput",
)
"""Metrics that are shown by default, as far as a run has them."""
FILES = (METRICS, GOODPUT, RECIPE)
"""Files of a run that are read."""
_WIDTH, _HEIGHT = 4.8, 3.2


@dataclass(frozen=True)
class Curve:
    """A metric of runs of one kind.

    name: of the run; for several runs that of the first, without the number at its end. steps: (n,) at which all runs
    have the metric. values: (runs, n).
    """

    name: str
    steps: np.ndarray
    values: np.ndarray


def read_metrics(run: Path) -> dict[str, dict[int, float]]:
    """Reads metric -> step -> value of a run, which need not be finished; the goodput and its parts are metrics too.

    Raises: ClvrError if the directory holds no metrics, or a file that is none.
    """
    path = run / METRICS
    found: dict[str, dict[int, float]] = {}
    torn: ClvrError | None = None
    if not is_regular_file(path):
        raise ClvrError(f"{run}: no run with metrics here (no file {path})")
    for where, line in stream_lines(path):
        if torn is not None:
            raise torn
        try:
            row = parse_object(line, where)
        except ClvrError as error:
            torn = error  # fine for the last line of a run that is being written, or was killed
            continue
        step = row.integer("step", low=0)
        for name in row.content:
            if name != "step":
                found.setdefault(name, {})[step] = _metric(row, name)
    if not found:
        raise ClvrError(f"{path}: holds no metrics yet")
    starts = 0
    for ledger in read_ledgers(run / GOODPUT):
        if ledger.starts == starts:  # the line of a start has nothing new but what the last one lost
            for name, value in ledger.scalars().items():
                found.setdefault(name, {})[ledger.iteration] = value
        starts = ledger.starts
    return found


def _metric(row: JsonObject, name: str) -> float:
    """Returns a metric, which need not be finite: a run may diverge."""
    value = row.content[name]
    is_special = isinstance(value, float) and not math.isfinite(value)
    return value if is_special else float(row.number(name))


def curves(runs: Sequence[Path], metrics: Sequence[str] = (), smooth: int = 1) -> dict[str, list[Curve]]:
    """Returns metric -> a curve for each kind of run that has it.

    Args:
      runs: directories; those whose recipe and configuration differ only in the seed are of one kind.
      metrics: names; those of USUAL if none are given.
      smooth: number of entries, up to each, that it is averaged over.
    Raises: ClvrError for a directory without metrics, UsageError for a metric that no run has.
    """
    found = {run: read_metrics(run) for run in runs}
    known = dict.fromkeys(name for own in found.values() for name in own)
    if absent := [name for name in metrics if name not in known]:
        raise UsageError(f"no run has the metric {', '.join(absent)}; there are {some(known, 40)}")
    kinds: dict[str, list[Path]] = {}
    for run in runs:
        kinds.setdefault(_kind(run), []).append(run)
    chosen = metrics or [name for name in USUAL if name in known] or list(known)
    return {
        name: [
            _curve(own, [found[run][name] for run in own], smooth)
            for kind in kinds.values()
            if (own := [run for run in kind if name in found[run]])
        ]
        for name in chosen
    }


def _kind(run: Path) -> str:
    """Returns a text that is equal for runs that differ only in the seed."""
    if not has_entry(run / RECIPE):
        return str(run.absolute())
    recipe = read_object(run / RECIPE)
    config = recipe.nested("config", JsonObject({}, ""))
    train = config.nested("train", JsonObject({}, ""))
    kind = {**recipe.content, "config": {**_without_seed(config), "train": _without_seed(train)}}
    return json.dumps(kind, sort_keys=True)


def _without_seed(config: JsonObject) -> dict[str, JSON]:
    return {name: value for name, value in config.content.items() if name != "seed"}


def _curve(runs: Sequence[Path], rows: Sequence[Mapping[int, float]], smooth: int) -> Curve:
    steps = sorted(set.intersection(*(set(row) for row in rows)))
    values = np.array([[row[step] for step in steps] for row in rows])
    sums = np.cumsum(np.pad(values, ((0, 0), (1, 0))), axis=1)
    ends = np.arange(1, len(steps) + 1)
    begins = np.maximum(ends - smooth, 0)
    name = runs[0].name if len(runs) == 1 else re.sub(r"(?<=.)[-_.]?\d+$", "", runs[0].name)
    return Curve(name, np.array(steps), (sums[:, ends] - sums[:, begins]) / (ends - begins))


def write_plot(path: Path, found: Mapping[str, Sequence[Curve]]) -> None:
    """Plots one panel for each metric; several runs of a kind as their mean, and a band from the least to the greatest.

    Raises: ClvrError if matplotlib is not installed, or the file cannot be written in the format of its suffix.
    """
    if not can_plot():
        raise ClvrError("plots need matplotlib: pip install 'clvr-jax[plots]'")
    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    figure = new_figure(_WIDTH * columns, _HEIGHT * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, (metric, lines) in zip(panels, found.items(), strict=False):
        for line in lines:
            label = line.name if len(line.values) == 1 else f"{line.name} ({len(line.values)} runs)"
            (drawn,) = panel.plot(line.steps, line.values.mean(0), label=label)
            if len(line.values) > 1:
                low, high = line.values.min(0), line.values.max(0)
                panel.fill_between(line.steps, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
        panel.set(title=metric, xlabel="step")
        panel.grid(alpha=0.3)
    for panel in list(panels):
        panel.remove()
    figure.axes[0].legend()
    _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    content = io.BytesIO()
    try:
        figure.savefig(content, format=path.suffix.removeprefix(".") or "png", dpi=120)
    except ValueError as error:
        raise UsageError(f"{path}: {str(error).splitlines()[0]}") from error
    write_atomically(path, content.getvalue())


class CurveSummary(TypedDict):
    """The values at the last step of the runs of one kind: their number, the step, and mean, least and greatest."""

    runs: int
    step: int
    mean: float
    range: list[float]


def summary(found: Mapping[str, Sequence[Curve]]) -> dict[str, dict[str, CurveSummary]]:
    """Returns for each metric and kind: number of runs, last step, and mean, least and greatest of the runs there."""
    return {
        metric: {
            line.name: {
                "runs": len(line.values),
                "step": int(line.steps[-1]),
                "mean": float(line.values[:, -1].mean()),
                "range": [float(line.values[:, -1].min()), float(line.values[:, -1].max())],
            }
            for line in lines
            if len(line.steps)
        }
        for metric, lines in found.items()
    }
