"""The statistics of a run, for people: a page without scripts, and the card of the dataset."""

from collections.abc import Mapping, Sequence
from typing import Any

from clvr_jax.data.engine.statistics import STAGE_NAMES
from clvr_jax.data.trajectory_record import SCHEMA
from clvr_jax.html_pages import render_page

Row = tuple[str, ...]
_VERDICTS = (("latest image right", "right"), ("latest image wrong", "wrong"))
_USAGE = ("calls", "retries", "input_tokens", "output_tokens", "pictures", "nfe", "seconds", "dollars")


def statistics_page(found: Mapping[str, Any]) -> str:
    """statistics.json as an HTML page; everything that comes from models or users is escaped."""
    verification = found["verification"]
    discarded = found["discarded"].items()
    return render_page(
        __package__,
        "statistics.html",
        title=found["recipe"],
        description=found["description"],
        headline=headline(found),
        corrections=corrections_sentence(found),
        pairs=pairs_sentence(found),
        prompts=found["prompts"],
        trajectories=found["trajectories"],
        examined=verification["right"] + verification["wrong"],
        stages=[
            ("prompts", found["prompts"]),
            *((STAGE_NAMES[name], entry["prompts"]) for name, entry in found["stages"].items()),
        ],
        reasons=[
            *((reason, entry["prompts"]) for reason, entry in discarded),
            *((f"refused: {why}", count) for why, count in found["refused"].items()),
        ],
        lengths=[(f"{steps} pictures", count) for steps, count in found["steps"].items()],
        by_number=[(f"{number} corrections", count) for number, count in found["corrections"]["by_number"].items()],
        verdicts=[(name, verification[key]) for name, key in _VERDICTS],
        usage=usage_rows(found),
        examples=[
            ("reason", "example"),
            *((reason, example) for reason, entry in discarded for example in entry["examples"]),
        ],
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
    corrections = [(number, f"{count:,}") for number, count in found["corrections"]["by_number"].items()]
    verdicts = [(name, f"{found['verification'][key]:,}") for name, key in _VERDICTS]
    checked = "Every picture was checked on it; the" if found["verified"] else "Pictures were not checked; the"
    sections = [
        "---\ntags: [text-to-image, image-editing, reasoning, clvr-jax]\n---",
        f"# {found['recipe']}: verified trajectories",
        found["description"],
        headline(found),
        "A record is a prompt, the steps that led to its picture (reasoning, action, picture, verdict, the checklist "
        "that the picture was checked on, proxy prompts for reward models), and how it ended. "
        f"{checked} result was accepted once more and preferred to a picture drawn in one shot.",
        "Wrong images are in it as context: the field `run` of their step has `is_mistake` true. Never train an image "
        "generator to make one. The reply after it, a verdict and a correction, is for the controller to learn.",
        "The split `verification` holds examples for the controller only: a history, its latest image, and the verdict "
        "on that image. A pair is one history with a wrong and with a right image; its ids end in `-wrong` and "
        "`-right`. No image of this split is a target of an image generator.",
        "## Reading it\n\n```python\nimport tensorflow_datasets as tfds\n\n"
        'builder = tfds.builder_from_directory("dataset")\n'
        'trajectories = builder.as_data_source("train")\n'
        'examples = builder.as_data_source("verification")  # if there are any\n'
        "```\n\nor `clvr_jax.data.trajectory_dataset.TrajectoryDataset`. "
        f"Schema {SCHEMA}; pictures are PNG files. `clvr train` takes the folder as it is.",
        "## How far the prompts came\n\n" + _table([("", "prompts", "share"), *stages]),
        "## Why the others did not\n\n" + _table([("", "prompts", "share"), *discarded, *refused]),
        "## Pictures in a trajectory\n\n" + _table([("pictures", "trajectories"), *lengths]),
        f"## Corrections\n\n{corrections_sentence(found)}\n\n"
        + _table([("corrections", "trajectories"), *corrections]),
        f"## Verification examples\n\n{pairs_sentence(found)}\n\n" + _table([("latest image", "examples"), *verdicts]),
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
        text += f" Read by a program, {wrong:,} of their {pictures:,} target images are wrong ({wrong / pictures:.2%})."
    return text


def corrections_sentence(found: Mapping[str, Any]) -> str:
    """The wrong images in what was kept, in a sentence."""
    corrections = found["corrections"]
    return (
        f"{corrections['wrong_images']:,} wrong images are part of the trajectories. {corrections['total']:,} of them "
        "had to be corrected; others, if any, show more of the request than their step asked for. That is "
        f"{corrections['per_trajectory']:.2f} corrections in a trajectory, and {corrections['share']:.1%} of the "
        "trajectories hold at least one."
    )


def pairs_sentence(found: Mapping[str, Any]) -> str:
    """The verification examples in a sentence."""
    verification = found["verification"]
    count = verification["right"] + verification["wrong"]
    return f"{count:,} examples, among them {verification['pairs']:,} counterfactual pairs."


def warning(found: Mapping[str, Any]) -> str | None:
    """What a user must know before training a controller on the dataset, None if there is nothing."""
    if found["corrections"]["total"]:
        return None
    return (
        "warning: the dataset holds no correction. A controller trained on it does not learn to look at images, since "
        "its verdicts follow from the text; make more trajectories, and do not give --synth.no-keep-mistakes"
    )


def usage_rows(found: Mapping[str, Any]) -> list[Row]:
    """A table of what each role cost; columns that are zero everywhere are left out."""
    usage = {**found["usage"], "all": found["total"]}
    columns = [name for name in _USAGE if any(entry.get(name) for entry in usage.values())]
    rows = [(role, *(_number(entry.get(name, 0)) for name in columns)) for role, entry in usage.items()]
    return [("", *(name.replace("_", " ") for name in columns)), *rows]


def _number(value: float) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def _table(rows: Sequence[Row]) -> str:
    head, *body = rows
    if not body:
        return "None."
    rule = "|".join(["---", *("---:" for _ in head[1:])])
    cells = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in body)
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {row} |" for row in cells)])
