"""The verifier benchmark as a table, in Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TypedDict

from clvr_jax.display.tables import Table, plain
from clvr_jax.evaluation.statistics import RateResult
from clvr_jax.evaluation.verifier.cases import CONTROLS_GROUP
from clvr_jax.evaluation.verifier.metrics import Metrics, ShareResult, Summary
from clvr_jax.files.json_input import JSON

if TYPE_CHECKING:
    from rich.console import Group

COLUMNS = ("", "false accept", "false reject", "read")
_HELD_OUT = {"held_out": "held-out pairs", "others": "other pairs"}


class VerifierResults(TypedDict):
    """The content of results.json; `cases` has an entry for each image, as `CheckedCase.to_dict` returns it."""

    benchmark: str
    verifier: str
    settings: Mapping[str, JSON]
    seed: int
    adapted: list[str]
    summary: Summary
    usage: Mapping[str, float]
    versions: dict[str, str]
    cases: list[dict[str, JSON]]


def markdown(results: VerifierResults) -> str:
    """Returns the results as Markdown."""
    lines = [f"# Verifier benchmark: {plain(results['verifier'])}", "", f"Seed {results['seed']}. {explanation()}", ""]
    lines += verifier_table(results).markdown()
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(results["summary"]))]) + "\n"


def rich_results(results: VerifierResults) -> Group:
    """Returns the results for the terminal: a table, and sentences below it."""
    from rich.console import Group

    return Group(verifier_table(results).rich(), *notes(results["summary"]))


def verifier_table(results: VerifierResults) -> Table:
    """Returns the rates by group of images."""
    sections = [[(name, *cells) for name, cells in section] for section in _sections(results["summary"])]
    title = f"Verifier benchmark: {results['verifier']}"
    return Table(COLUMNS, sections, title=title, has_totals=True, one_line=True)


def explanation() -> str:
    """Says what the rates are."""
    return (
        "False accept: share of wrong images that are accepted. False reject: share of right images that are not "
        "accepted, those without a verdict included. In brackets 95 % intervals (Wilson, the images of one prompt "
        "taken together), then the number of images. Near a limit: the detector would label the image the other way if "
        "its limits for clear objects were moved slightly, by .02 of a shape's overlap, 10 levels of color or 5 % of "
        "an object's pixels. Read: share of images whose description says what each cell shows, and nothing else."
    )


def _sections(summary: Summary) -> Iterator[list[tuple[str, tuple[str, str, str]]]]:
    """Yields (name, cells) for each group: all of it, its kinds, and its numbers of objects and held-out pairs."""
    for group, metrics in summary["groups"].items():
        kinds = metrics["kinds"]
        parts = list(kinds.items()) if len(kinds) > 1 else []
        if group != CONTROLS_GROUP:
            parts += [(f"{number} objects", part) for number, part in metrics["objects"].items()]
            parts += [(_HELD_OUT[key], part) for key, part in metrics["held_out"].items()]
        yield [(group, _cells(metrics)), *((name, _cells(part)) for name, part in parts)]


def notes(summary: Summary) -> list[str]:
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
        if exact is not None:
            found.append(f"Prompts whose derived requirements are the exact ones: {_share(exact)}{failed}.")
    if total["without_verdict"]:
        found.append(f"{total['without_verdict']} of {total['images']} images have no verdict and are not accepted.")
    return found


def _cells(metrics: Metrics) -> tuple[str, str, str]:
    read = metrics["read_exactly"]
    return (
        _rate(metrics["false_accept"]),
        _rate(metrics["false_reject"]),
        "" if read is None else _short(read["rate"]),
    )


def _rate(rate: RateResult | None) -> str:
    """Rate, interval and number of images, ".560 [.417, .693] of 84"; "" without images."""
    if rate is None:
        return ""
    low, high = rate["interval"]
    return f"{_short(rate['rate'])} [{_short(low)}, {_short(high)}] of {rate['of']}"


def _short(value: float) -> str:
    """Three digits without the zero before the point, as a whole table of them is read more easily."""
    text = f"{value:.3f}"
    return text.removeprefix("0") if value < 1 else text


def _share(rate: RateResult | ShareResult) -> str:
    return f"{rate['rate']:.3f} ({rate['count']} of {rate['of']})"
