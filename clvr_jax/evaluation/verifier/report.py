"""The verifier benchmark as a table, in Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from clvr_jax.evaluation.verifier.cases import CONTROLS_GROUP

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("", "wrong images", "false accept", "95 %", "right images", "false reject", "95 %", "read exactly")
_KIND_GROUPS = ("renderings", CONTROLS_GROUP, "images")
_HELD_OUT = {"held_out": "held-out pairs", "others": "other pairs"}


def markdown(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = [f"# Verifier benchmark: {results['verifier']}", "", f"Seed {results['seed']}. {explanation()}", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    for section in sections(results["summary"]):
        lines += [f"| {' | '.join(row)} |" for row in section]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(results["summary"]))]) + "\n"


def rich_table(results: Mapping[str, Any]) -> Table:
    """The results as a table for the terminal."""
    from rich.table import Table

    title = f"Verifier benchmark: {results['verifier']}"
    table = Table(title=title, caption="\n".join(notes(results["summary"])), caption_justify="left")
    table.add_column("")
    for column in COLUMNS[1:]:
        table.add_column(column, justify="right")
    for section in sections(results["summary"]):
        for row in section:
            table.add_row(*row)
        table.add_section()
    return table


def explanation() -> str:
    """Says what the rates are."""
    return (
        "False accept: share of wrong images that are accepted. False reject: share of right images that are not "
        "accepted, those without a verdict included. Intervals: 95 %, Wilson, the images of one prompt taken together. "
        "Read exactly: share of images whose description says what each cell shows, and nothing else."
    )


def sections(summary: Mapping[str, Any]) -> Iterator[list[tuple[str, ...]]]:
    """Rows of COLUMNS: for each group its kinds, all of it, and by number of objects and held-out pairs."""
    for name, group in summary["groups"].items():
        kinds = group["kinds"] if name in _KIND_GROUPS else {}
        rows = [_row(f"{name}: {kind}", metrics) for kind, metrics in kinds.items()] if len(kinds) > 1 else []
        yield [*rows, _row(f"{name}, all" if rows else name, group)]
        if name == CONTROLS_GROUP:
            continue
        split = [_row(f"{name}: {number} objects", metrics) for number, metrics in group["objects"].items()]
        split += [_row(f"{name}: {_HELD_OUT[key]}", metrics) for key, metrics in group["held_out"].items()]
        if split:
            yield split


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Sentences on ROC AUC, calibration, requirements, and images without a verdict."""
    found = []
    for name, metrics in [*summary["groups"].items(), ("all images", summary["all"])]:
        if metrics["roc_auc"] is not None:
            auc, error = metrics["roc_auc"], metrics["calibration_error"]
            found.append(f"{name}: ROC AUC {auc:.3f}, expected calibration error {error:.3f} (10 bins).")
    total = summary["all"]
    if not total["with_probability"]:
        found.append("The verifier gives no probabilities, so there is no ROC AUC and no calibration error.")
    elif total["with_probability"] < total["images"]:
        found.append(
            f"{total['images'] - total['with_probability']} of {total['images']} images have no probability; ROC AUC "
            "and calibration error leave them out."
        )
    if total["cells_read"] is not None:
        found.append(f"Cells that show something and are described as they are: {_share(total['cells_read'])}.")
    elif total["read_exactly"] is None:
        found.append("The verifier describes no images of the shapes world, so there is no reading accuracy.")
    if summary["requirements"] is not None:
        exact, missing = summary["requirements"]["exact"], summary["requirements"]["not_derived"]
        failed = f"; no requirements could be derived from {missing}" if missing else ""
        found.append(f"Prompts whose derived requirements are the exact ones: {_share(exact)}{failed}.")
    if total["without_verdict"]:
        found.append(f"{total['without_verdict']} of {total['images']} images have no verdict and are not accepted.")
    return found


def _row(name: str, metrics: Mapping[str, Any]) -> tuple[str, ...]:
    read = metrics["read_exactly"]
    return (
        name,
        *_cells(metrics["false_accept"]),
        *_cells(metrics["false_reject"]),
        "" if read is None else f"{read['rate']:.3f}",
    )


def _cells(rate: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """Number of images, rate and interval."""
    if rate is None:
        return "", "", ""
    low, high = rate["interval"]
    return str(rate["of"]), f"{rate['rate']:.3f}", f"{low:.3f} .. {high:.3f}"


def _share(rate: Mapping[str, Any]) -> str:
    return f"{rate['rate']:.3f} ({rate['count']} of {rate['of']})"
