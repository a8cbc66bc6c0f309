"""Interfaces of rewards: a judge scores one image, a reward scores a batch.

A score that is missing is NaN, and so is every sum with it: the sample is removed from its group instead of counting as
a bad one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from typing_extensions import override

from clvr_jax.data.trajectories.record import ProxyPrompts
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.image_io import ImageLike
from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.interfaces import ProviderError
from clvr_jax.interfaces.answers import AnswerError


@dataclass(frozen=True)
class RewardInput:
    """An image of the policy and the context to score it by.

    Attributes:
      image: (h, w, 3) uint8.
      proxies: short texts in place of the history.
      references: the images to be edited, one for each of `proxies.i_ref`.
      last_text: the last reply of the controller, the only text that a reward without proxies may use.
    Raises: ClvrError if the numbers of references and of `proxies.i_ref` differ.
    """

    image: ImageLike = field(repr=False)
    proxies: ProxyPrompts
    references: Sequence[ImageLike] = field(default=(), repr=False)
    last_text: str = ""

    def __post_init__(self) -> None:
        if len(self.references) != len(self.proxies.i_ref):
            raise ClvrError(f"reward: {len(self.references)} references for {len(self.proxies.i_ref)} names in i_ref")


Problem = Literal["no_reply", "refused", "unreadable"]


@dataclass(frozen=True)
class Score:
    """A judge's score of one image.

    Attributes:
      value: the score; NaN if there is none.
      parts: components of the score by name, for the metrics.
      problem: why there is no score: the judge gave no reply, refused, or its reply cannot be parsed. None of these
        counts as a low score.
      reason: what is wrong with a reply that cannot be parsed, in one line; "" if nothing is.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    problem: Problem | None = None
    reason: str = ""


UNREADABLE = Score(math.nan)


class ImageJudge(Protocol):
    """Computes R_T2I: how well an image shows a text. It is called from many threads at once."""

    def score_image(self, image: ImageLike, text: str) -> Score:
        """Scores an image.

        Args:
          image: (h, w, 3) uint8, or a PIL image.
          text: what the image should show.
        Raises: ProviderError if the judge cannot be reached.
        """
        ...


class EditJudge(Protocol):
    """Computes R_I2I: how well an image is an edit of another. It is called from many threads at once."""

    def score_edit(self, source: ImageLike, edited: ImageLike, instruction: str) -> Score:
        """Scores an edit.

        Args:
          source: the image before the edit.
          edited: the image after it.
          instruction: the edit instruction.
        Raises: ProviderError if the judge cannot be reached.
        """
        ...


@dataclass(frozen=True)
class Scores:
    """The scores of n inputs.

    Attributes:
      values: (n,) float64, NaN where there is no score.
      parts: components of the scores by name, each (n,), NaN where a score has no such component.
    """

    values: np.ndarray
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {name: part.shape for name, part in self.parts.items() if part.shape != self.values.shape}
        if self.values.ndim != 1 or shapes:
            raise ClvrError(f"scores: values are {self.values.shape}, parts {shapes}; all must be (n,)")

    @classmethod
    def stack(cls, scores: Sequence[Score]) -> "Scores":
        """Returns n scores as arrays; a part that only some of them have is NaN elsewhere.

        If scores are missing, the parts "no_reply", "refused" and "unreadable" are 1 for the inputs with this problem
        and 0 for the others, so that their means in the metrics are shares.
        """
        names = {name: None for one in scores for name in one.parts}
        parts = {name: np.array([one.parts.get(name, math.nan) for one in scores]) for name in names}
        for problem in dict.fromkeys(one.problem for one in scores if one.problem is not None):
            parts[problem] = np.array([float(one.problem == problem) for one in scores])
        return cls(np.array([one.value for one in scores], np.float64), parts)

    @classmethod
    def concatenate(cls, scores: Sequence["Scores"]) -> "Scores":
        """Returns the scores of several batches as one, in order."""
        names = {name: None for one in scores for name in one.parts}
        parts = {
            name: np.concatenate([one.parts.get(name, np.full(len(one.values), math.nan)) for one in scores])
            for name in names
        }
        return cls(np.concatenate([one.values for one in scores]), parts)

    def to_json(self) -> dict[str, JSON]:
        """Returns the scores in types of JSON; NaN as Python writes it."""
        return {"values": self.values.tolist(), "parts": {name: part.tolist() for name, part in self.parts.items()}}

    @classmethod
    def from_json(cls, data: UncheckedJSON) -> "Scores":
        """Returns the scores that `to_json` serialized."""
        parts = {name: np.array(part, np.float64) for name, part in data["parts"].items()}
        return cls(np.array(data["values"], np.float64), parts)

    def scatter(self, mask_n: np.ndarray) -> "Scores":
        """Returns scores of all entries of a mask: these where it is true, NaN elsewhere.

        Args:
          mask_n: (n,) bool, with as many true entries as there are scores.
        """

        def scatter(values: np.ndarray) -> np.ndarray:
            scattered = np.full(len(mask_n), math.nan)
            scattered[mask_n] = values
            return scattered

        return Scores(scatter(self.values), {name: scatter(part) for name, part in self.parts.items()})


def is_single_reply_error(error: ProviderError) -> bool:
    """Returns whether an error concerns a single reply; all other errors would affect the next call, too."""
    return isinstance(error, AnswerError) or error.fault in ("malformed", "refused")


def problem_from_error(error: ProviderError) -> Problem:
    """Returns the problem of a score whose reply failed with an error of `is_single_reply_error`."""
    return "refused" if error.fault == "refused" else "no_reply"


class Reward(Protocol):
    """The objective of a policy.

    Attributes:
      runs_on_devices: the reward runs programs on the training devices. All processes must then call it in their main
        threads, with the same inputs in the same order, and all receive the same scores.
    """

    runs_on_devices: bool = False

    def scores(self, inputs: Sequence[RewardInput]) -> Scores:
        """Returns one score for each input. It may be called from several threads at the same time.

        Raises: ProviderError if a judge cannot be reached (an endpoint that is down, a key that is refused).
        """
        ...


class WeightedReward(Reward):
    """A weighted sum of rewards, NaN where any of them is NaN; the values and parts of each are parts under its name.

    Args:
      rewards: name -> (weight, reward), at least one; weights are finite.
    Raises: UsageError for no rewards, weights that are not finite, or rewards of which only some run on the devices.
    """

    def __init__(self, rewards: Mapping[str, tuple[float, Reward]]):
        if not rewards or not all(math.isfinite(weight) for weight, _ in rewards.values()):
            raise UsageError("WeightedReward: needs at least one reward, and finite weights")
        if len(kinds := {reward.runs_on_devices for _, reward in rewards.values()}) > 1:
            raise UsageError(
                "WeightedReward: rewards that run on the devices are called by all processes, others by one; not mixed"
            )
        self._rewards, self.runs_on_devices = dict(rewards), kinds.pop()

    @override
    def scores(self, inputs: Sequence[RewardInput]) -> Scores:
        values = np.zeros(len(inputs))
        parts: dict[str, np.ndarray] = {}
        for name, (weight, reward) in self._rewards.items():
            found = reward.scores(inputs)
            values = values + weight * found.values
            parts |= {name: found.values, **{f"{name}/{part}": array for part, array in found.parts.items()}}
        return Scores(values, parts)
