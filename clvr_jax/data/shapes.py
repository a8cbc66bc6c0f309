"""Training examples of the shapes world: generation, editing, and whole trajectories of the oracle."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from clvr_jax.reasoning.conversation.context import conditioning_text
from clvr_jax.worlds.shapes.detect import DetectedObject, Reading
from clvr_jax.worlds.shapes.layout import PlannedObject, plan
from clvr_jax.worlds.shapes.metadata import Metadata
from clvr_jax.worlds.shapes.oracle import (
    MAX_EDITS,
    Edit,
    compare,
    edit_text,
    edited_scene,
    first_edits,
    first_reply,
    next_reply,
)
from clvr_jax.worlds.shapes.prompts import train_prompt
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.scene import (
    CELLS,
    Scene,
    SceneObject,
    cell_center,
    cell_pixels,
    place,
    reading_order,
    sample_pair,
)

Image = np.ndarray
"""uint8 (64, 64, 3)."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A training example of an image generator: conditioning text, reference images, and the target image."""

    text: str
    references: tuple[Image, ...]
    target: Image


@dataclasses.dataclass(frozen=True)
class Canvas:
    """An image with known content.

    Attributes:
      scene: the objects.
      smudges: cells that show something unclear.
      seed: seed of the pixels of unclear cells.
    """

    scene: Scene
    smudges: tuple[str, ...] = ()
    seed: int = 0

    def render(self) -> Image:
        """Renders the image, uint8 (64, 64, 3); equal canvases have equal pixels."""
        image = render(self.scene)
        for cell in self.smudges:
            image = _smudged(image, cell, np.random.default_rng((self.seed, CELLS.index(cell))))
        return image

    def reading(self) -> Reading:
        """Returns the reading of a perfect detector."""
        objects = {item.cell: item for item in self.scene.objects}
        found = tuple(
            DetectedObject(item.color, item.shape, cell, item.x, item.y, item.radius)
            for cell in reading_order(objects)
            for item in (objects[cell],)
        )
        return Reading(found, tuple(reading_order(self.smudges)))


@dataclasses.dataclass(frozen=True)
class ShapesTrajectory:
    """A trajectory of the oracle with an image generator that may make mistakes.

    Attributes:
      prompt: the prompt.
      replies: r_1 .. r_n; the last one terminates, unless the maximum number of steps was reached.
      canvases: the images after each of the first n - 1 replies.
      targets: the images that these replies requested.
    """

    prompt: str
    replies: tuple[str, ...]
    canvases: tuple[Image, ...]
    targets: tuple[Image, ...]

    def example(self, step: int) -> Example:
        """Returns the example of step `step`, from 0, conditioned on all previous steps."""
        text = conditioning_text(self.prompt, self.replies[: step + 1])
        return Example(text, self.canvases[:step], self.targets[step])


def _smudged(image: Image, cell: str, rng: np.random.Generator) -> Image:
    """Renders something unclear into a cell: halves of two objects, or a blend of two."""
    pairs = [sample_pair(rng), sample_pair(rng)]
    while pairs[0][1] == pairs[1][1]:  # a blend of a red and a blue star would be a clear purple star
        pairs[1] = sample_pair(rng)
    first, second = (render(Scene((place(*pair, cell, rng),))) for pair in pairs)
    x, y = cell_center(cell)
    kind = rng.random()
    if kind < 0.5:
        mixed = first.copy()
        if rng.random() < 0.5:
            mixed[round(y) :] = second[round(y) :]
        else:
            mixed[:, round(x) :] = second[:, round(x) :]
    else:
        share = rng.uniform(0.3, 0.7)
        mixed = np.round(share * first + (1 - share) * second).astype(np.uint8)
    pixels = cell_pixels(cell)
    image[pixels] = mixed[pixels]
    return image


def generation_example(rng: np.random.Generator, weights: dict[str, float] | None = None) -> Example:
    """Samples an example of text-to-image generation: a training prompt and an image that satisfies it.

    Cells and colors that the prompt leaves open are those of the canonical plan: a small transformer that must choose
    among nine places and eight colors generates blends of them at first.
    """
    metadata = train_prompt(rng, weights)
    return Example(metadata["prompt"], (), render(_scene(plan(metadata), rng)))


def planned_example(rng: np.random.Generator) -> Example:
    """Samples an example of text-to-image generation in the words of a first step: one to three objects with places."""
    planned = tuple(
        PlannedObject(*sample_pair(rng), CELLS[cell]) for cell in rng.permutation(len(CELLS))[: rng.integers(1, 4)]
    )
    text = edit_text(first_edits(planned, len(planned)), first=True)
    return Example(text, (), render(_scene(planned, rng)))


def editing_example(rng: np.random.Generator) -> Example:
    """Samples an example of editing: one or two edits of an image, in which everything else stays equal."""
    planned = plan(train_prompt(rng, {"complex": 0.7, "counting": 0.15, "color_attr": 0.15}), rng)
    while True:
        start = Canvas(_scene([item for item in planned if rng.random() < 0.6], rng))
        canvas = corrupted_canvas(start, rng, errors=int(rng.integers(0, 3)), cells=CELLS)
        options = compare(planned, canvas.reading()).edits
        if options:
            break
    chosen = [options[i] for i in sorted(rng.permutation(len(options))[: int(rng.integers(1, MAX_EDITS + 1))])]
    return Example(edit_text(chosen), (canvas.render(),), _edited(canvas, chosen, rng).render())


