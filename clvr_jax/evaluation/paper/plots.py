"""Plots of results, as PNG files; without a display. Needs matplotlib (extra `plots`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clvr_jax.evaluation.paper.tables import Found, accuracy, by_tier
from clvr_jax.evaluation.statistics import Interval
from clvr_jax.plots import new_figure
from clvr_jax.reasoning.images import as_pil


def accuracy_bars(path: Path, labels: Mapping[str, str], found: Found) -> None:
    """Accuracy of each system on each split, with its interval."""
    figure = new_figure(6.4, 1.2 + 0.45 * len(labels))
    axes = figure.add_subplot()
    splits = list(next(iter(found.values())))
    for number, split in enumerate(splits):
        shares = [accuracy(found[name][split].pooled) for name in labels]
        places = np.arange(len(labels)) + 0.36 * (number - (len(splits) - 1) / 2)
        axes.barh(places, [each.estimate for each in shares], 0.34, xerr=_bars(shares), label=split)
    axes.set_yticks(range(len(labels)), list(labels.values()))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of prompts drawn right")
    axes.legend()
    figure.savefig(path, dpi=120)


def tier_lines(path: Path, labels: Mapping[str, str], found: Found) -> None:
    """Accuracy against the number of objects."""
    figure = new_figure(6.4, 4)
    axes = figure.add_subplot()
    for name, label in labels.items():
        tiers = by_tier(found[name]["complex"].pooled)
        shares = list(tiers.values())
        means = [each.estimate for each in shares]
        axes.errorbar(list(tiers), means, _bars(shares), marker="o", capsize=3, label=label)
        axes.set_xticks(list(tiers))
    axes.set(xlabel="objects", ylabel="share of prompts drawn right", ylim=(0, 1.02))
    axes.legend()
    figure.savefig(path, dpi=120)


def time_lines(path: Path, times: Mapping[str, Mapping[int, Mapping[str, float]]]) -> None:
    """Seconds of a prompt against its number of drawings, in all and of drawing. times: label -> `by_drawings`."""
    figure = new_figure(6.4, 4)
    axes = figure.add_subplot()
    for label, groups in times.items():
        (line,) = axes.plot(list(groups), [each["seconds"] for each in groups.values()], "o-", label=f"{label}, all")
        drawing = [each["drawing_seconds"] for each in groups.values()]
        axes.plot(list(groups), drawing, "o--", color=line.get_color(), label=f"{label}, drawing")
    axes.set_xticks(sorted({count for groups in times.values() for count in groups}))
    axes.set(xlabel="drawings", ylabel="seconds", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def interaction_lines(path: Path, found: Mapping[str, Any]) -> None:
    """Additivity error and angle of both changes, over noise levels and over scales. found: see `diagnosis`."""
    figure = new_figure(12.8, 4)
    of_levels, of_scales = figure.subplots(1, 2)
    for axes, key, label in ((of_levels, "levels", "noise level"), (of_scales, "scales", "scale of both changes")):
        places = [float(place) for place in found[key]]
        errors = [each["additivity_error"] for each in found[key].values()]
        angles = [each["angle"] for each in found[key].values()]
        axes.plot(places, errors, "o-", color="C0")
        axes.set(xlabel=label, ylim=(0, None))
        axes.set_ylabel("additivity error", color="C0")
        beside = axes.twinx()
        beside.plot(places, angles, "s--", color="C1")
        beside.set_ylabel("angle, degrees", color="C1")
        beside.set_ylim(0, 180)
    figure.savefig(path, dpi=120)


def picture_strip(path: Path, pictures: Sequence[Any], side: int = 192, gap: int = 8) -> None:
    """Pictures beside each other, enlarged without smoothing."""
    strip = Image.new("RGB", (len(pictures) * (side + gap) - gap, side), "white")
    for number, picture in enumerate(pictures):
        strip.paste(as_pil(picture).resize((side, side), Image.Resampling.NEAREST), (number * (side + gap), 0))
    strip.save(path)


def _bars(shares: Sequence[Interval]) -> list[list[float]]:
    """Distances to both ends, as matplotlib takes them; rounding must not make one negative."""
    below = [max(0.0, each.estimate - each.low) for each in shares]
    return [below, [max(0.0, each.high - each.estimate) for each in shares]]
