"""Exact proxy prompts for trajectories of the shapes world with mistakes: a dataset for Proxy Prompt RL.

The targets of the data engine have no mistakes. A policy is almost always right on such steps, and groups with equal
rewards have no gradient. Rollouts of the oracle (`scripts/shapes_rollouts.py`) have the images that a model generated.

    python -m clvr_jax.data.shapes_proxies --source runs/shapes_rollouts --out data/shapes_steps
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from clvr_jax.arguments import run_script
from clvr_jax.data.trajectories.dataset import saved_trajectories, write_dataset
from clvr_jax.data.trajectories.record import ProxyPrompts, TrajectoryRecord
from clvr_jax.files.image_io import pixels
from clvr_jax.worlds.shapes.detect import Reading, detect
from clvr_jax.worlds.shapes.layout import PlannedObject
from clvr_jax.worlds.shapes.oracle import Edit, apply_edits, canvas_text, edit_text, parse_edits


def exact_proxies(canvas: Iterable[PlannedObject], edits: Sequence[Edit], edited: int | None) -> ProxyPrompts:
    """Returns the proxy prompts of a step.

    Args:
      canvas: the objects that the image should show after the step.
      edits: the edits of the step.
      edited: index of the step whose image is edited, None for a first image.
    """
    words = canvas_text(canvas)
    return ProxyPrompts(words) if edited is None else ProxyPrompts(words, edit_text(edits), (edited,))


def with_exact_proxies(record: TrajectoryRecord) -> TrajectoryRecord:
    """Returns a record with proxy prompts for each step that has an image and whose reply requests edits.

    The canvas after a step is the previous image, as the detector reads it, after the step's edits. Steps that were
    rolled back have no proxy prompts.
    """
    latest: int | None = None
    before = Reading()
    found: list[ProxyPrompts | None] = []
    for number, step in enumerate(record.trajectory.steps):
        if step.image is None or step.rolled_back:
            found.append(None)
            continue
        edits = parse_edits(step.reasoning)
        found.append(exact_proxies(apply_edits(before, edits), edits, latest) if edits else None)
        latest, before = number, detect(pixels(step.image))
    return dataclasses.replace(record, proxies=tuple(found))


def main(source: Path, out: Path) -> None:
    """Packs saved trajectories of the shapes world into a dataset, with exact proxy prompts.

    Args:
      source: Directory that contains the saved trajectories.
      out: Write the dataset to this directory.
    """
    print(f"{out}: {write_dataset(out, map(with_exact_proxies, saved_trajectories(source))):,} trajectories")


if __name__ == "__main__":
    run_script(main)
