"""One prompt becomes one verified trajectory, or none.

    generate_base_image -> inspect -> refine -> validate -> finalize

Every image is checked on a list of questions made for it (passive verification), for a wrong image must never become a
target of an image generator. By default a wrong image stays in the history as context, and the director corrects it:
the controller learns from the verdict on it and from the correction. The step is also generated again from the same
history; a right image beside the wrong one makes a counterfactual pair of verification examples. Too many failures in a
row, or a wrong image at the end, discard the trajectory; a wrong final image still makes a verification example.

The director may ask whether it is done (active verification); the answer names gaps, and may send it back to an earlier
image. At the end the result must be accepted once more, and be preferred to an image generated in one shot, by every
judge and in both orders. What is left is told in the words of the loop, with proxy prompts for every step.

Source: arXiv 2605.14876, trajectory synthesis, where one wrong image discards the trajectory. Corrected mistakes,
seeds, retries and the order of the checks are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from clvr_jax.data.engine.actions import EndTrajectory, ImageEdit, ResultValidation, Turn, read_turn
from clvr_jax.data.engine.records import RecordWriter, Retry, TranslationError, failed, wrong_images
from clvr_jax.data.engine.roles import Check, Event, History, PromptItem, Roles
from clvr_jax.data.engine.states import END, MACHINE, START, State, StateName, check_machine
from clvr_jax.data.trajectory_record import TrajectoryRecord
from clvr_jax.errors import ClvrError
from clvr_jax.image_io import ImageLike
from clvr_jax.interfaces import ImageModel, ImageRequest, ImageResponse, ProviderError
from clvr_jax.reasoning.actions import ParseError
from clvr_jax.reasoning.answers import AnswerError
from clvr_jax.reasoning.seeds import derive_seed

Stage = Literal["drawn", "verified", "accepted", "preferred", "kept"]
STAGES: tuple[Stage, ...] = ("drawn", "verified", "accepted", "preferred", "kept")
"""How far a prompt came: a picture that passed, all passed or were corrected, the result accepted, preferred, told."""


UNREADABLE = ("invalid action", "unreadable reply")
"""Reasons that are about replies, not about images: a prompt's own fault only if other prompts get replies that can be
read."""


@dataclass(frozen=True)
class Settings:
    """max_turns: of the director, failed ones included. max_pictures: drawn at most, so references are fewer.
    verify: whether pictures are checked (passive verification); without it only for measuring what it is worth.
    keep_mistakes: whether a wrong image stays as context, to be corrected; else one discards the trajectory.
    versions: recorded with every trajectory."""

    max_turns: int = 24
    max_pictures: int = 8
    verify: bool = True
    keep_mistakes: bool = True
    machine: Mapping[StateName, State] = field(default_factory=lambda: MACHINE)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_machine(self.machine)


@dataclass(frozen=True)
class Outcome:
    """What came of a prompt. record: the trajectory, None if it was discarded. stage: the last one it reached, None
    before the first. reason: why it was discarded, of few kinds, for counting. detail: in words. history: all of it.
    verification: examples of verification, of discarded trajectories too."""

    item: PromptItem
    record: TrajectoryRecord | None
    stage: Stage | None
    reason: str = ""
    detail: str = ""
    history: History | None = None
    verification: tuple[TrajectoryRecord, ...] = ()


class _DiscardedError(Exception):
    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def synthesize(
    item: PromptItem, roles: Roles, image_model: ImageModel, settings: Settings | None = None, seed: int = 0
) -> Outcome:
    """Makes the trajectory of one prompt.

    Args:
      item: the prompt.
      roles: who plays the roles for it.
      image_tool: what draws.
      settings: budgets.
      seed: of the run; with the prompt's id it decides every other seed, so that a prompt gives the same wherever and
        whenever it is worked on.
    Returns: the outcome; a refusal of a provider, and what a role raises as ClvrError, discards the trajectory and is
      told there.
    Raises: ProviderError if a provider is down, limits the rate, rejects requests or gives no reply. That is no outcome
      of the prompt, and says nothing about it.
    """
    settings = settings or Settings()
    making = _Making(item, roles, image_model, settings, derive_seed(seed, item.id))
    try:
        return making.outcome()
    except ClvrError as error:
        if is_transport_fault(error):
            raise
        reason = "refused" if isinstance(error, ProviderError) else "unreadable reply"
        return Outcome(item, None, making.stage, reason, str(error), making.history)


def is_transport_fault(error: Exception) -> bool:
    """Whether an error says nothing about the prompt that it came up with: any fault of a provider but a refusal."""
    return isinstance(error, ProviderError) and error.fault != "refused"


class _Making:
    """A trajectory while it is made."""

    def __init__(self, item: PromptItem, roles: Roles, image_model: ImageModel, settings: Settings, seed: int):
        self.history = History(item)
        self.stage: Stage | None = None
        self.verification: tuple[TrajectoryRecord, ...] = ()
        self._crew, self._image_tool, self._settings, self._seed = roles, image_model, settings, seed
        self._writer = RecordWriter(roles.translator, image_model.name, seed, settings.versions)
        self._made: list[ImageResponse] = []
        self._retries: list[Retry] = []

    def outcome(self) -> Outcome:
        """What comes of the prompt. Raises: ClvrError if a role or the image tool fails."""
        try:
            record = self.record()
        except _DiscardedError as why:
            self.verify_rejected(why.reason)
            return Outcome(self.history.item, None, self.stage, why.reason, str(why), self.history, self.verification)
        return Outcome(self.history.item, record, "kept", history=self.history, verification=self.verification)

    def record(self) -> TrajectoryRecord:
        """Runs the machine to its end. Raises: _DiscardedError."""
        state, failures = START, 0
        for number in range(self._settings.max_turns):
            if state == END:
                break
            following, failure = self._turn(state, number)
            failures = failures + 1 if failure else 0
            if failure and failures > self._settings.machine[state].retries:
                raise failure
            state = following
        if state != END:
            raise _DiscardedError("budget", f"not done after {self._settings.max_turns} turns")
        if self._is_last_wrong:
            raise _DiscardedError("passive verification", "the last picture is wrong, and none corrects it")
        self.stage = "verified"
        final = self._crew.verifier.validate(self.history)
        if not final.accepted:
            raise _DiscardedError("final acceptance", "; ".join(final.gaps) or final.feedback)
        self.stage = "accepted"
        self._compare()
        self.stage = "preferred"
        return self._told()

    def verify_rejected(self, reason: str) -> None:
        """Makes the verification examples of a trajectory that was discarded for `reason`, if it has any."""
        is_last_wrong = self._is_last_wrong or reason in ("final acceptance", "gave up")
        is_accepted = self.stage == "accepted"
        if not self._settings.keep_mistakes or not (is_last_wrong or (is_accepted and self._retries)):
            return
        try:
            replies = self._writer.replies(self.history, is_accepted)
            self.verification = tuple(self._writer.verification(self.history, replies, self._retries, is_last_wrong))
        except ClvrError as error:
            if is_transport_fault(error):
                raise
            return  # The trajectory is lost already; so are its examples.

    @property
    def _is_last_wrong(self) -> bool:
        return bool(self.history.path) and self.history.path[-1] in wrong_images(self.history)

    def _turn(self, state: StateName, number: int) -> tuple[StateName, Exception | None]:
        """One turn: the state it leads to, and what was wrong with it."""
        allowed = self._settings.machine[state].allowed
        seed = derive_seed(self._seed, "turn", number)
        try:
            text = self._crew.director.turn(self.history, state, allowed, seed)
            turn = read_turn(text, allowed, len(self.history.pictures))
            if len(self.history.pictures) >= self._settings.max_pictures and not isinstance(
                turn.action, ResultValidation | EndTrajectory
            ):
                raise _DiscardedError("budget", f"more than {self._settings.max_pictures} pictures")
        except AnswerError as error:
            self._note(Event(state, error=str(error)))
            # No reply at all is no invalid one, and in the end no outcome.
            return state, error if is_transport_fault(error) else _DiscardedError("invalid action", str(error))
        following = self._settings.machine[state].actions[turn.action.name]
        if isinstance(turn.action, EndTrajectory):
            validation = next(event.validation for event in reversed(self.history.events) if event.validation)
            if not validation.accepted:
                raise _DiscardedError("gave up", "; ".join(validation.gaps) or validation.feedback)
            self._note(Event(state, turn))
        elif isinstance(turn.action, ResultValidation):
            self._validate(state, turn)
        else:
            return following, self._picture(state, turn, number)
        return following, None

    def _picture(self, state: StateName, turn: Turn, number: int) -> "_DiscardedError | None":
        """Generates and checks an image; returns what is wrong with it."""
        references = turn.action.ref_img_list if isinstance(turn.action, ImageEdit) else ()
        assert not isinstance(turn.action, ResultValidation | EndTrajectory)
        shown = tuple(self.history.pictures[reference] for reference in references)
        made = self._draw(turn.action.prompt, shown, derive_seed(self._seed, "draw", number))
        picture, place = made.image, len(self.history.pictures)
        questions = self._crew.verifier.checklist(self.history, turn) if self._settings.verify else ()
        checks = self._checked(turn, questions, picture)
        if failed(checks) and self._settings.keep_mistakes:
            self._retry(state, turn, shown, questions, number)
        self.history = replace(
            self.history, pictures=(*self.history.pictures, picture), path=(*self.history.path, place)
        )
        self._made.append(made)
        self._note(Event(state, turn, place, checks))
        if not failed(checks):
            self.stage = "drawn"
            return None
        faults = "; ".join(f"{one.question}: {one.evidence}" for one in failed(checks))
        failure = _DiscardedError("passive verification", faults)
        if not self._settings.keep_mistakes:
            raise failure
        return failure

    def _checked(self, turn: Turn, questions: tuple[str, ...], picture: ImageLike) -> tuple[Check, ...]:
        if not self._settings.verify:
            return ()
        checks = self._crew.verifier.check(self.history, turn, questions, picture)
        if not checks or len(checks) != len(questions):
            raise _DiscardedError(
                "unreadable reply", f"a checklist of {len(questions)} questions got {len(checks)} answers"
            )
        return checks

    def _retry(
        self, state: StateName, turn: Turn, shown: tuple[ImageLike, ...], questions: tuple[str, ...], number: int
    ) -> None:
        """Generates an image that came out wrong again, with other seeds, until one is right or the budget is spent.

        It is kept beside the history, which no role sees, for a pair of verification examples.
        """
        assert not isinstance(turn.action, ResultValidation | EndTrajectory)
        for attempt in range(self._settings.machine[state].retries):
            try:
                made = self._draw(turn.action.prompt, shown, derive_seed(self._seed, "retry", number, attempt))
                checks = self._checked(turn, questions, made.image)
            except (ClvrError, _DiscardedError) as error:
                if is_transport_fault(error):
                    raise
                return  # The trajectory does not depend on it.
            if not failed(checks):
                self._retries.append(Retry(len(self.history.pictures), made.image, Event(state, turn, checks=checks)))
                return

    def _validate(self, state: StateName, turn: Turn) -> None:
        """Active verification, and the way back to an earlier picture."""
        found = self._crew.verifier.validate(self.history)
        self._note(Event(state, turn, validation=found))
        if found.roll_back_to is not None and not found.accepted:
            if found.roll_back_to not in self.history.path:
                raise _DiscardedError(
                    "unreadable reply", f"a validation goes back to picture {found.roll_back_to}, which is not there"
                )
            kept = self.history.path.index(found.roll_back_to) + 1
            self.history = replace(self.history, path=self.history.path[:kept])

    def _compare(self) -> None:
        """Consensus: every judge, in both orders, prefers the result to one shot from the prompt alone."""
        if not self._crew.judges:
            return
        prompt, result = self.history.item.prompt, self.history.latest
        assert result is not None
        baseline = self._draw(prompt, (), derive_seed(self._seed, "baseline")).image
        for number, judge in enumerate(self._crew.judges):
            seed = derive_seed(self._seed, "judge", number)
            said = judge.prefer(prompt, result, baseline, seed), judge.prefer(prompt, baseline, result, seed)
            if said != ("first", "second"):
                raise _DiscardedError(
                    "consensus", f"judge {number} prefers {said[0]}, and {said[1]} with the order swapped"
                )

    def _told(self) -> TrajectoryRecord:
        """The record, and the verification examples."""
        try:
            replies = self._writer.replies(self.history, accepted=True)
            record = self._writer.trajectory(self.history, replies, self._made)
        except (ParseError, TranslationError) as error:
            raise _DiscardedError("translation", str(error)) from error
        self.verification = tuple(self._writer.verification(self.history, replies, self._retries, False))
        return record

    def _draw(self, prompt: str, references: tuple[ImageLike, ...], seed: int) -> ImageResponse:
        return self._image_tool.generate(ImageRequest(prompt, references, seed=seed))

    def _note(self, event: Event) -> None:
        self.history = replace(self.history, events=(*self.history.events, event))
