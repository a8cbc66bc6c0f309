"""The protocols of the roles of the data engine, and the data that they exchange.

A call concerns one prompt. `prompted` implements the roles with vision-language models and prompt templates,
`shapes` with exact programs for the shapes world. A role that cannot answer raises ClvrError, which discards the
trajectory.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol

from clvr_jax.data.engine.actions import ActionName, Turn
from clvr_jax.data.engine.states import StateName
from clvr_jax.data.trajectories.record import ProxyPrompts
from clvr_jax.files.image_io import ImageLike
from clvr_jax.files.json_input import UncheckedJSON


@dataclass(frozen=True)
class PromptItem:
    """A prompt to synthesize a trajectory for.

    Attributes:
      id: unique name, which determines seeds and file names.
      prompt: the user's request.
      metadata: JSON object, such as the specification of a right image in the shapes world.
    """

    id: str
    prompt: str
    metadata: UncheckedJSON = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """A question of a checklist and its answer for an image.

    Attributes:
      question: a yes/no question; a right image is one for which every answer is yes.
      passed: whether the answer is yes.
      evidence: what the verifier sees in the image.
    """

    question: str
    passed: bool
    evidence: str = ""


@dataclass(frozen=True)
class Validation:
    """The verification of the latest image against the request.

    Attributes:
      accepted: whether the image meets the request.
      gaps: what is unmet.
      feedback: advice for the next turn.
      roll_back_to: number of the earlier image to continue from; None to continue from the latest.
    """

    accepted: bool
    gaps: tuple[str, ...] = ()
    feedback: str = ""
    roll_back_to: int | None = None


@dataclass(frozen=True)
class Event:
    """A turn and its result.

    Attributes:
      state: the state in which the turn was taken.
      turn: PERCEIVE, REASON, ACT; None if it could not be parsed.
      image_index: number of the image that the turn generated.
      checks: the checklist of that image, answered.
      validation: the validation that the turn asked for.
      error: why the turn was not carried out.
    """

    state: StateName
    turn: Turn | None = None
    image_index: int | None = None
    checks: tuple[Check, ...] = ()
    validation: Validation | None = None
    error: str = ""


@dataclass(frozen=True)
class History:
    """The history of a trajectory, which every role may read.

    Attributes:
      item: the prompt.
      images: all generated images; events and `path` refer to them by index.
      path: indices of the images that were not rolled back, in order; the last one is the latest image.
      events: all turns, in order.
    """

    item: PromptItem
    images: tuple[ImageLike, ...] = field(default=(), repr=False)
    path: tuple[int, ...] = ()
    events: tuple[Event, ...] = ()

    @property
    def latest(self) -> ImageLike | None:
        """The latest image of the path; None before the first."""
        return self.images[self.path[-1]] if self.path else None


class Planner(Protocol):
    """A role that plans and acts."""

    def turn(self, history: History, state: StateName, allowed: tuple[ActionName, ...], seed: int) -> str:
        """Returns the next turn in the form that `actions.read_turn` parses.

        Args:
          history: the history; the error of its last event says why the previous turn failed.
          state: the current state.
          allowed: actions of the state.
          seed: 31-bit seed of the sampling.
        """
        ...


class Verifier(Protocol):
    """A role that verifies images."""

    def checklist(self, history: History, turn: Turn) -> tuple[str, ...]:
        """Returns the questions, at least one, that the image of `turn` must answer with yes."""
        ...

    def check(self, history: History, turn: Turn, questions: tuple[str, ...], image: ImageLike) -> tuple[Check, ...]:
        """Returns the answers for `image`, one for each question."""
        ...

    def validate(self, history: History) -> Validation:
        """Returns whether the latest image meets the request; called when the planner asks, and once at the end."""
        ...


class Judge(Protocol):
    """A role that compares two images without knowing their source."""

    def prefer(
        self, prompt: str, first: ImageLike, second: ImageLike, seed: int
    ) -> Literal["first", "second", "neither"]:
        """Returns which image meets the request better."""
        ...


class Translator(Protocol):
    """A role that writes a history as replies of the loop's controller, and its proxy prompts."""

    def replies(self, history: History, accepted: bool) -> tuple[str, ...]:
        """Returns a reply with action token for each image of the path, and one on the final image.

        The reply to a wrong image lists what is unmet and asks for the correction. If the final image is `accepted`,
        the last reply ends the trajectory; if not, it lists what is unmet.
        """
        ...

    def verdict(self, history: History, replies: tuple[str, ...]) -> str:
        """Returns the reply to the latest image of the path, which follows `replies`, one for each image."""
        ...

    def proxies(self, history: History) -> tuple[ProxyPrompts, ...]:
        """Returns the proxy prompts of each image of the path; `i_ref` holds indices into the path."""
        ...


@dataclass(frozen=True)
class Roles:
    """All roles for one prompt.

    Attributes:
      planner, verifier, translator: the roles.
      judges: independent judges; () skips the comparison with one shot.
    """

    planner: Planner
    verifier: Verifier
    translator: Translator
    judges: tuple[Judge, ...] = ()
