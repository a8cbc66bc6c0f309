"""The trajectory steps for which Proxy Prompt RL generates images: those with proxy prompts, in a mixture of kinds.

In the paper's mixture, half of the steps are first images; of the edits, steps 1, 2, 3 and 4 or later are equally
frequent. Steps that were rolled back are part of no history. The recorded image of a step itself is not used, so a
wrong image is never a target, but it is part of the history of the steps that correct it.
Source: arXiv 2605.14876, Proxy Prompt RL.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clvr_jax.data.trajectories.dataset import TrajectoryDataset
from clvr_jax.data.trajectories.record import ProxyPrompts
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.image_io import ImageLike, as_pil, pixels
from clvr_jax.reasoning.conversation.context import conditioning_text

LATE = 4
"""The kind of this step and of all later ones."""
PAPER_MIXTURE = (0, 1, 0, 2, 0, 3, 0, LATE)


@dataclass(frozen=True)
class ProxyStep:
    """A step for which a group of images is generated.

    Attributes:
      number: index among all steps of `ProxySteps`.
      record: index of its record in the dataset.
      history: indices of the earlier steps of the trajectory whose images condition the generation, in order.
      text: the conditioning text, not truncated.
      last_text: the last reply.
      proxies: the proxy prompts of the dataset, None without them.
    """

    number: int
    record: int
    history: tuple[int, ...]
    text: str
    last_text: str
    proxies: ProxyPrompts | None

    @property
    def kind(self) -> int:
        """0 for a first image, 1 to 3 for an early edit, 4 for a later one."""
        return min(len(self.history), LATE)


class ProxySteps:
    """The steps of a dataset that have proxy prompts.

    Attributes:
      steps: all of them, in order.

    Args:
      dataset: the trajectories.
      size: side of the generated images in pixels; recorded square images of another size are scaled to it.
      mixture: kinds of steps, which alternate in this order; see `ProxyStep.kind`.
      is_live: a proxy-prompt generator writes proxy prompts during training, so all steps with an image are included.
      max_corrupt: see `TrajectoryDataset.scan`.
      first_images_only: leave out edits, for a model that is conditioned on text alone.
    Raises: ClvrError if there is no such step; UsageError for kinds that do not exist.
    """

    def __init__(
        self,
        dataset: TrajectoryDataset,
        size: int,
        mixture: Sequence[int] = PAPER_MIXTURE,
        is_live: bool = False,
        max_corrupt: int = 16,
        first_images_only: bool = False,
    ):
        if not mixture or not set(mixture) <= set(range(LATE + 1)):
            raise UsageError(f"mixture {tuple(mixture)}: kinds of steps are 0 (first images) to {LATE}, at least one")
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
                if (proxies is not None or is_live) and not (first_images_only and history):
                    text = conditioning_text(record.trajectory.prompt, replies)
                    steps.append(ProxyStep(len(steps), number, history, text, step.reasoning, proxies))
                history = (*history, at)
        if not steps:
            how = "make a dataset that has them with `clvr synth`, or use a proxy-prompt generator"
            lack = "has an image" if is_live else f"has proxy prompts, which the rewards read; {how}"
            raise ClvrError(f"{dataset.directory}: no step of {len(dataset)} trajectories {lack}")
        self.steps = tuple(steps)

    def sample(self, epoch: int, count: int, seed: int) -> tuple[ProxyStep, ...]:
        """Samples `count` different steps for an epoch, as a function of seed and epoch.

        If a kind has too few steps, another kind takes its place; for an edit, other edits come first. The mixture
        continues from one epoch to the next, so that it is exact over many epochs for any `count`.

        Raises: UsageError if there are fewer than `count` steps.
        """
        if count > len(self.steps):
            raise UsageError(f"{self._dataset.directory}: {len(self.steps)} steps can be used, {count} are requested")
        rng = np.random.default_rng((seed, epoch))
        waiting: dict[int, list[ProxyStep]] = defaultdict(list)
        for index in rng.permutation(len(self.steps)):
            waiting[self.steps[index].kind].append(self.steps[index])
        found = []
        for slot in range(epoch * count, (epoch + 1) * count):
            kinds = _substitutes(self._mixture[slot % len(self._mixture)])
            found.append(next(waiting[kind] for kind in kinds if waiting[kind]).pop())
        return tuple(found)

    def references(self, step: ProxyStep) -> list[np.ndarray]:
        """Returns the images that condition the generation, (size, size, 3) uint8 each."""
        return self._at(step, step.history)

    def prompt(self, step: ProxyStep) -> str:
        """Returns the prompt of the step's trajectory."""
        return self._dataset[step.record].trajectory.prompt

    def replies(self, step: ProxyStep) -> list[str]:
        """Returns the reply before each image of the step's history."""
        recorded = self._dataset[step.record].trajectory.steps
        return [recorded[index].reasoning for index in step.history]

    def sources(self, step: ProxyStep, proxies: ProxyPrompts) -> list[np.ndarray]:
        """Returns the images that the step edits, those of I_ref, (size, size, 3) uint8 each."""
        return self._at(step, proxies.i_ref)

    def _at(self, step: ProxyStep, indices: Sequence[int]) -> list[np.ndarray]:
        recorded = self._dataset[step.record].trajectory.steps
        return [self._scaled(step, recorded[index].image) for index in indices]

    def _scaled(self, step: ProxyStep, recorded: ImageLike | None) -> np.ndarray:
        assert recorded is not None
        image = as_pil(recorded)
        if image.width != image.height:
            raise ClvrError(
                f"{self._dataset.directory}: record {step.record} has images of {image.width} x {image.height} pixels; "
                "PPRL needs square images"
            )
        if image.width != self._size:
            image = image.resize((self._size, self._size), Image.Resampling.LANCZOS)
        return pixels(image)


def _substitutes(kind: int) -> tuple[int, ...]:
    """Returns all kinds in the order in which they are tried for this one."""
    edits = range(1, LATE + 1)
    return (0, *edits) if kind == 0 else (*edits[kind - 1 :], *edits[: kind - 1], 0)
