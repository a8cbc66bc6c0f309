"""The statistics of a run for readers: an HTML page without scripts, and the dataset card."""

from collections.abc import Sequence

from clvr_jax.data.engine.reporting.statistics import STAGE_NAMES
from clvr_jax.data.trajectories.record import SCHEMA
from clvr_jax.display.html_pages import render_page
from clvr_jax.files.json_input import UncheckedJSON

Row = tuple[str, ...]
_VERDICTS = (("latest image right", "right"), ("latest image wrong", "wrong"))
_USAGE = ("calls", "retries", "input_tokens", "output_tokens", "pictures", "nfe", "seconds", "dollars")


def statistics_page(found: UncheckedJSON) -> str:
    """Renders statistics.json as an HTML page; all text of models and users is escaped."""
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
        lengths=[(f"{steps} images", count) for steps, count in found["steps"].items()],
        by_number=[(f"{number} corrections", count) for number, count in found["corrections"]["by_number"].items()],
        verdicts=[(name, verification[key]) for name, key in _VERDICTS],
        usage=usage_rows(found),
        examples=[
            ("reason", "example"),
            *((reason, example) for reason, entry in discarded for example in entry["examples"]),
        ],
    )


def dataset_card(found: UncheckedJSON) -> str:
    """Writes dataset_card.md: the content of the dataset, how it was made, and how to read it."""
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
    verified = "Every image was verified with it; the" if found["verified"] else "Images were not verified; the"
    sections = [
        "---\ntags: [text-to-image, image-editing, reasoning, clvr-jax]\n---",
        f"# {found['recipe']}: verified trajectories",
        found["description"],
        headline(found),
        "A record has a prompt, the steps that led to its image (reasoning, action, image, verdict, the checklist of "
        "the image, proxy prompts for reward models), and the outcome. "
        f"{verified} result was accepted by a final validation and preferred to a one-shot image.",
        "The dataset contains wrong images as context: the field `run` of their step has `is_mistake` true. Never use "
        "them as targets of an image generator. The reply after a wrong image, a verdict and a correction, is a target "
        "of the controller.",
        "The split `verification` has examples for the controller only: a history, its latest image, and the verdict "
        "on that image. A pair is one history with a wrong and with a right image; its ids end in `-wrong` and "
        "`-right`. No image of this split is a target of an image generator.",
        "## How to read the dataset\n\n```python\nimport tensorflow_datasets as tfds\n\n"
        'builder = tfds.builder_from_directory("dataset")\n'
        'trajectories = builder.as_data_source("train")\n'
        'examples = builder.as_data_source("verification")  # if there are any\n'
        "```\n\nor `clvr_jax.data.trajectories.dataset.TrajectoryDataset`. "
        f"Schema {SCHEMA}; images are PNG files. `clvr train` reads the directory directly.",
        "## Stages that prompts reached\n\n" + _table([("", "prompts", "share"), *stages]),
        "## Reasons for discarded prompts\n\n" + _table([("", "prompts", "share"), *discarded, *refused]),
        "## Images per trajectory\n\n" + _table([("images", "trajectories"), *lengths]),
        f"## Corrections\n\n{corrections_sentence(found)}\n\n"
        + _table([("corrections", "trajectories"), *corrections]),
        f"## Verification examples\n\n{pairs_sentence(found)}\n\n" + _table([("latest image", "examples"), *verdicts]),
        "## Usage\n\n" + _table(usage_rows(found)),
        "## Limits\n\nThe models that generated the dataset may have biases and licenses, which also apply to models "
        "trained on it. Prompts equal or similar to evaluation prompts known to the recipe were left out.",
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def headline(found: UncheckedJSON) -> str:
    """Returns the result in one or two sentences."""
    share = found["trajectories"] / max(found["prompts"], 1)
    text = f"{found['trajectories']:,} trajectories of {found['prompts']:,} prompts ({share:.1%})."
    if audit := found["audit"]:
        wrong, images = audit["wrong"], audit["pictures"]
        text += f" By an exact check, {wrong:,} of their {images:,} target images are wrong ({wrong / images:.2%})."
    return text


def corrections_sentence(found: UncheckedJSON) -> str:
    """Returns sentences about the wrong images and corrections in the dataset."""
    corrections = found["corrections"]
    return (
        f"{corrections['wrong_images']:,} wrong images are part of the trajectories. {corrections['total']:,} of them "
        "had to be corrected; others, if any, show more of the request than their step required. There are "
        f"{corrections['per_trajectory']:.2f} corrections per trajectory, and {corrections['share']:.1%} of the "
        "trajectories have at least one."
    )


def pairs_sentence(found: UncheckedJSON) -> str:
    """Returns a sentence about the verification examples."""
    verification = found["verification"]
    count = verification["right"] + verification["wrong"]
    return f"{count:,} examples, among them {verification['pairs']:,} counterfactual pairs."


def warning(found: UncheckedJSON) -> str | None:
    """Returns a warning for users who train a controller on the dataset, None if there is no reason for one."""
    if found["corrections"]["total"]:
        return None
    return (
        "warning: the dataset has no correction. A controller trained on it does not learn to inspect images, since "
        "its verdicts follow from the text; make more trajectories, and do not use --synth.no-keep-mistakes"
    )


def usage_rows(found: UncheckedJSON) -> list[Row]:
    """Returns a table of the usage of each role; columns of zeros are left out."""
    usage = {**found["usage"], "all": found["total"]}
    columns = [name for name in _USAGE if any(entry.get(name) for entry in usage.values())]
    rows = [(role, *(_number(entry.get(name, 0)) for name in columns)) for role, entry in usage.items()]
    names = ("images" if name == "pictures" else name.replace("_", " ") for name in columns)
    return [("", *names), *rows]


def _number(value: float) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def _table(rows: Sequence[Row]) -> str:
    head, *body = rows
    if not body:
        return "None."
    rule = "|".join(["---", *("---:" for _ in head[1:])])
    cells = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in body)
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {row} |" for row in cells)])
