"""Exact proxy prompts for trajectories of the shapes world, whatever went wrong in them: a dataset for Proxy Prompt RL.

What the data engine keeps holds no mistakes; a policy that draws such steps is almost always right, and groups of equal
rewards teach nothing. In roll-outs of the oracle (`configs/shapes_rollouts.py`) pictures are what was really drawn.

    python -m clvr_jax.data.shapes_proxies --source runs/shapes_rollouts --out data/shapes_steps
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from clvr_jax.arguments import run_script
from clvr_jax.data.trajectory_dataset import saved_trajectories, write_dataset
from clvr_jax.data.trajectory_record import ProxyPrompts, TrajectoryRecord
from clvr_jax.image_io import pixels
from clvr_jax.worlds.shapes.detect import Reading, detect
from clvr_jax.worlds.shapes.layout import PlannedObject
from clvr_jax.worlds.shapes.oracle import Edit, apply_edits, canvas_text, edit_text, parse_edits


def exact_proxies(canvas: Iterable[PlannedObject], edits: Sequence[Edit], edited: int | None) -> ProxyPrompts:
    """The proxies of a step.

    Args:
      canvas: the objects that there should be after it.
      edits: what it does.
      edited: the step whose picture it edits, None for a first drawing.
    """
    words = canvas_text(canvas)
    return ProxyPrompts(words) if edited is None else ProxyPrompts(words, edit_text(edits), (edited,))


def with_exact_proxies(record: TrajectoryRecord) -> TrajectoryRecord:
    """A record with proxies for every step that drew something that the words of its reply ask for.

    The canvas after a step is what its edits make of the picture before it, read by the detector. Steps that were
    rolled back have none.
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
