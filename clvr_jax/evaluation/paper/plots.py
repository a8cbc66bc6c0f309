"""Plots of results as PNG files, which need matplotlib (extra `plots`) and no display."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clvr_jax.display.plots import new_figure
from clvr_jax.evaluation.paper.diagnosis import Interactions
from clvr_jax.evaluation.paper.tables import Found, accuracy, by_tier
from clvr_jax.evaluation.paper.timing import GroupTime
from clvr_jax.evaluation.statistics import Interval
from clvr_jax.files.image_io import ImageLike, as_pil


def accuracy_bars(path: Path, labels: Mapping[str, str], found: Found) -> None:
    """Plots the accuracy of each system on each split, with its interval."""
    figure = new_figure(6.4, 1.2 + 0.45 * len(labels))
    axes = figure.add_subplot()
    splits = list(next(iter(found.values())))
    for number, split in enumerate(splits):
        shares = [accuracy(found[name][split].pooled) for name in labels]
        places = np.arange(len(labels)) + 0.36 * (number - (len(splits) - 1) / 2)
        axes.barh(places, [each.estimate for each in shares], 0.34, xerr=_bars(shares), label=split)
    axes.set_yticks(range(len(labels)), list(labels.values()))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="accuracy")
    axes.legend()
    figure.savefig(path, dpi=120)


def tier_lines(path: Path, labels: Mapping[str, str], found: Found) -> None:
    """Plots accuracy against the number of objects."""
    figure = new_figure(6.4, 4)
    axes = figure.add_subplot()
    for name, label in labels.items():
        tiers = by_tier(found[name]["complex"].pooled)
        shares = list(tiers.values())
        means = [each.estimate for each in shares]
        axes.errorbar(list(tiers), means, _bars(shares), marker="o", capsize=3, label=label)
        axes.set_xticks(list(tiers))
    axes.set(xlabel="objects", ylabel="accuracy", ylim=(0, 1.02))
    axes.legend()
    figure.savefig(path, dpi=120)


def time_lines(path: Path, times: Mapping[str, Mapping[int, GroupTime]]) -> None:
    """Plots total and generation seconds of a prompt against its number of images.

    times: label -> the result of `timing.times_by_image_count`.
    """
    figure = new_figure(6.4, 4)
    axes = figure.add_subplot()
    for label, groups in times.items():
        (line,) = axes.plot(list(groups), [each["seconds"] for each in groups.values()], "o-", label=f"{label}, total")
        generation = [each["generation_seconds"] for each in groups.values()]
        axes.plot(list(groups), generation, "o--", color=line.get_color(), label=f"{label}, generation")
    axes.set_xticks(sorted({count for groups in times.values() for count in groups}))
    axes.set(xlabel="images", ylabel="seconds", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def interaction_lines(path: Path, found: Interactions) -> None:
    """Plots additivity error and angle of both deltas over noise levels and scales. found: of `diagnosis`."""
    figure = new_figure(12.8, 4)
    of_levels, of_scales = figure.subplots(1, 2)
    for axes, measured, label in (
        (of_levels, found["levels"], "noise level"),
        (of_scales, found["scales"], "scale of both deltas"),
    ):
        places = [float(place) for place in measured]
        errors = [each["additivity_error"] for each in measured.values()]
        angles = [each["angle"] for each in measured.values()]
        axes.plot(places, errors, "o-", color="C0")
        axes.set(xlabel=label, ylim=(0, None))
        axes.set_ylabel("additivity error", color="C0")
        beside = axes.twinx()
        beside.plot(places, angles, "s--", color="C1")
        beside.set_ylabel("angle, degrees", color="C1")
        beside.set_ylim(0, 180)
    figure.savefig(path, dpi=120)


def image_strip(path: Path, images: Sequence[ImageLike], side: int = 192, gap: int = 8) -> None:
    """Writes images side by side, enlarged without smoothing. side, gap: of and between images, in pixels."""
    strip = Image.new("RGB", (len(images) * (side + gap) - gap, side), "white")
    for number, image in enumerate(images):
        strip.paste(as_pil(image).resize((side, side), Image.Resampling.NEAREST), (number * (side + gap), 0))
    strip.save(path)


def _bars(shares: Sequence[Interval]) -> list[list[float]]:
    """Returns the lengths of error bars in matplotlib's form, clipped at 0 because of rounding."""
    below = [max(0.0, each.estimate - each.low) for each in shares]
    return [below, [max(0.0, each.high - each.estimate) for each in shares]]
