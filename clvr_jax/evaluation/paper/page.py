"""The page docs/results.md and its plots, in the order of the paper's claims, as a function of results."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clvr_jax.display.tables import Table, plain
from clvr_jax.evaluation.comparison.pairs import compare
from clvr_jax.evaluation.comparison.scaling import Gain, Point, Scaling
from clvr_jax.evaluation.harness.run_directory import RunDirectory
from clvr_jax.evaluation.paper import plots
from clvr_jax.evaluation.paper.corrections import Corrections
from clvr_jax.evaluation.paper.diagnosis import Interactions
from clvr_jax.evaluation.paper.rows import Row, concatenate_splits
from clvr_jax.evaluation.paper.tables import (
    Found,
    by_phrasing,
    format_difference,
    format_interval,
    format_score,
    groups_table,
    significant,
    systems_table,
    tiers_table,
)
from clvr_jax.evaluation.paper.timing import GroupTime
from clvr_jax.evaluation.reporting.scaling import MARKDOWN, PLOT, write_scaling
from clvr_jax.evaluation.statistics import wilson_interval
from clvr_jax.files.atomic_io import write_atomically
from clvr_jax.files.json_input import UncheckedJSON

Lines = Iterator[str]


@dataclass(frozen=True)
class Section:
    """A section with a table of systems.

    Attributes:
      title, text: the heading, and the text above the table.
      rows: names of the rows.
      reference: name of the row with which the others are compared.
      plot: file name of the plot, "" for none.
    """

    title: str
    text: str
    rows: tuple[str, ...]
    reference: str
    plot: str = ""


@dataclass(frozen=True)
class Measured:
    """The results that the page shows.

    Attributes:
      command: the command that wrote the page.
      rows: name of a row -> system.
      found: name of a row -> split -> results.
      metadata: split -> prompts, in order.
      aligned, merged: names of the rows whose times and scores are compared.
      times: name of a row -> the result of `timing.times_by_image_count`.
      interactions: the result of `diagnosis.interactions`.
      norms: the norms over all weights, of the report of the merge.
      scaling: split -> the result of `scaling.from_trajectories`.
      corrections: name of a row -> the result of `count_corrections` on `complex`.
      seconds: seconds of each stage.
    """

    command: str
    rows: Mapping[str, Row]
    found: Found
    metadata: Mapping[str, Sequence[UncheckedJSON]]
    aligned: str
    merged: str
    times: Mapping[str, Mapping[int, GroupTime]]
    interactions: Interactions
    norms: Mapping[str, float | None]
    scaling: Mapping[str, Scaling]
    corrections: Mapping[str, Corrections]
    seconds: Mapping[str, float]

    def labels(self, names: Sequence[str]) -> dict[str, str]:
        """Returns name -> label of the rows that have results."""
        return {name: self.rows[name].label for name in names if name in self.found}


def write_page(page: Path, measured: Measured, sections: Sequence[Section], tiers: Sequence[str]) -> None:
    """Writes the page, and its plots to a directory of the same name.

    Args:
      page: the Markdown file.
      measured: the results.
      sections: tables of systems.
      tiers: names of the rows that are shown by tier.
    """
    plot_dir = page.with_suffix("")
    plot_dir.mkdir(parents=True, exist_ok=True)
    parts = [
        _head(measured),
        *(_section(measured, section, plot_dir) for section in sections),
        _corrections(measured),
        _tiers(measured, tiers, plot_dir),
        _times(measured, plot_dir),
        _changes(measured, plot_dir),
        _scaling(measured, plot_dir),
        _robustness(measured),
        _strip(measured, plot_dir),
    ]
    text = "\n".join(line for part in parts for line in part)
    write_atomically(page, (re.sub(r"\n{3,}", "\n\n", text).strip() + "\n").encode())


def _head(measured: Measured) -> Lines:
    yield "# The paper's tables in the shapes world\n"
    yield f"Written by `{measured.command}`; every number is from that run.\n"
    counts = ", ".join(f"{len(entries)} of `{split}`" for split, entries in measured.metadata.items())
    seeds = len(next(iter(measured.found[measured.merged].values())).runs)
    yield (
        f"Prompts: {counts}; images of each: {seeds}. Brackets have 95 % intervals: Wilson's for accuracies, which\n"
        "are shares of correct images; bootstrap over prompts for differences, which are over all prompts. p is the\n"
        "p-value of McNemar's exact test (the sign test with several images), not corrected. NFE and seconds are per\n"
        "image, on `complex`, in batches. There is one set of weights of each kind, so intervals do not include the\n"
        "variance of training."
    )
    hours = sum(measured.seconds.values()) / 3600
    yield f"\nAll stages after training took {hours:.1f} hours, without the time before an interruption.\n"


def _section(measured: Measured, section: Section, plot_dir: Path) -> Lines:
    labels = measured.labels(section.rows)
    if section.reference not in labels:
        return
    yield f"\n## {section.title}\n"
    yield f"{section.text}\n"
    yield from systems_table(labels, measured.found, section.reference)
    if section.plot:
        plots.accuracy_bars(plot_dir / section.plot, labels, measured.found)
        yield f"\n![{section.title}]({plot_dir.name}/{section.plot})\n"


def _tiers(measured: Measured, names: Sequence[str], plot_dir: Path) -> Lines:
    labels = measured.labels(names)
    yield "\n## Accuracy by complexity\n"
    yield from tiers_table(labels, measured.found, measured.metadata)
    plots.tier_lines(plot_dir / "tiers.png", labels, measured.found)
    yield f"\n![Accuracy by number of objects]({plot_dir.name}/tiers.png)\n"


def _times(measured: Measured, plot_dir: Path) -> Lines:
    labels = {name: measured.rows[name].label for name in measured.times}
    yield "\n## Seconds and NFE by number of images\n"
    yield "Medians over prompts, one at a time, after compilation. Generation: from text to pixels. Diffusion: the"
    yield "evaluations of the transformer in a generation.\n"
    rows = [
        (labels[name], str(count), str(each["prompts"]), f"{each['nfe']:.0f}", f"{each['seconds']:.2f}",
         f"{each['generation_seconds']:.2f}", f"{1000 * each['per_generation']:.0f}",
         f"{1000 * each['diffusion']:.0f}")
        for name, groups in measured.times.items()
        for count, each in groups.items()
    ]  # fmt: skip
    header = ("", "images", "prompts", "NFE", "seconds", "generation, s", "ms per generation", "ms of diffusion")
    yield from Table(header, [rows], is_markdown=True).markdown()
    slow, fast = (measured.times[name] for name in (measured.aligned, measured.merged))
    if shared := sorted(slow.keys() & fast.keys()):
        generation, diffusion = (
            ", ".join(f"{slow[count][part] / fast[count][part]:.1f} ({count})" for count in shared)
            for part in ("per_generation", "diffusion")
        )
        yield f"\nTime per generation, aligned over merged (number of images): {generation};"
        yield f"of its diffusion: {diffusion}.\n"
    plots.time_lines(plot_dir / "seconds.png", {labels[name]: groups for name, groups in measured.times.items()})
    yield f"\n![Seconds by number of images]({plot_dir.name}/seconds.png)\n"


def _changes(measured: Measured, plot_dir: Path) -> Lines:
    yield "\n## The two deltas\n"
    norms = measured.norms
    # Undefined where a model is the base itself.
    cosine = "undefined" if norms["cosine"] is None else f"{norms['cosine']:+.3f}"
    yield (
        f"Relative Frobenius norm: distillation {norms['distill']:.2%}, alignment {norms['align']:.2%}; cosine\n"
        f"between them {cosine}. Additivity error of the velocity, |f(W + d + a) - f(W) - df_d - df_a|\n"
        "over |f(W + d + a) - f(W)|, and angle between df_d and df_a, over noise levels and, at noise level\n"
        f"{measured.interactions['scales_at']:.2f}, with both deltas scaled:\n"
    )
    for found, name in ((measured.interactions["levels"], "noise level"), (measured.interactions["scales"], "scale")):
        rows = [(place, f"{each['additivity_error']:.3f}", f"{each['angle']:.0f}°") for place, each in found.items()]
        yield from Table((name, "additivity error", "angle"), [rows]).markdown()
        yield ""
    plots.interaction_lines(plot_dir / "changes.png", measured.interactions)
    yield f"![Additivity and angle]({plot_dir.name}/changes.png)\n"


def _corrections(measured: Measured) -> Lines:
    if not measured.corrections:
        return
    yield "\n## Corrections\n"
    yield (
        "Runs on `complex` (first seed): those whose image was wrong after the last planned step, and of these the\n"
        "ones that ended with a right image; those that were accepted, and of these the wrong ones; and right images\n"
        "that were not accepted before the budget was spent.\n"
    )
    rows = [
        (
            measured.rows[name].label,
            str(each.wrong),
            _share(each.recovered, each.wrong),
            str(each.accepted),
            _share(each.wrongly_accepted, each.accepted),
            _share(each.unaccepted_right, each.runs),
        )
        for name, each in measured.corrections.items()
    ]
    header = ("", "wrong after the plan", "ended right", "accepted", "of these wrong", "right, not accepted")
    yield from Table(header, [rows], is_markdown=True).markdown()


def _share(count: int, of: int) -> str:
    return f"{format_interval(wilson_interval(count, of))} of {of}" if of else ""


def _scaling(measured: Measured, plot_dir: Path) -> Lines:
    yield "\n## Accuracy by budget of images\n"
    yield (
        "Accuracy by the largest number of images, from runs with at most 8 (first seed). Best-of-n has the same\n"
        "verifier; below it, the accuracy if the detector chose. The last column is a paired difference.\n"
    )
    for split, scaling in measured.scaling.items():
        directory = plot_dir / split
        write_scaling(scaling, directory)
        systems = scaling["systems"]
        limits = sorted({point["limit"] for each in systems for point in each["curves"]["images"]})
        rows = []
        for system in systems:
            rows.append((system["name"], *_by_limit(system["curves"]["images"], limits), _gain(system["gain"])))
            if system["settings"].get("mode") == "best-of":
                name = f"{system['name']}, chosen by the detector"
                rows.append((name, *_by_limit(system["perfect_choice"], limits), ""))
        yield f"\n`{split}`, {scaling['prompts']} prompts; network evaluations and seconds:"
        yield f"[scaling.md]({plot_dir.name}/{split}/{MARKDOWN}).\n"
        yield from Table((f"`{split}`", *map(str, limits), "8 minus 3"), [rows], is_markdown=True).markdown()
        yield f"\n![Accuracy on {split} by budget of images, NFE and seconds]({plot_dir.name}/{split}/{PLOT})\n"


def _by_limit(points: Sequence[Point], limits: Sequence[float]) -> tuple[str, ...]:
    accuracies = {point["limit"]: format_score(point["accuracy"]) for point in points}
    return tuple(accuracies.get(limit, "") for limit in limits)


def _gain(gain: Gain) -> str:
    """Formats the result of `scaling.gain`; nothing if no prompt differs."""
    if not gain["won"] + gain["lost"]:
        return ""
    return f"{format_difference(gain)}, p = {gain['p_value']:.2g}"


def _robustness(measured: Measured) -> Lines:
    aligned, merged = measured.found[measured.aligned], measured.found[measured.merged]
    names = measured.rows[measured.aligned].label, measured.rows[measured.merged].label
    yield "\n## Few steps by kind of prompt\n"
    whole = compare(concatenate_splits(aligned), concatenate_splits(merged))["overall"]
    yield (
        f"Over all prompts, the difference of {names[1]} to {names[0]} is {format_difference(whole)}\n"
        f"({whole['first_wins']} prompts lost, {whole['second_wins']} won, p = {whole['p_value']:.2g}).\n"
    )
    yield from groups_table(aligned, merged, names)
    parts = {
        f"{name} (`{split}`)": part
        for split, entries in measured.metadata.items()
        for name, part in by_phrasing(aligned[split], merged[split], entries).items()
    }
    worst = min(parts, key=lambda name: parts[name]["difference"])
    found = significant(parts)
    yield (
        f"\nOf {len(parts)} groups of tag and phrasing, {len(found)} differ after Holm's correction"
        f"{': ' + ', '.join(found) if found else ''}. The largest loss is that of {worst},\n"
        f"{format_score(parts[worst]['first'])} against {format_score(parts[worst]['second'])} on "
        f"{parts[worst]['prompts']} prompts (p = {parts[worst]['p_value']:.2g}, not corrected).\n"
    )


def _strip(measured: Measured, plot_dir: Path) -> Lines:
    """Shows the base's one-shot image and every image of the merged loop, for one complex prompt that needs it."""
    shot, loop = (measured.found[name]["complex"] for name in ("base-one-shot", measured.merged))
    shown = [
        (once, looped)
        for once, looped in zip(shot.runs[0]["pictures"], loop.runs[0]["pictures"], strict=True)
        if not once["correct"] and looped["correct"] and (looped["steps"] or 0) >= 3
    ]
    if not shown:
        return
    once, looped = shown[0]
    first = RunDirectory(shot.directories[0]).image(once["index"], once["sample"])
    trajectory = RunDirectory(loop.directories[0]).trajectory(looped["index"], looped["sample"])
    if trajectory is None:
        return
    steps = [step.image for step in trajectory.generated if step.image is not None and not step.rolled_back]
    plots.image_strip(plot_dir / "strip.png", [first, *steps])
    yield "\n## One prompt\n"
    yield f"*{plain(looped['prompt'])}*: the base in one shot, and the images of the merged model's loop in order.\n"
    yield f"![{plain(looped['prompt'])}]({plot_dir.name}/strip.png)"
