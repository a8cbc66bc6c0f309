"""Reports of a comparison of several systems: comparison.json, comparison.md, plots, and a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from clvr_jax.display.plots import can_plot, literal, new_figure
from clvr_jax.display.tables import Row, Table, plain
from clvr_jax.evaluation.comparison.pairs import Difference
from clvr_jax.evaluation.comparison.systems import ComplexityProbes, SystemsComparison
from clvr_jax.evaluation.harness.cost import cost_line
from clvr_jax.evaluation.harness.results import CostKey, GroupResult
from clvr_jax.files.atomic_io import write_json, write_text

JSON, MARKDOWN = "comparison.json", "comparison.md"
PLOTS = {"scores": "scores.png", "cost": "cost.png", "complexity": "complexity.png"}
_COST_AXES: dict[CostKey, str] = {"nfe_per_picture": "NFE per image", "seconds_per_picture": "seconds per image"}


def write_comparison(comparison: SystemsComparison, out: Path) -> list[str]:
    """Writes a comparison, as `comparison.compare_systems` returns it, to a directory.

    Returns: the names of the files; plots are among them if matplotlib is installed.
    """
    plots = _plot(comparison, out) if can_plot() else []
    write_json(out / JSON, comparison)
    write_text(out / MARKDOWN, comparison_markdown(comparison, plots))
    return [JSON, MARKDOWN, *plots]


def comparison_markdown(comparison: SystemsComparison, plots: Sequence[str] = ()) -> str:
    """Returns a comparison as Markdown. plots: names of image files in the same directory."""
    first = comparison["systems"][0]["name"]
    lines = [
        f"# {plain(comparison['benchmark'])}: {', '.join(plain(system['name']) for system in comparison['systems'])}",
        "",
        f"{comparison['prompts']} prompts; scores {plain(comparison['unit'])}; judge: "
        + ", ".join(plain(value) for value in comparison["judge"].values())
        + ". Intervals are 95 %: Wilson's for scores of 0 and 1, bootstrap over prompts for other scores.",
        "",
        *_score_table(comparison).markdown(),
        "",
        f"## Against {plain(first)}, paired by prompt",
        "",
        "Difference with a bootstrap interval over prompts; wins of the first : of the other system; p-value of"
        " McNemar's exact test (the sign test for prompts with several images or other scores), and with Holm's"
        " correction for the number of systems.",
        "",
        *_pair_table(comparison).markdown(),
        "",
        *_tag_sections(comparison),
        "## Cost",
        "",
        *[f"- {plain(system['name'])}: {plain(cost_line(system['cost']))}" for system in comparison["systems"]],
        "",
    ]
    if comparison["complexity"]:
        lines += ["## Complexity", "", *_complexity_lines(comparison["complexity"]), ""]
    lines += [f"![{name}]({name})" for name in plots]
    return "\n".join(lines).rstrip() + "\n"


def systems_table(comparison: SystemsComparison) -> Table:
    """Returns the scores and differences of all systems, for the terminal."""
    first = comparison["systems"][0]["name"]
    pairs = {pair["name"]: pair for pair in comparison["against_first"]}
    rows = []
    for system in comparison["systems"]:
        pair = pairs.get(system["name"])
        difference = ("", "", "") if pair is None else (*_difference(pair["overall"]), f"{pair['holm']:.2g}")
        interval = _interval(system["overall"]["interval"])
        rows.append((system["name"], f"{system['overall']['score']:.3f}", interval, *difference))
    return Table(
        ("", "all prompts", "95 %", "difference", "95 %", "p (Holm)"),
        [rows],
        title=f"{comparison['benchmark']}, {comparison['prompts']} prompts",
        caption=f"differences: to {first}",
    )


def _score_table(comparison: SystemsComparison) -> Table:
    systems = comparison["systems"]
    rows: list[Row] = []
    for tag in comparison["tags"]:
        groups = [system["tags"][tag] for system in systems]
        rows.append([f"{tag} ({groups[0]['prompts']})", *map(_scored, groups)])
    rows.append(["mean of tags", *(f"{system['mean_of_tags']:.3f}" for system in systems)])
    rows.append(["all prompts", *(_scored(system["overall"]) for system in systems)])
    reported = [(system["reported"], system["mean_of_tags"]) for system in systems]
    if any(own is not None and not math.isclose(own, mean) for own, mean in reported):
        rows.append(["the benchmark's own", *(_number(system["reported"]) for system in systems)])
    return Table(("", *(system["name"] for system in systems)), [rows])


def _pair_table(comparison: SystemsComparison) -> Table:
    rows = []
    for pair in comparison["against_first"]:
        part = pair["overall"]
        wins = f"{part['first_wins']} : {part['second_wins']}"
        values = (*_difference(part), *_difference(pair["mean_of_tags"]), wins, f"{part['p_value']:.2g}")
        rows.append((pair["name"], *values, f"{pair['holm']:.2g}"))
    return Table(("", "difference", "95 %", "mean of tags", "95 %", "wins", "p", "p (Holm)"), [rows])


def _tag_sections(comparison: SystemsComparison) -> list[str]:
    """Returns differences by tag and tier, one table for each system; p-values are not corrected."""
    lines = []
    for pair in comparison["against_first"]:
        parts = [*pair["tags"].items(), *((f"tier {tier}", part) for tier, part in pair["tiers"].items())]
        if len(parts) < 2:
            continue
        first = comparison["systems"][0]["name"]
        rows = []
        for name, part in parts:
            means = (f"{part['first']:.3f}", f"{part['second']:.3f}")
            rows.append((name, *means, *_difference(part), f"{part['p_value']:.2g}"))
        table = Table(("", first, pair["name"], "difference", "95 %", "p, not corrected"), [rows])
        lines += [*table.markdown(), ""]
    return lines


def _complexity_lines(complexity: ComplexityProbes) -> list[str]:
    rows = []
    for name, probe in complexity["systems"].items():
        law = probe["failure_law"]
        odds = "" if law is None else f"{law['factor']:.2g} C^{law['exponent']:.2f} (R2 {law['r_squared']:.2f})"
        rows.append((name, f"{probe['area']:.1f}", _number(probe["half_fails_at"], 1), odds))
    header = ("", "area under the pass curve", "complexity at 50 % failures", "odds of failure")
    lines, law = Table(header, [rows]).markdown(), complexity["law"]
    if law is None:
        return lines
    fit = f"{law['factor']:.3g} NFE^{law['exponent']:.2f} (R2 {law['r_squared']:.2f})"
    return [*lines, "", f"100 - area, over the systems: {fit}"]


def _scored(group: GroupResult) -> str:
    return f"{group['score']:.3f} [{_interval(group['interval'])}]"


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.3f} .. {bounds[1]:.3f}"


def _difference(part: Difference) -> tuple[str, str]:
    low, high = part["interval"]
    return f"{part['difference']:+.3f}", f"{low:+.3f} .. {high:+.3f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _plot(comparison: SystemsComparison, out: Path) -> list[str]:
    out.mkdir(parents=True, exist_ok=True)
    systems = comparison["systems"]
    rows = [*comparison["tags"], "all prompts"]
    figure = new_figure(max(6.4, 1.2 * len(rows)), 4.5)
    axes = figure.add_subplot()
    for number, system in enumerate(systems):
        groups = [*(system["tags"][tag] for tag in comparison["tags"]), system["overall"]]
        positions = [row + 0.6 * (number + 0.5) / len(systems) - 0.3 for row in range(len(rows))]
        axes.errorbar(
            positions, [group["score"] for group in groups], yerr=_bars(groups), fmt="o", label=literal(system["name"])
        )
    axes.set_xticks(range(len(rows)), list(map(literal, rows)), rotation=20, ha="right")
    axes.set(ylabel=f"score ({literal(comparison['unit'])})")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(out / PLOTS["scores"], dpi=120)
    names = [PLOTS["scores"]]

    shown = {key: label for key, label in _COST_AXES.items() if any(system["cost"][key] for system in systems)}
    if shown:
        figure = new_figure(5 * len(shown), 4)
        for number, (key, label) in enumerate(shown.items(), start=1):
            axes = figure.add_subplot(1, len(shown), number)
            for system in systems:
                if cost := system["cost"][key]:
                    bars = _bars([system["overall"]])
                    axes.errorbar(
                        cost,
                        system["overall"]["score"],
                        yerr=bars,
                        fmt="o",
                        label=literal(system["name"]),
                    )
            axes.set(xlabel=label, ylabel="score, all prompts", xscale="log")
            axes.grid(alpha=0.3)
            axes.legend()
        figure.savefig(out / PLOTS["cost"], dpi=120)
        names.append(PLOTS["cost"])

    if comparison["complexity"]:
        figure = new_figure(6.4, 4.5)
        axes = figure.add_subplot()
        for name, probe in comparison["complexity"]["systems"].items():
            tiers = probe["tiers"]
            x, y = [tier["complexity"] for tier in tiers], [tier["passed"] for tier in tiers]
            (line,) = axes.plot(x, y, "o-", label=f"{literal(name)}: area {probe['area']:.1f}")
            low, high = [tier["low"] for tier in tiers], [tier["high"] for tier in tiers]
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15)
        axes.set(xlabel="complexity of the prompt, C", ylabel="pass rate", ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(out / PLOTS["complexity"], dpi=120)
        names.append(PLOTS["complexity"])
    return names


def _bars(groups: Sequence[GroupResult]) -> list[list[float]]:
    """Returns the lengths of error bars, below and above."""
    return [
        [max(0.0, group["score"] - group["interval"][0]) for group in groups],
        [max(0.0, group["interval"][1] - group["score"]) for group in groups],
    ]
