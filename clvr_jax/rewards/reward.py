"""The protocols: judges mark one picture, rewards score a batch of them.

What cannot be scored is NaN and stays NaN through every sum: such a sample leaves its group, it is not a bad one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from clvr_jax.data.trajectory_record import ProxyPrompts
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.image_io import ImageLike
from clvr_jax.interfaces import ProviderError
from clvr_jax.reasoning.answers import AnswerError


@dataclass(frozen=True)
class Case:
    """A picture that a policy drew, and what there is to judge it by.

    picture: (h, w, 3) uint8. proxies: short texts that stand for the history. references: the pictures that were to be
    edited, one for each of `proxies.i_ref`. last_text: what the controller said last, all that a reward without proxies
    may read.
    """

    picture: ImageLike = field(repr=False)
    proxies: ProxyPrompts
    references: Sequence[ImageLike] = field(default=(), repr=False)
    last_text: str = ""

    def __post_init__(self) -> None:
        if len(self.references) != len(self.proxies.i_ref):
            raise ClvrError(f"reward: {len(self.references)} references for {len(self.proxies.i_ref)} names in i_ref")


Problem = Literal["no_reply", "refused", "unreadable"]


@dataclass(frozen=True)
class Marks:
    """A judge's mark of one picture, NaN if there is none; and what it is made of, by name.

    problem: why there is none: the judge gave no reply, refused, or gave a reply that cannot be read. None of these is
    a bad mark.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    problem: Problem | None = None


UNREADABLE = Marks(math.nan)


class PictureJudge(Protocol):
    """R_T2I: how well a picture shows a text. Called from many threads at once."""

    def picture(self, picture: ImageLike, text: str) -> Marks:
        """Its mark. Raises: ProviderError if the judge cannot be asked at all."""
        ...


class EditJudge(Protocol):
    """R_I2I: how well a picture is an edit of another. Called from many threads at once."""

    def edit(self, source: ImageLike, edited: ImageLike, instruction: str) -> Marks:
        """Its mark. Raises: ProviderError if the judge cannot be asked at all."""
        ...


@dataclass(frozen=True)
class Scores:
    """Of n cases. values: (n,) float64, NaN where there is none. parts: what they are made of, each (n,), NaN where it
    has no say."""

    values: np.ndarray
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {name: part.shape for name, part in self.parts.items() if part.shape != self.values.shape}
        if self.values.ndim != 1 or shapes:
            raise ClvrError(f"scores: values are {self.values.shape}, parts {shapes}; all must be (n,)")

    @classmethod
    def of(cls, marks: Sequence[Marks]) -> "Scores":
        """Marks as arrays; a part that only some have is NaN elsewhere.

        Where marks are missing, the parts "no_reply", "refused" and "unreadable" are 1 for the cases they hold
        for, else 0: their means in the metrics are shares.
        """
        names = {name: None for one in marks for name in one.parts}
        parts = {name: np.array([one.parts.get(name, math.nan) for one in marks]) for name in names}
        for problem in dict.fromkeys(one.problem for one in marks if one.problem is not None):
            parts[problem] = np.array([float(one.problem == problem) for one in marks])
        return cls(np.array([one.value for one in marks], np.float64), parts)

    @classmethod
    def joined(cls, scores: Sequence["Scores"]) -> "Scores":
        """Batches one after the other."""
        names = {name: None for one in scores for name in one.parts}
        parts = {
            name: np.concatenate([one.parts.get(name, np.full(len(one.values), math.nan)) for one in scores])
            for name in names
        }
        return cls(np.concatenate([one.values for one in scores]), parts)

    def to_json(self) -> dict[str, Any]:
        """In types that JSON has; NaN as Python writes it."""
        return {"values": self.values.tolist(), "parts": {name: part.tolist() for name, part in self.parts.items()}}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Scores":
        """What `to_json` gave."""
        parts = {name: np.array(part, np.float64) for name, part in told["parts"].items()}
        return cls(np.array(told["values"], np.float64), parts)

    def among(self, places_n: np.ndarray) -> "Scores":
        """These at the places where a mask is true; elsewhere there is none."""

        def spread(values: np.ndarray) -> np.ndarray:
            wide = np.full(len(places_n), math.nan)
            wide[places_n] = values
            return wide

        return Scores(spread(self.values), {name: spread(part) for name, part in self.parts.items()})


def is_of_one_answer(error: ProviderError) -> bool:
    """Whether a fault is that of one answer; all others the next call will suffer, too."""
    return isinstance(error, AnswerError) or error.fault in ("malformed", "refused")


def problem_of(error: ProviderError) -> Problem:
    """Why there is no mark after a fault of one answer."""
    return "refused" if error.fault == "refused" else "no_reply"


class Reward(Protocol):
    """What policies are optimized for.

    is_on_mesh: it runs programs on the devices that train. Then all processes call it, each in its main thread, with
    the same cases in the same order, and all get the same scores.
    """

    runs_on_devices: bool = False

    def scores(self, cases: Sequence[Case]) -> Scores:
        """One score a case; batches may be scored at the same time from several threads.

        Raises: ProviderError if the judge cannot be asked at all (an endpoint that is down, a key that is refused).
        """
        ...


class WeightedReward(Reward):
    """A weighted sum of rewards, each of them and their parts logged under its name; NaN where any of them is.

    rewards: name -> (weight, reward).
    """

    def __init__(self, rewards: Mapping[str, tuple[float, Reward]]):
        if not rewards or not all(math.isfinite(weight) for weight, _ in rewards.values()):
            raise UsageError("WeightedReward: needs at least one reward, and finite weights")
        if len(places := {reward.runs_on_devices for _, reward in rewards.values()}) > 1:
            raise UsageError("WeightedReward: rewards on the mesh are asked by all processes, others by one; not mixed")
        self._rewards, self.runs_on_devices = dict(rewards), places.pop()

    def scores(self, cases: Sequence[Case]) -> Scores:
        """See `Reward`."""
        values = np.zeros(len(cases))
        parts: dict[str, np.ndarray] = {}
        for name, (weight, reward) in self._rewards.items():
            found = reward.scores(cases)
            values = values + weight * found.values
            parts |= {name: found.values, **{f"{name}/{part}": array for part, array in found.parts.items()}}
        return Scores(values, parts)
