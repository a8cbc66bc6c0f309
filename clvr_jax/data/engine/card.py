"""The statistics of a run, for people: a page without scripts, and the card of the dataset."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from clvr_jax.data.engine.statistics import STAGE_NAMES
from clvr_jax.data.trajectory_record import SCHEMA

Row = tuple[str, ...]
_USAGE = ("calls", "retries", "input_tokens", "output_tokens", "pictures", "nfe", "seconds", "dollars")


def statistics_page(found: Mapping[str, Any]) -> str:
    """statistics.json as an HTML page; everything that comes from models or users is escaped."""
    template = Template(resources.files(__package__).joinpath("statistics.html").read_text(encoding="utf-8"))
    prompts = found["prompts"]
    lengths = [(f"{steps} pictures", count) for steps, count in found["steps"].items()]
    reasons = [(reason, entry["prompts"]) for reason, entry in found["discarded"].items()]
    stages = [("prompts", prompts), *((STAGE_NAMES[name], entry["prompts"]) for name, entry in found["stages"].items())]
    examples = [(reason, example) for reason, entry in found["discarded"].items() for example in entry["examples"]]
    return template.substitute(
        title=escape(found["recipe"]),
        description=escape(found["description"]),
        headline=escape(headline(found)),
        stages=_bars(stages, prompts),
        reasons=_bars([*reasons, *((f"refused: {why}", count) for why, count in found["refused"].items())], prompts),
        lengths=_bars(lengths, found["trajectories"]),
        usage=_html_table(usage_rows(found)),
        examples=_html_table([("reason", "example"), *examples]),
    )


def dataset_card(found: Mapping[str, Any]) -> str:
    """dataset_card.md: what the dataset is, how it was made, how to read it."""
    stages = [
        (STAGE_NAMES[name], f"{entry['prompts']:,}", f"{entry['share']:.1%}") for name, entry in found["stages"].items()
    ]
    discarded = [
        (reason, f"{entry['prompts']:,}", f"{entry['share']:.1%}") for reason, entry in found["discarded"].items()
    ]
    refused = [(f"refused: {reason}", f"{count:,}", "") for reason, count in found["refused"].items()]
    lengths = [(steps, f"{count:,}") for steps, count in found["steps"].items()]
    checked = "Every picture passed its checklist; the" if found["verified"] else "Pictures were not checked; the"
    sections = [
        "---\ntags: [text-to-image, image-editing, reasoning, clvr-jax]\n---",
        f"# {found['recipe']}: verified trajectories",
        found["description"],
        headline(found),
        "A record is a prompt, the steps that led to its picture (reasoning, action, picture, verdict, the checklist "
        "that the picture was checked on, proxy prompts for reward models), and how it ended. "
        f"{checked} result was accepted once more and preferred to a picture drawn in one shot.",
        "## Reading it\n\n```python\nimport tensorflow_datasets as tfds\n\n"
        'source = tfds.builder_from_directory("dataset").as_data_source("train")\n'
        "```\n\nor `clvr_jax.data.trajectory_dataset.TrajectoryDataset`. "
        f"Schema {SCHEMA}; pictures are PNG files. `clvr train` takes the folder as it is.",
        "## How far the prompts came\n\n" + _table([("", "prompts", "share"), *stages]),
        "## Why the others did not\n\n" + _table([("", "prompts", "share"), *discarded, *refused]),
        "## Pictures in a trajectory\n\n" + _table([("pictures", "trajectories"), *lengths]),
        "## What it cost\n\n" + _table(usage_rows(found)),
        "## Limits\n\nThe models that made it may have biases and licences of their own, which pass on to what is "
        "trained on it. Prompts that are, or nearly are, evaluation prompts known to the recipe were left out.",
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def headline(found: Mapping[str, Any]) -> str:
    """The result in a sentence or two."""
    share = found["trajectories"] / max(found["prompts"], 1)
    text = f"{found['trajectories']:,} trajectories of {found['prompts']:,} prompts ({share:.1%})."
    if audit := found["audit"]:
        wrong, pictures = audit["wrong"], audit["pictures"]
        text += f" Read by a program, {wrong:,} of their {pictures:,} pictures are wrong ({wrong / pictures:.2%})."
    return text


def usage_rows(found: Mapping[str, Any]) -> list[Row]:
    """A table of what each role cost; columns that are zero everywhere are left out."""
    usage = {**found["usage"], "all": found["total"]}
    columns = [name for name in _USAGE if any(entry.get(name) for entry in usage.values())]
    rows = [(role, *(_number(entry.get(name, 0)) for name in columns)) for role, entry in usage.items()]
    return [("", *(name.replace("_", " ") for name in columns)), *rows]


def _counted(entry: Mapping[str, Any]) -> Row:
    return f"{entry['prompts']:,}", f"{entry['share']:.1%}"


def _number(value: float) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def _table(rows: Sequence[Row]) -> str:
    head, *body = rows
    if not body:
        return "None."
    rule = "|".join(["---", *("---:" for _ in head[1:])])
    cells = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in body)
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {row} |" for row in cells)])


def _html_table(rows: Sequence[Row]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return "<table>" + "".join(lines) + "</table>"


def _bars(entries: Iterable[tuple[str, int]], whole: int) -> str:
    lines = []
    for name, count in entries:
        share = count / max(whole, 1)
        lines.append(
            f'<div class="row"><span>{escape(name)}</span><span class="track"><i style="width:{min(share, 1):.2%}"></i>'
            f"</span><span>{count:,}</span><span>{share:.1%}</span></div>"
        )
    return "".join(lines) or "<p>none</p>"
