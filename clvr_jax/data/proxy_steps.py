"""The steps of trajectories that Proxy Prompt RL draws for: those with proxy prompts, in a mixture of kinds.

In the paper's, half of them are first drawings; of the edits, steps 1, 2, 3 and 4 or later come equally often. What
was rolled back is part of no history. The recorded image of a step itself is never used, so a wrong one is no target;
it is history of the steps that correct it.
Source: arXiv 2605.14876, Proxy Prompt RL.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clvr_jax.data.trajectory_dataset import TrajectoryDataset
from clvr_jax.data.trajectory_record import ProxyPrompts
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.image_io import ImageLike, as_pil, pixels
from clvr_jax.reasoning.context import conditioning_text

LATE = 4
"""Steps from this one on are one kind."""
PAPER_MIXTURE = (0, 1, 0, 2, 0, 3, 0, LATE)


@dataclass(frozen=True)
class ProxyStep:
    """A step to draw for, the key of a group.

    number: among all steps of the dataset that have proxies. record: of the dataset. history: earlier steps of the
    trajectory whose pictures condition the drawing, in order. text: that conditions it, whole, however long it is.
    last_text: what was said last. proxies: the dataset's, None where it has none.
    """

    number: int
    record: int
    history: tuple[int, ...]
    text: str
    last_text: str
    proxies: ProxyPrompts | None

    @property
    def kind(self) -> int:
        """0 for a first drawing, 1 to 3 for an early edit, 4 for a later one."""
        return min(len(self.history), LATE)


class ProxySteps:
    """The steps of a dataset that have proxy prompts: `steps`, those of an epoch, and their pictures.

    Args:
      dataset: of trajectories.
      size: pixels of a side of what is drawn; square pictures of another size are scaled to it.
      mixture: the kinds of steps, in turns; see `ProxyStep.kind`.
      is_live: a teacher writes proxy prompts when they are needed, so every step that drew something is taken.
      max_corrupt: see `TrajectoryDataset.scan`.
    Raises: ClvrError if there is no such step; UsageError for kinds that do not exist.
    """

    def __init__(
        self,
        dataset: TrajectoryDataset,
        size: int,
        mixture: Sequence[int] = PAPER_MIXTURE,
        is_live: bool = False,
        max_corrupt: int = 16,
    ):
        if not mixture or not set(mixture) <= set(range(LATE + 1)):
            raise UsageError(f"mixture {tuple(mixture)}: kinds of steps are 0 (first drawings) to {LATE}, at least one")
        self._dataset, self._size, self._mixture = dataset, size, tuple(mixture)
        steps: list[ProxyStep] = []
        for number, record in dataset.scan(max_corrupt):
            history: tuple[int, ...] = ()
            replies: list[str] = []
            for at, step in enumerate(record.trajectory.steps):
                if step.image is None or step.rolled_back:
                    continue
                replies.append(step.reasoning)
                proxies = record.proxies[at] if record.proxies else None
                if proxies is not None or is_live:
                    text = conditioning_text(record.trajectory.prompt, replies)
                    steps.append(ProxyStep(len(steps), number, history, text, step.reasoning, proxies))
                history = (*history, at)
        if not steps:
            how = "make a dataset that has them with `clvr synth`, or have a teacher write them"
            lack = "drew anything" if is_live else f"has proxy prompts, which the rewards read; {how}"
            raise ClvrError(f"{dataset.folder}: no step of {len(dataset)} trajectories {lack}")
        self.steps = tuple(steps)

    def chosen(self, epoch: int, count: int, seed: int) -> tuple[ProxyStep, ...]:
        """The `count` different steps of an epoch, a function of seed and epoch alone.

        A kind that has too few leaves its place to another, edits to edits first. The mixture goes on where the last
        epoch ended, so it holds over all of them whatever `count` is.

        Raises: UsageError if there are fewer than `count` steps.
        """
        if count > len(self.steps):
            raise UsageError(f"{self._dataset.folder}: {len(self.steps)} steps can be drawn for, {count} are asked for")
        rng = np.random.default_rng((seed, epoch))
        waiting: dict[int, list[ProxyStep]] = defaultdict(list)
        for place in rng.permutation(len(self.steps)):
            waiting[self.steps[place].kind].append(self.steps[place])
        found = []
        for slot in range(epoch * count, (epoch + 1) * count):
            kinds = _in_place_of(self._mixture[slot % len(self._mixture)])
            found.append(next(waiting[kind] for kind in kinds if waiting[kind]).pop())
        return tuple(found)

    def references(self, step: ProxyStep) -> list[np.ndarray]:
        """The pictures that condition the drawing, (size, size, 3) uint8 each."""
        return self._at(step, step.history)

    def prompt(self, step: ProxyStep) -> str:
        """What the step's trajectory is for."""
        return self._dataset[step.record].trajectory.prompt

    def replies(self, step: ProxyStep) -> list[str]:
        """What was said before each picture of the step's history."""
        told = self._dataset[step.record].trajectory.steps
        return [told[place].reasoning for place in step.history]

    def edited(self, step: ProxyStep, proxies: ProxyPrompts) -> list[np.ndarray]:
        """The pictures that the step is to edit, those of I_ref."""
        return self._at(step, proxies.i_ref)

    def _at(self, step: ProxyStep, places: Sequence[int]) -> list[np.ndarray]:
        told = self._dataset[step.record].trajectory.steps
        return [self._scaled(step, told[place].image) for place in places]

    def _scaled(self, step: ProxyStep, picture: ImageLike | None) -> np.ndarray:
        assert picture is not None
        image = as_pil(picture)
        if image.width != image.height:
            raise ClvrError(
                f"{self._dataset.folder}: record {step.record} has pictures of {image.width} x {image.height} pixels; "
                "PPRL draws squares"
            )
        if image.width != self._size:
            image = image.resize((self._size, self._size), Image.Resampling.LANCZOS)
        return pixels(image)


def _in_place_of(kind: int) -> tuple[int, ...]:
    """All kinds, in the order in which they take the place of this one."""
    edits = range(1, LATE + 1)
    return (0, *edits) if kind == 0 else (*edits[kind - 1 :], *edits[: kind - 1], 0)
