"""The report of a merge about the two deltas: tables, report.json and plots."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from rich.table import Table

from clvr_jax.convert.streaming.report import readable_size
from clvr_jax.display.plots import can_plot, new_figure
from clvr_jax.files.atomic_io import write_json
from clvr_jax.files.json_input import JSON
from clvr_jax.merging.norms import DeltaStatistics, by_layer, total
from clvr_jax.merging.planning import PLOTS, REPORT, Merge
from clvr_jax.merging.sources import is_weight


class Report(TypedDict):
    """The content of report.json: relative norms and cosine of the whole model, of each layer and of each tensor."""

    whole: dict[str, float | None]
    layers: dict[str, dict[str, float | None]]
    tensors: dict[str, dict[str, float | None]]


def report(sums: Mapping[str, DeltaStatistics]) -> Report:
    """Returns the norm of the base, the relative Frobenius norms of the two deltas and the cosine between them.

    Args:
      sums: key -> statistics of each tensor, from `streaming.merge`.
    Returns: {"whole": ..., "layers": {name: ...}, "tensors": {key: ...}}; null if the divisor is 0.
    """
    return {
        "whole": total(sums.values()).to_json(),
        "layers": {name: own.to_json() for name, own in by_layer(sums).items()},
        "tensors": {key: own.to_json() for key, own in sums.items()},
    }


def write_report(directory: Path, sums: Mapping[str, DeltaStatistics]) -> list[str]:
    """Writes report.json and, if matplotlib is installed, two plots over the layers. Returns: the file names."""
    found = report(sums)
    write_json(directory / REPORT, found)
    if not can_plot():
        return [REPORT]
    _plot(directory, found["layers"])
    return [REPORT, *PLOTS]


def _plot(directory: Path, layers: Mapping[str, Mapping[str, float | None]]) -> None:
    norms, cosines = directory / PLOTS[0], directory / PLOTS[1]
    names, places = list(layers), range(len(layers))
    for path, label, columns in (
        (norms, "|delta| / |base|", ("distill", "align")),
        (cosines, "cosine between the deltas", ("cosine",)),
    ):
        figure = new_figure(max(6.4, 0.22 * len(names) + 2), 5)
        axes = figure.add_subplot()
        for column in columns:
            values = [layer[column] for layer in layers.values()]
            axes.plot(places, [float("nan") if value is None else value for value in values], ".-", label=column)
        positive = [layer[column] for layer in layers.values() for column in columns if (layer[column] or 0) > 0]
        if path is norms and positive:
            axes.set_yscale("log")
        if path is cosines:
            axes.axhline(0, color="0.7", linewidth=0.8)
        axes.set(ylabel=label)
        axes.set_xticks(places, names, rotation=90, fontsize=7)
        axes.grid(axis="y", alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=120)


def report_table(sums: Mapping[str, DeltaStatistics]) -> Table:
    """Returns a table with one row per layer and one for all layers."""
    table = Table(title="deltas of the base")
    table.add_column("layer", overflow="fold")
    for column in ("|distill| / |base|", "|align| / |base|", "cosine"):
        table.add_column(column, justify="right")
    for name, own in (*by_layer(sums).items(), ("all", total(sums.values()))):
        numbers = (*own.relative.values(), own.cosine)
        table.add_row(name, *("" if number is None else f"{number:.3g}" for number in numbers))
    return table


def plan_table(plan: Merge) -> Table:
    """Returns a table with one row per tensor of the result and one per copied file."""
    component = plan.base.component
    size = readable_size(plan.nbytes)
    title = f"{plan.settings.method}: {component.architecture.title}, {len(component.slices)} tensors, {size}"
    table = Table(title=title)
    table.add_column("tensor", overflow="fold")
    for column in ("shape", "dtype", "weight of distill", "of align"):
        table.add_column(column)
    for tensor_slice in component.slices:
        pair = plan.weights[tensor_slice.spec.key] if is_weight(tensor_slice) else None
        weights = tuple(f"{weight:g}" for weight in pair) if pair else ("the base's", "")
        shape = " x ".join(map(str, tensor_slice.spec.shape))
        table.add_row(tensor_slice.spec.key, shape, tensor_slice.spec.dtype.name, *weights)
    table.add_section()
    for name in plan.copied:
        whose = plan.scheduler if name.startswith("scheduler/") else "base"
        whose = f"{whose}, changed as in align" if name in plan.changed else whose
        table.add_row(name, "", "file", "", f"copied from {whose}")
    return table


def plan_list(plan: Merge) -> list[dict[str, JSON]]:
    """Returns key, shape, dtype and weights of each tensor for JSON; weights are null for a counter of the base."""
    return [
        {
            "key": tensor_slice.spec.key,
            "shape": list(tensor_slice.spec.shape),
            "dtype": tensor_slice.spec.dtype.name,
            "weights": plan.weights.get(tensor_slice.spec.key),
        }
        for tensor_slice in plan.base.component.slices
    ]
