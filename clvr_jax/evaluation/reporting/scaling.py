"""Reports of scaling curves: scaling.json, scaling.md, scaling.png, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

from clvr_jax.display.plots import can_plot, literal, new_figure
from clvr_jax.display.tables import Row, Table, plain
from clvr_jax.evaluation.comparison.scaling import Scaling
from clvr_jax.files.atomic_io import write_json, write_text

T = TypeVar("T")
Kind = Literal["images", "nfe", "seconds"]
"""A kind of budget."""

JSON, MARKDOWN, PLOT = "scaling.json", "scaling.md", "scaling.png"
_AXES: dict[Kind, str] = {"images": "budget in images", "nfe": "budget in NFE", "seconds": "budget in seconds"}
_SHOWN = 8


def write_scaling(scaling: Scaling, out: Path) -> list[str]:
    """Writes the curves to a directory.

    Args:
      scaling: as `scaling.from_trajectories` returns them.
      out: the directory.
    Returns: the names of the files; the plot is among them if matplotlib is installed.
    """
    files = [JSON, MARKDOWN]
    if can_plot():
        _plot(scaling, out)
        files.append(PLOT)
    write_json(out / JSON, scaling)
    write_text(out / MARKDOWN, scaling_markdown(scaling, PLOT in files))
    return files


def scaling_markdown(scaling: Scaling, with_plot: bool = False) -> str:
    """Returns the curves as Markdown, with one table of all systems for each kind of budget."""
    lines = [
        f"# {plain(scaling['benchmark'])}: accuracy against budget",
        "",
        f"{scaling['prompts']} prompts; judge: {', '.join(plain(value) for value in scaling['judge'].values())}. Each "
        "system ran once under its largest budget; results under smaller budgets are computed from its trajectories. "
        "Accuracy has its 95 % interval over prompts; NFE and seconds are means per image under the budget.",
        "",
    ]
    for kind, label in _AXES.items():
        table = scaling_table(scaling, kind)
        if table.sections[0]:
            lines += [f"## {label[0].upper()}{label[1:]}", "", *table.markdown(), ""]
    if with_plot:
        lines.append(f"![{PLOT}]({PLOT})")
    return "\n".join(lines).rstrip() + "\n"


def scaling_table(scaling: Scaling, kind: Kind = "images") -> Table:
    """Returns the accuracy against one kind of budget; of a system with over 8 limits, 8 with both ends."""
    rows: list[Row] = []
    for system in scaling["systems"]:
        for point in _some(system["curves"][kind]):
            limit = f"{point['limit']:.2f}" if kind == "seconds" else f"{point['limit']:g}"
            interval = f"{point['low']:.3f} .. {point['high']:.3f}"
            spent = (f"{point['nfe']:.1f}", f"{point['seconds']:.2f}")
            rows.append((system["name"], limit, f"{point['accuracy']:.3f}", interval, *spent))
    title = f"{scaling['benchmark']}, {scaling['prompts']} prompts: accuracy against {_AXES[kind]}"
    return Table(("system", _AXES[kind], "accuracy", "95 %", "NFE", "seconds"), [rows], title=title)


def _some(points: Sequence[T]) -> list[T]:
    if len(points) <= _SHOWN:
        return list(points)
    return [points[round(number * (len(points) - 1) / (_SHOWN - 1))] for number in range(_SHOWN)]


def _plot(scaling: Scaling, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    figure = new_figure(14, 4.2)
    for number, (kind, label) in enumerate(_AXES.items(), start=1):
        axes = figure.add_subplot(1, len(_AXES), number)
        for system in scaling["systems"]:
            points = system["curves"][kind]
            x, y = [point["limit"] for point in points], [point["accuracy"] for point in points]
            # A result holds until the next image is generated.
            (line,) = axes.plot(x, y, "o-", markersize=3, drawstyle="steps-post", label=literal(system["name"]))
            low, high = [point["low"] for point in points], [point["high"] for point in points]
            axes.fill_between(x, low, high, step="post", color=line.get_color(), alpha=0.15)
        axes.set(xlabel=label, ylabel="accuracy", ylim=(-0.02, 1.02))
        if kind != "images" and any(system["curves"][kind] for system in scaling["systems"]):
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out / PLOT, dpi=120)
