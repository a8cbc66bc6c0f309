"""Who takes part in making a trajectory: protocols of five roles, and what they say to each other.

A role is asked about one prompt at a time. Vision-language models play them by prompt templates; in the shapes world a
program can play them exactly. What a role cannot answer it raises as ClvrError, which discards the trajectory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from clvr_jax.data.engine.actions import ActionName, Turn
from clvr_jax.data.engine.states import StateName
from clvr_jax.data.trajectory_record import ProxyPrompts
from clvr_jax.image_io import ImageLike


@dataclass(frozen=True)
class PromptItem:
    """A request to make a trajectory for. id: unique, decides seeds and files. metadata: as JSON has it, of a world."""

    id: str
    prompt: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One question of a checklist, answered by looking. passed: yes. evidence: what was seen."""

    question: str
    passed: bool
    evidence: str = ""


@dataclass(frozen=True)
class Validation:
    """The latest picture held against the request.

    accepted: it is met. gaps: what is not. feedback: for the next turn. roll_back_to: number of an earlier picture to
    go on from, None to keep the latest.
    """

    accepted: bool
    gaps: tuple[str, ...] = ()
    feedback: str = ""
    roll_back_to: int | None = None


@dataclass(frozen=True)
class Event:
    """One thing that happened, in order: a turn and what came of it.

    turn: PERCEIVE, REASON, ACT. picture: number of the picture it made. checks: of that picture. validation: what it
    asked for. error: why it was not carried out.
    """

    state: StateName
    turn: Turn | None = None
    picture: int | None = None
    checks: tuple[Check, ...] = ()
    validation: Validation | None = None
    error: str = ""


@dataclass(frozen=True)
class History:
    """What every role may see.

    pictures: all that were made, by number. path: numbers of those that the latest one goes back to, itself included;
    others were rolled back. events: all that happened.
    """

    item: PromptItem
    pictures: tuple[ImageLike, ...] = field(default=(), repr=False)
    path: tuple[int, ...] = ()
    events: tuple[Event, ...] = ()

    @property
    def latest(self) -> ImageLike | None:
        """The picture that the path ends in."""
        return self.pictures[self.path[-1]] if self.path else None


class Director(Protocol):
    """Plans and acts."""

    def turn(self, history: History, state: StateName, allowed: tuple[ActionName, ...], seed: int) -> str:
        """The next turn as `actions.read_turn` reads it; the last event says what was wrong with the one before."""
        ...


class Verifier(Protocol):
    """Looks at pictures without having drawn them."""

    def checklist(self, history: History, turn: Turn) -> tuple[str, ...]:
        """Questions that the picture of a drawing turn must answer with yes; at least one."""
        ...

    def check(self, history: History, turn: Turn, questions: tuple[str, ...], picture: ImageLike) -> tuple[Check, ...]:
        """One check for each question."""
        ...

    def validate(self, history: History) -> Validation:
        """Whether the latest picture meets the request, when the director asks, and once more at the end."""
        ...


class Judge(Protocol):
    """Compares two pictures without knowing where they come from."""

    def prefer(
        self, prompt: str, first: ImageLike, second: ImageLike, seed: int
    ) -> Literal["first", "second", "neither"]:
        """The one that meets the request better."""
        ...


class Translator(Protocol):
    """Turns what was done into what the loop's controller would have said."""

    def replies(self, history: History, accepted: bool) -> tuple[str, ...]:
        """One reply in the words of `reasoning.actions` for each picture of the path, and one on the final picture.

        The reply after a wrong picture names what is wrong as unmet and asks for the correction. If the final picture
        is `accepted`, the last reply ends the trajectory; else it says what is unmet.
        """
        ...

    def verdict(self, history: History, replies: tuple[str, ...]) -> str:
        """The reply to the latest picture of the path, after `replies`, one for each picture of the path."""
        ...

    def proxies(self, history: History) -> tuple[ProxyPrompts, ...]:
        """Proxy prompts for each picture of the path; i_ref counts along the path."""
        ...


@dataclass(frozen=True)
class Roles:
    """All roles for one prompt. judges: two that know nothing of each other; none, and nothing is compared."""

    director: Director
    verifier: Verifier
    translator: Translator
    judges: tuple[Judge, ...] = ()
