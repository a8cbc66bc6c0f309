"""docs/results.md: what was measured, in the order of the paper's claims, and its plots; a function of results."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clvr_jax.convert.model_card import markdown_table
from clvr_jax.evaluation.compare import compare
from clvr_jax.evaluation.layout import Folder
from clvr_jax.evaluation.markdown import plain
from clvr_jax.evaluation.paper import plots
from clvr_jax.evaluation.paper.rows import Row, joined
from clvr_jax.evaluation.paper.tables import (
    Found,
    by_phrasing,
    groups_table,
    short,
    signed,
    significant,
    systems_table,
    tiers_table,
)
from clvr_jax.evaluation.scaling_report import MARKDOWN, PLOT, write_scaling
from clvr_jax.files import write_atomically

Lines = Iterator[str]


@dataclass(frozen=True)
class Section:
    """Systems side by side. title, text: above the table. rows: names. reference: the one that differences are to.
    plot: name of the picture, "" for none."""

    title: str
    text: str
    rows: tuple[str, ...]
    reference: str
    plot: str = ""


@dataclass(frozen=True)
class Measured:
    """Everything that the page says.

    command: that made it. rows: name -> system. found: name -> split -> results. metadata: split -> prompts, in order.
    aligned, merged: names of the rows whose drawing is compared. times: name of a row -> `timing.by_drawings`.
    interactions: see `diagnosis.interactions`. norms: the whole's part of the merge's report. scaling: see
    `scaling.read_off`. seconds: of each stage.
    """

    command: str
    rows: Mapping[str, Row]
    found: Found
    metadata: Mapping[str, Sequence[Mapping[str, Any]]]
    aligned: str
    merged: str
    times: Mapping[str, Mapping[int, Mapping[str, float]]]
    interactions: Mapping[str, Any]
    norms: Mapping[str, Any]
    scaling: Mapping[str, Any]
    seconds: Mapping[str, float]

    def labels(self, names: Sequence[str]) -> dict[str, str]:
        """Name -> label of those that were measured."""
        return {name: self.rows[name].label for name in names if name in self.found}


def write_page(page: Path, measured: Measured, sections: Sequence[Section], tiers: Sequence[str]) -> None:
    """Writes the page and, in a folder of its name, its plots.

    Args:
      page: the Markdown file.
      measured: what it says.
      sections: tables of systems.
      tiers: names of the rows that are shown by tier.
    """
    pictures = page.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    parts = [
        _head(measured),
        *(_section(measured, section, pictures) for section in sections),
        _tiers(measured, tiers, pictures),
        _times(measured, pictures),
        _changes(measured, pictures),
        _scaling(measured, pictures),
        _robustness(measured),
        _strip(measured, pictures),
    ]
    text = "\n".join(line for part in parts for line in part)
    write_atomically(page, (re.sub(r"\n{3,}", "\n\n", text).strip() + "\n").encode())


def _head(measured: Measured) -> Lines:
    yield "# The paper's tables in the shapes world\n"
    yield f"Written by `{measured.command}`; every number is of that run.\n"
    counts = ", ".join(f"{len(entries)} of `{split}`" for split, entries in measured.metadata.items())
    seeds = len(next(iter(measured.found[measured.merged].values())).runs)
    yield (
        f"Prompts: {counts}; pictures of each: {seeds}. In brackets 95 % intervals: Wilson's for the share of\n"
        "prompts drawn right, bootstrap over prompts for differences, which are on all prompts. p is McNemar's exact\n"
        "test (the sign test with several pictures), not corrected. NFE and seconds are a picture's, on `complex`, in\n"
        "batches. There is one set of weights of each kind: the intervals are about prompts, not about training again."
    )
    hours = sum(measured.seconds.values()) / 3600
    yield f"\nAll stages after training took {hours:.1f} hours, without what was drawn before an interruption.\n"


def _section(measured: Measured, section: Section, pictures: Path) -> Lines:
    labels = measured.labels(section.rows)
    if section.reference not in labels:
        return
    yield f"\n## {section.title}\n"
    yield f"{section.text}\n"
    yield from systems_table(labels, measured.found, section.reference)
    if section.plot:
        plots.accuracy_bars(pictures / section.plot, labels, measured.found)
        yield f"\n![{section.title}]({pictures.name}/{section.plot})\n"


def _tiers(measured: Measured, names: Sequence[str], pictures: Path) -> Lines:
    labels = measured.labels(names)
    yield "\n## Accuracy by complexity\n"
    yield from tiers_table(labels, measured.found, measured.metadata)
    plots.tier_lines(pictures / "tiers.png", labels, measured.found)
    yield f"\n![Accuracy by number of objects]({pictures.name}/tiers.png)\n"


def _times(measured: Measured, pictures: Path) -> Lines:
    labels = {name: measured.rows[name].label for name in measured.times}
    yield "\n## Seconds and evaluations by number of drawings\n"
    yield "One prompt at a time, all programs compiled before, medians. Drawing: text to pixels. Diffusion: the"
    yield "evaluations of the transformer in it.\n"
    rows = [
        (labels[name], str(count), str(each["prompts"]), f"{each['nfe']:.0f}", f"{each['seconds']:.2f}",
         f"{each['drawing_seconds']:.2f}", f"{1000 * each['per_drawing']:.0f}",
         f"{1000 * each['diffusion']:.0f}")
        for name, groups in measured.times.items()
        for count, each in groups.items()
    ]  # fmt: skip
    yield from markdown_table(
        ("", "drawings", "prompts", "NFE", "seconds", "of it drawing", "ms a drawing", "ms diffusion"), rows
    )
    slow, fast = (measured.times[name] for name in (measured.aligned, measured.merged))
    if shared := sorted(slow.keys() & fast.keys()):
        drawing, diffusion = (
            ", ".join(f"{slow[count][part] / fast[count][part]:.1f} ({count})" for count in shared)
            for part in ("per_drawing", "diffusion")
        )
        yield f"\nTime of a drawing, aligned over merged (number of drawings): {drawing};"
        yield f"of its diffusion: {diffusion}.\n"
    plots.time_lines(pictures / "seconds.png", {labels[name]: groups for name, groups in measured.times.items()})
    yield f"\n![Seconds by number of drawings]({pictures.name}/seconds.png)\n"


def _changes(measured: Measured, pictures: Path) -> Lines:
    yield "\n## The two changes\n"
    norms = measured.norms
    # Undefined where a model is the base itself.
    cosine = "undefined" if norms["cosine"] is None else f"{norms['cosine']:+.3f}"
    yield (
        f"Relative Frobenius norm: distillation {norms['distill']:.2%}, alignment {norms['align']:.2%}; cosine\n"
        f"between them {cosine}. Additivity error of the velocity, |f(W + d + a) - f(W) - df_d - df_a|\n"
        "over |f(W + d + a) - f(W)|, and angle between df_d and df_a, over noise levels and, at noise level\n"
        f"{measured.interactions['scales_at']:.2f}, with both changes scaled:\n"
    )
    for key, name in (("levels", "noise level"), ("scales", "scale")):
        rows = [
            (place, f"{each['additivity_error']:.3f}", f"{each['angle']:.0f}°")
            for place, each in measured.interactions[key].items()
        ]
        yield from markdown_table((name, "additivity error", "angle"), rows)
        yield ""
    plots.interaction_lines(pictures / "changes.png", measured.interactions)
    yield f"![Additivity and angle]({pictures.name}/changes.png)\n"


def _scaling(measured: Measured, pictures: Path) -> Lines:
    write_scaling(measured.scaling, pictures)
    yield "\n## What more drawings buy\n"
    yield (
        "Share of `complex` drawn right, by drawings allowed, read off runs of 8 (first seed); best of n\n"
        f"with the same verifier. Network evaluations and seconds: [scaling.md]({pictures.name}/{MARKDOWN}).\n"
    )
    limits = sorted({point["limit"] for each in measured.scaling["systems"] for point in each["curves"]["drawings"]})
    rows = []
    for system in measured.scaling["systems"]:
        points = {point["limit"]: short(point["accuracy"]) for point in system["curves"]["drawings"]}
        rows.append((system["name"], *(points.get(limit, "") for limit in limits)))
    yield from markdown_table(("", *map(str, limits)), rows)
    yield f"\n![Accuracy by drawings, evaluations and seconds allowed]({pictures.name}/{PLOT})\n"


def _robustness(measured: Measured) -> Lines:
    aligned, merged = measured.found[measured.aligned], measured.found[measured.merged]
    names = measured.rows[measured.aligned].label, measured.rows[measured.merged].label
    yield "\n## Few steps, whatever the prompt?\n"
    whole = compare(joined(aligned), joined(merged))["overall"]
    yield (
        f"Over all prompts, {names[1]} is {signed(whole)} from {names[0]}\n"
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
        f"{short(parts[worst]['first'])} against {short(parts[worst]['second'])} on {parts[worst]['prompts']} prompts "
        f"(p = {parts[worst]['p_value']:.2g}, not corrected).\n"
    )


def _strip(measured: Measured, pictures: Path) -> Lines:
    """One shot of the base, and every drawing of the merged loop, for the first complex prompt that shows the loop."""
    shot, loop = (measured.found[name]["complex"] for name in ("base-one-shot", measured.merged))
    shown = [
        (once, looped)
        for once, looped in zip(shot.runs[0]["pictures"], loop.runs[0]["pictures"], strict=True)
        if not once["correct"] and looped["correct"] and (looped["steps"] or 0) >= 3
    ]
    if not shown:
        return
    once, looped = shown[0]
    first = Folder(shot.folders[0]).picture(once["index"], once["sample"])
    trajectory = Folder(loop.folders[0]).trajectory(looped["index"], looped["sample"])
    if trajectory is None:
        return
    drawings = [step.image for step in trajectory.drawings if not step.rolled_back]
    plots.picture_strip(pictures / "strip.png", [first, *drawings])
    yield "\n## One prompt\n"
    yield f"*{plain(looped['prompt'])}*: the base in one shot, and the merged model's loop, drawing by drawing.\n"
    yield f"![{plain(looped['prompt'])}]({pictures.name}/strip.png)"