def continued_example(rng: np.random.Generator) -> Example:
    """Samples an example with the text of a whole conversation and its latest image as the only reference."""
    while True:
        trajectory = simulate_trajectory(rng)
        if len(trajectory.canvases) > 1:
            example = trajectory.example(int(rng.integers(1, len(trajectory.canvases))))
            return dataclasses.replace(example, references=example.references[-1:])


def simulate_trajectory(
    rng: np.random.Generator,
    metadata: Metadata | None = None,
    *,
    error_rate: float = 0.3,
    random_plan: bool = True,
    max_steps: int = 8,
    misread_rate: float = 0.0,
) -> ShapesTrajectory:
    """Simulates the oracle with a generator that makes a mistake with probability `error_rate`.

    Args:
      rng: numpy generator.
      metadata: metadata of the prompt; None samples a training prompt.
      error_rate: share of steps whose image is not what was requested.
      random_plan: sample a random plan that satisfies the prompt instead of the canonical one.
      max_steps: maximum number of images; a trajectory that reaches it ends without a terminating reply.
      misread_rate: share of the replies to images that are based on a wrong reading, as those of a controller that
        makes mistakes.
    """
    metadata = train_prompt(rng) if metadata is None else metadata
    planned = plan(metadata, rng if random_plan else None)
    replies = [first_reply(planned)]
    canvases: list[Image] = []
    targets: list[Image] = []
    edits = first_edits(planned)
    canvas = Canvas(Scene())
    while edits and len(canvases) < max_steps:
        perfect = canvas = _edited(canvas, edits, rng)
        if rng.random() < error_rate:
            touched = tuple(edit.cell for edit in edits) if rng.random() < 0.7 else CELLS
            canvas = corrupted_canvas(perfect, rng, errors=1 + int(rng.random() < 0.2), cells=touched)
        targets.append(perfect.render())
        canvases.append(canvas.render())
        reading = canvas.reading()
        if misread_rate and rng.random() < misread_rate:
            misread = _misread(canvas, planned, rng)
            # A wrong reading never ends the trajectory, so that whatever follows can be corrected.
            reading = misread if compare(planned, reading).edits and compare(planned, misread).edits else reading
        replies.append(next_reply(planned, reading))
        edits = compare(planned, reading).edits[:MAX_EDITS]
    return ShapesTrajectory(metadata["prompt"], tuple(replies), tuple(canvases), tuple(targets))


def _misread(canvas: Canvas, planned: Sequence[PlannedObject], rng: np.random.Generator) -> Reading:
    """Samples a wrong reading, in which one cell shows what the plan requires there, or something else."""
    if rng.random() < 0.5:
        item = planned[int(rng.integers(len(planned)))]
        objects = {each.cell: each for each in canvas.scene.objects}
        objects[item.cell] = place(item.color, item.shape, item.cell, rng)
        smudges = tuple(cell for cell in canvas.smudges if cell != item.cell)
        return Canvas(Scene(tuple(objects.values())), smudges).reading()
    return corrupted_canvas(canvas, rng, 1, CELLS).reading()


def _scene(planned: list[PlannedObject] | tuple[PlannedObject, ...], rng: np.random.Generator) -> Scene:
    return Scene(tuple(place(item.color, item.shape, item.cell, rng) for item in planned))


def _edited(canvas: Canvas, edits: Sequence[Edit], rng: np.random.Generator) -> Canvas:
    """Returns the canvas after perfect edits. Unclear cells that no edit names stay."""
    touched = {edit.cell for edit in edits}
    smudges = tuple(cell for cell in canvas.smudges if cell not in touched)
    return Canvas(edited_scene(canvas.scene, edits, rng), smudges, canvas.seed)


def corrupted_canvas(canvas: Canvas, rng: np.random.Generator, errors: int, cells: tuple[str, ...]) -> Canvas:
    """Returns the canvas with simulated mistakes of a diffusion model.

    Args:
      canvas: the canvas.
      rng: samples the mistakes.
      errors: number of mistakes, each in a different cell; at most the number of cells.
      cells: the cells in which mistakes may occur.
    """
    objects = {item.cell: item for item in canvas.scene.objects}
    smudges = set(canvas.smudges)
    for cell in (cells[i] for i in rng.permutation(len(cells))[:errors]):
        corruption = _CORRUPTIONS[int(rng.integers(len(_CORRUPTIONS)))]
        smudges.discard(cell)
        item = corruption(objects.pop(cell, None), cell, rng)
        if item is not None:
            objects[cell] = item
        elif corruption is _smudge:
            smudges.add(cell)
    return Canvas(Scene(tuple(objects.values())), tuple(reading_order(smudges)), int(rng.integers(2**31)))


Corruption = Callable[[SceneObject | None, str, np.random.Generator], SceneObject | None]


def _drop(item: SceneObject | None, cell: str, rng: np.random.Generator) -> None:
    return None


def _smudge(item: SceneObject | None, cell: str, rng: np.random.Generator) -> None:
    return None


def _other(item: SceneObject | None, cell: str, rng: np.random.Generator) -> SceneObject:
    return place(*sample_pair(rng), cell, rng)


def _recolored(item: SceneObject | None, cell: str, rng: np.random.Generator) -> SceneObject:
    if item is None:
        return _other(item, cell, rng)
    while True:
        color, shape = sample_pair(rng)
        if shape == item.shape:
            return dataclasses.replace(item, color=color)


def _reshaped(item: SceneObject | None, cell: str, rng: np.random.Generator) -> SceneObject:
    if item is None:
        return _other(item, cell, rng)
    while True:
        color, shape = sample_pair(rng)
        if color == item.color:
            return dataclasses.replace(item, shape=shape)


_CORRUPTIONS: tuple[Corruption, ...] = (_drop, _smudge, _other, _recolored, _reshaped)
