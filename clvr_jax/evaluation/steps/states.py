"""The states of the steps benchmark: histories of the shapes world whose next image is to be generated.

The oracle plans and requests, so that every request is exact. The images of a history are either renderings, with
simulated mistakes, or those of a generator, with its own. The prompts are those of the verifier benchmark, of which
none is an evaluation prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest

import numpy as np

from clvr_jax.data.shapes import simulate_trajectory
from clvr_jax.evaluation.systems.models import Oracle
from clvr_jax.evaluation.verifier.cases import ShapesPrompt, sample_prompts
from clvr_jax.files.image_io import pixels
from clvr_jax.reasoning.conversation.protocols import GenerationRequest, ImageGenerator
from clvr_jax.reasoning.loop import loop
from clvr_jax.reasoning.loop.budget import Budget
from clvr_jax.reasoning.seeds import derive_seed
from clvr_jax.worlds.shapes.layout import PlannedObject
from clvr_jax.worlds.shapes.oracle import Edit, parse_edits, parse_plan

KINDS = ("first", "edit 1", "edit 2", "edit 3", "later")
"""Kinds of steps, by the number of references; "later" has four or more."""


@dataclass(frozen=True)
class State:
    """A history and the request for its next image.

    Attributes:
      prompt: the prompt.
      replies: of the oracle, oldest first; the last one requests the edits.
      images: the references, uint8 (64, 64, 3), oldest first.
      objects: number of objects that the prompt asks for.
      has_held_out: whether it names a pair of color and shape that no training data combine.
    """

    prompt: str
    replies: tuple[str, ...]
    images: tuple[np.ndarray, ...] = field(repr=False, compare=False)
    objects: int
    has_held_out: bool

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return KINDS[min(len(self.images), len(KINDS) - 1)]

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits that the last reply requests."""
        return parse_edits(self.replies[-1])

    @property
    def plan(self) -> tuple[PlannedObject, ...]:
        """The plan of the first reply."""
        return parse_plan(self.replies[0])

    def request(self, seed: int) -> GenerationRequest:
        """Returns the request with a seed of the noise."""
        return GenerationRequest(self.prompt, self.replies, self.images, seed)


def rendered_states(count: int, seed: int = 0) -> list[State]:
    """Returns states whose references are renderings; six of ten have a simulated mistake.

    Args:
      count: number of states.
      seed: the same seed gives the same states.
    """
    states = []
    for index, prompt in enumerate(sample_prompts(count, seed)):
        rng = np.random.default_rng((seed, index))
        simulated = simulate_trajectory(rng, prompt.metadata, error_rate=0.6)
        states += _of_history(prompt, simulated.replies, simulated.canvases)
    return _balanced(states, count)


def rollout_states(
    generator: ImageGenerator,
    count: int,
    seed: int = 0,
    batch_size: int = 32,
    on_progress: Callable[[int], None] | None = None,
) -> list[State]:
    """Returns states whose references are images of a generator, from loops with the oracle as controller.

    Args:
      generator: generates the references.
      count: number of states.
      seed: the same seed and generator give the same states.
      batch_size: loops that run together; it changes only speed and memory.
      on_progress: called with the number of loops so far.
    """
    states, prompts = [], sample_prompts(num_loops(count), seed)
    for begin in range(0, len(prompts), batch_size):
        batch = prompts[begin : begin + batch_size]
        trajectories = loop.run(
            [each.metadata["prompt"] for each in batch],
            Oracle([each.metadata for each in batch]),
            generator,
            Budget(max_rollbacks=0),
            [derive_seed(seed, "steps", each.metadata["prompt"]) for each in batch],
        )
        for prompt, trajectory in zip(batch, trajectories, strict=True):
            images = [pixels(step.image) for step in trajectory.steps if step.image is not None]
            states += _of_history(prompt, [step.reasoning for step in trajectory.steps], images)
        if on_progress is not None:
            on_progress(begin + len(batch))
    return _balanced(states, count)


def fingerprint(states: Iterable[State]) -> str:
    """Returns a fingerprint of states; results can be paired only if theirs is the same."""
    found = hashlib.blake2b(digest_size=8)
    for state in states:
        for text in (state.prompt, *state.replies):
            found.update(text.encode() + b"\0")
        for image in state.images:
            found.update(np.ascontiguousarray(image).tobytes())
    return found.hexdigest()


def num_loops(count: int) -> int:
    """Returns the number of loops for `count` states: half as many, since each has several steps."""
    return max(count // 2, 4)


def _of_history(prompt: ShapesPrompt, replies: Sequence[str], images: Sequence[np.ndarray]) -> list[State]:
    """Returns the states of a trajectory; a reply that requests no edit ends it."""
    return [
        State(prompt.metadata["prompt"], tuple(replies[: step + 1]), tuple(images[:step]), objects, held_out)
        for objects, held_out in [(sum(each["count"] for each in prompt.metadata["include"]), prompt.has_held_out)]
        for step in range(min(len(replies), len(images) + 1))
        if parse_edits(replies[step])
    ]


def _balanced(states: Sequence[State], count: int) -> list[State]:
    """Returns at most `count` states, taken from the kinds in turn, in the order of their kinds."""
    kinds = [[state for state in states if state.kind == kind] for kind in KINDS]
    in_turn = [state for state in chain.from_iterable(zip_longest(*kinds)) if state is not None]
    return sorted(in_turn[:count], key=lambda state: KINDS.index(state.kind))
