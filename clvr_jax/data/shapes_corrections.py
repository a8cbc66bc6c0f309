"""Training examples of an image generator under its own images: references with its real mistakes, rendered targets.

Simulated trajectories have rendered references. What a generator makes of a request differs from them: edges are soft,
objects are blurred, and deviations add up from image to image. After four such references, a model that was trained on
renderings alone changes objects that no edit names. Here the references are images of rollouts
(`scripts/shapes_rollouts.py`), and the target shows what the reply requested: the mistakes are context, never targets.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from clvr_jax.data.preprocessing.histories import fit_history
from clvr_jax.data.shapes import Example, Image
from clvr_jax.data.trajectories.record import TrajectoryRecord
from clvr_jax.errors import ClvrError
from clvr_jax.files.image_io import pixels
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.worlds.shapes.detect import Reading, detect
from clvr_jax.worlds.shapes.oracle import Edit, edited_scene, parse_edits
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.scene import CANVAS, Scene, SceneObject, cell_pixels


def requested_image(before: Image | None, edits: Sequence[Edit], rng: np.random.Generator) -> Image:
    """Renders what an image must show after perfect edits.

    Clear objects of the image are rendered where the detector found them; unclear cells that no edit names keep their
    pixels.

    Args:
      before: image to be edited, uint8 (64, 64, 3); None is the empty canvas.
      edits: the edits.
      rng: samples positions and sizes of objects in empty cells.
    Returns: uint8 (64, 64, 3).
    """
    reading = Reading() if before is None else detect(before)
    scene = Scene(
        tuple(SceneObject(each.color, each.shape, each.cell, each.x, each.y, each.radius) for each in reading.objects)
    )
    image = render(edited_scene(scene, edits, rng))
    if before is not None:
        for cell in set(reading.unclear) - {edit.cell for edit in edits}:
            image[cell_pixels(cell)] = before[cell_pixels(cell)]
    return image


def rollout_examples(records: Iterable[TrajectoryRecord], tokenizer: Tokenizer, max_tokens: int) -> list[Example]:
    """Returns an example for each image of the trajectories whose reply requests edits.

    Histories that are too long for the generator lose their oldest replies, as when it is used. Positions of new
    objects are sampled once, with a seed of the trajectory's number and the step.

    Args:
      records: trajectories of the oracle; steps that were rolled back are left out.
      tokenizer: tokenizer of the text encoder.
      max_tokens: number of tokens that the generator reads at most.
    Raises: ClvrError, one line, for an image of another size, and if no reply requests edits.
    """
    examples = []
    for number, record in enumerate(records):
        replies: list[str] = []
        images: list[Image] = []
        for step in record.trajectory.steps:
            if step.image is None or step.rolled_back:
                continue
            replies.append(step.reasoning)
            if edits := parse_edits(step.reasoning):
                text = fit_history(tokenizer, record.trajectory.prompt, replies, max_tokens).text
                rng = np.random.default_rng((number, len(images)))
                target = requested_image(images[-1] if images else None, edits, rng)
                examples.append(Example(text, tuple(images), target))
            image = pixels(step.image)
            if image.shape != (CANVAS, CANVAS, 3):
                height, width = image.shape[:2]
                raise ClvrError(
                    f"trajectory {record.id}: an image of {width} x {height} pixels, not of {CANVAS} x {CANVAS}; "
                    "make the trajectories with clvr_jax.scripts.shapes_rollouts"
                )
            images.append(image)
    if not examples:
        raise ClvrError(
            "the trajectories request no edit of the shapes world; make them with clvr_jax.scripts.shapes_rollouts"
        )
    return examples
