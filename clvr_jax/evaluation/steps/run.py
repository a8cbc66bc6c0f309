"""Generates the images of the steps benchmark, and scores them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.steps.scores import StepScore, score_step
from clvr_jax.evaluation.steps.states import State
from clvr_jax.files.image_io import pixels
from clvr_jax.reasoning.conversation.protocols import ImageGenerator
from clvr_jax.reasoning.seeds import derive_seed
from clvr_jax.worlds.shapes.scene import CANVAS


def generate_steps(
    generator: ImageGenerator,
    states: Sequence[State],
    noises: int,
    seed: int = 0,
    batch_size: int = 32,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[list[list[StepScore]], list[list[StepScore]]]:
    """Generates and scores the next image of each state from several noises.

    Noise depends on the seed, the state's number and the noise's, so that all generators start from the same.

    Args:
      generator: is measured.
      states: histories and requests; neighbors of one kind are generated together.
      noises: number of images of each state.
      seed: of the noise.
      batch_size: images that are generated together; it changes only speed and memory.
      on_progress: called with the number of images so far.
    Returns: the scores of the images of each state; and of the same images against the next state of their kind, which
      is the control.
    Raises: ClvrError if the images are not of the shapes world's size.
    """
    requests = [
        (index, state.request(derive_seed(seed, "steps", index, noise)))
        for index, state in enumerate(states)
        for noise in range(noises)
    ]
    other = _next_of_kind(states)
    scores: list[list[StepScore]] = [[] for _ in states]
    control: list[list[StepScore]] = [[] for _ in states]
    for begin in range(0, len(requests), batch_size):
        batch = requests[begin : begin + batch_size]
        outputs = generator.generate([request for _, request in batch])
        for (index, _), output in zip(batch, outputs, strict=True):
            image = pixels(output.image)
            if image.shape != (CANVAS, CANVAS, 3):
                height, width = image.shape[:2]
                raise ClvrError(
                    f"steps benchmark: the generator makes images of {width} x {height} pixels, not of the shapes "
                    f"world ({CANVAS} x {CANVAS}), so the detector cannot score them"
                )
            scores[index].append(score_step(image, states[index]))
            if other[index] != index:
                control[index].append(score_step(image, states[other[index]]))
        if on_progress is not None:
            on_progress(begin + len(batch))
    return scores, [each for each in control if each]


def _next_of_kind(states: Sequence[State]) -> list[int]:
    """Returns for each state the next one of its kind with another prompt, or its own number if there is none."""
    found = []
    for index, state in enumerate(states):
        following = [*range(index + 1, len(states)), *range(index)]
        found.append(
            next(
                (row for row in following if states[row].kind == state.kind and states[row].prompt != state.prompt),
                index,
            )
        )
    return found
