"""The synthesis of one verified trajectory from one prompt.

    generate_base_image -> inspect -> refine -> validate -> finalize

Every image is checked with a checklist made for it (passive verification), because a wrong image must never become a
target of an image generator. By default a wrong image stays in the history as context, and the planner corrects it: the
controller learns from the verdict on it and from the correction. The step is also generated again from the same
history; a right image and the wrong one make a counterfactual pair of verification examples. Too many consecutive
failures, or a wrong image at the end, discard the trajectory; a wrong final image still makes a verification example.

The planner may ask for a validation (active verification); the reply lists what is unmet, and may roll the trajectory
back to an earlier image. At the end the result must be accepted once more, and every judge must prefer it, in both
orders, to an image generated in one shot. An accepted trajectory is written as replies of the loop's controller, with
proxy prompts for every step.

Source: arXiv 2605.14876, trajectory synthesis, where one wrong image discards the trajectory. Corrected mistakes,
seeds, retries and the order of the checks are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from clvr_jax.data.engine.actions import EndTrajectory, ImageEdit, ResultValidation, Turn, read_turn
from clvr_jax.data.engine.records import RecordWriter, Retry, TranslationError, failed, wrong_images
from clvr_jax.data.engine.roles.base import Check, Event, History, PromptItem, Roles
from clvr_jax.data.engine.states import END, MACHINE, START, State, StateName, check_machine
from clvr_jax.data.trajectories.record import TrajectoryRecord
from clvr_jax.errors import ClvrError
from clvr_jax.files.image_io import ImageLike
from clvr_jax.interfaces import ImageModel, ImageRequest, ImageResponse, ProviderError
from clvr_jax.interfaces.answers import AnswerError
from clvr_jax.reasoning.conversation.actions import ParseError
from clvr_jax.reasoning.seeds import derive_seed

Stage = Literal["drawn", "verified", "accepted", "preferred", "kept"]
STAGES: tuple[Stage, ...] = ("drawn", "verified", "accepted", "preferred", "kept")
"""Stages of a prompt, in order: one image is right, all images are right or corrected, the result is accepted, it is
preferred to one shot, the trajectory is written."""

UNREADABLE = ("invalid action", "unreadable reply")
"""Reasons that concern replies, not images. They are outcomes of a prompt only if replies to other prompts can be
parsed, since a server may reply nonsense to every request."""


@dataclass(frozen=True)
class Settings:
    """Limits and options of the synthesis.

    Attributes:
      max_turns: maximum number of turns of the planner, failed ones included.
      max_images: maximum number of generated images.
      verify: whether images are checked (passive verification); switched off only to measure its effect.
      keep_mistakes: whether a wrong image stays as context and is corrected; if not, it discards the trajectory.
      machine: the state machine.
      versions: versions of templates and models, recorded with every trajectory.
    """

    max_turns: int = 24
    max_images: int = 8
    verify: bool = True
    keep_mistakes: bool = True
    machine: Mapping[StateName, State] = field(default_factory=lambda: MACHINE)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_machine(self.machine)


@dataclass(frozen=True)
class Outcome:
    """The result of a prompt.

    Attributes:
      item: the prompt.
      record: the trajectory; None if it was discarded.
      stage: the last stage that the prompt reached; None before the first.
      reason: category of the failure, for statistics; "" if the trajectory was kept.
      detail: description of the failure.
      history: everything that happened.
      verification: verification examples, which discarded trajectories may have as well.
    """

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
    """Synthesizes the trajectory of one prompt.

    Args:
      item: the prompt.
      roles: the planner, the verifier, the translator and the judges.
      image_model: generates the images.
      settings: limits and options.
      seed: seed of the run; all other seeds derive from it and the id of the prompt, so the result does not depend on
        the machine, the time, or other prompts.
    Returns: the outcome. A refusal of a provider, and a ClvrError of a role, discard the trajectory and are described
      in the outcome.
    Raises: ProviderError if a provider is down, limits the rate, rejects requests or gives no reply. This says nothing
      about the prompt, which then has no outcome.
    """
    settings = settings or Settings()
    synthesis = _Synthesis(item, roles, image_model, settings, derive_seed(seed, item.id))
    try:
        return synthesis.outcome()
    except ClvrError as error:
        if is_transport_fault(error):
            raise
        reason = "refused" if isinstance(error, ProviderError) else "unreadable reply"
        return Outcome(item, None, synthesis.stage, reason, str(error), synthesis.history)


def is_transport_fault(error: Exception) -> bool:
    """Returns whether an error says nothing about the prompt: any fault of a provider other than a refusal."""
    return isinstance(error, ProviderError) and error.fault != "refused"


class _Synthesis:
    """The state of a trajectory during its synthesis."""

    def __init__(self, item: PromptItem, roles: Roles, image_model: ImageModel, settings: Settings, seed: int):
        self.history = History(item)
        self.stage: Stage | None = None
        self.verification: tuple[TrajectoryRecord, ...] = ()
        self._roles, self._image_model, self._settings, self._seed = roles, image_model, settings, seed
        self._writer = RecordWriter(roles.translator, image_model.name, seed, settings.versions)
        self._responses: list[ImageResponse] = []
        self._retries: list[Retry] = []

    def outcome(self) -> Outcome:
        """Returns the outcome of the prompt. Raises: ClvrError if a role or the image model fails."""
        try:
            record = self.record()
        except _DiscardedError as error:
            self.verify_rejected(error.reason)
            return Outcome(
                self.history.item, None, self.stage, error.reason, str(error), self.history, self.verification
            )
        return Outcome(self.history.item, record, "kept", history=self.history, verification=self.verification)

    def record(self) -> TrajectoryRecord:
        """Runs the state machine to its end; returns the record. Raises: _DiscardedError."""
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
            raise _DiscardedError("passive verification", "the last image is wrong and was not corrected")
        self.stage = "verified"
        final = self._roles.verifier.validate(self.history)
        if not final.accepted:
            raise _DiscardedError("final acceptance", "; ".join(final.gaps) or final.feedback)
        self.stage = "accepted"
        self._compare()
        self.stage = "preferred"
        return self._to_record()

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
            return  # The trajectory is discarded already; its examples are left out, too.

    @property
    def _is_last_wrong(self) -> bool:
        return bool(self.history.path) and self.history.path[-1] in wrong_images(self.history)

    def _turn(self, state: StateName, number: int) -> tuple[StateName, Exception | None]:
        """Carries out one turn; returns the next state and the failure of the turn, None if there was none."""
        allowed = self._settings.machine[state].allowed
        seed = derive_seed(self._seed, "turn", number)
        try:
            text = self._roles.planner.turn(self.history, state, allowed, seed)
            turn = read_turn(text, allowed, len(self.history.images))
            if len(self.history.images) >= self._settings.max_images and not isinstance(
                turn.action, ResultValidation | EndTrajectory
            ):
                raise _DiscardedError("budget", f"more than {self._settings.max_images} images")
        except AnswerError as error:
            self._append(Event(state, error=str(error)))
            # A missing reply is a fault of the provider, not an invalid action: it leads to no outcome.
            return state, error if is_transport_fault(error) else _DiscardedError("invalid action", str(error))
        following = self._settings.machine[state].actions[turn.action.name]
        if isinstance(turn.action, EndTrajectory):
            validation = next(event.validation for event in reversed(self.history.events) if event.validation)
            if not validation.accepted:
                raise _DiscardedError("gave up", "; ".join(validation.gaps) or validation.feedback)
            self._append(Event(state, turn))
        elif isinstance(turn.action, ResultValidation):
            self._validate(state, turn)
        else:
            return following, self._add_image(state, turn, number)
        return following, None

    def _add_image(self, state: StateName, turn: Turn, number: int) -> "_DiscardedError | None":
        """Generates and checks an image; returns the failure if it is wrong, else None."""
        references = turn.action.ref_img_list if isinstance(turn.action, ImageEdit) else ()
        assert not isinstance(turn.action, ResultValidation | EndTrajectory)
        reference_images = tuple(self.history.images[reference] for reference in references)
        response = self._generate(turn.action.prompt, reference_images, derive_seed(self._seed, "draw", number))
        image, index = response.image, len(self.history.images)
        questions = self._roles.verifier.checklist(self.history, turn) if self._settings.verify else ()
        checks = self._check(turn, questions, image)
        if failed(checks) and self._settings.keep_mistakes:
            self._retry(state, turn, reference_images, questions, number)
        self.history = replace(self.history, images=(*self.history.images, image), path=(*self.history.path, index))
        self._responses.append(response)
        self._append(Event(state, turn, index, checks))
        if not failed(checks):
            self.stage = "drawn"
            return None
        faults = "; ".join(f"{check.question}: {check.evidence}" for check in failed(checks))
        failure = _DiscardedError("passive verification", faults)
        if not self._settings.keep_mistakes:
            raise failure
        return failure

    def _check(self, turn: Turn, questions: tuple[str, ...], image: ImageLike) -> tuple[Check, ...]:
        if not self._settings.verify:
            return ()
        checks = self._roles.verifier.check(self.history, turn, questions, image)
        if not checks or len(checks) != len(questions):
            raise _DiscardedError(
                "unreadable reply", f"a checklist of {len(questions)} questions got {len(checks)} answers"
            )
        return checks

    def _retry(
        self,
        state: StateName,
        turn: Turn,
        reference_images: tuple[ImageLike, ...],
        questions: tuple[str, ...],
        number: int,
    ) -> None:
        """Generates a wrong image again, with other seeds, until one is right or the retries of the state are used up.

        The right image is stored outside the history, where no role sees it, for a pair of verification examples.
        """
        assert not isinstance(turn.action, ResultValidation | EndTrajectory)
        for attempt in range(self._settings.machine[state].retries):
            try:
                seed = derive_seed(self._seed, "retry", number, attempt)
                response = self._generate(turn.action.prompt, reference_images, seed)
                checks = self._check(turn, questions, response.image)
            except (ClvrError, _DiscardedError) as error:
                if is_transport_fault(error):
                    raise
                return  # The trajectory does not depend on the retry.
            if not failed(checks):
                self._retries.append(Retry(len(self.history.images), response.image, Event(state, turn, checks=checks)))
                return

    def _validate(self, state: StateName, turn: Turn) -> None:
        """Validates the latest image (active verification); rolls back to an earlier image if the verifier says so."""
        validation = self._roles.verifier.validate(self.history)
        self._append(Event(state, turn, validation=validation))
        if validation.roll_back_to is not None and not validation.accepted:
            if validation.roll_back_to not in self.history.path:
                raise _DiscardedError(
                    "unreadable reply",
                    f"a validation rolls back to image {validation.roll_back_to}, which is not in the history",
                )
            length = self.history.path.index(validation.roll_back_to) + 1
            self.history = replace(self.history, path=self.history.path[:length])

    def _compare(self) -> None:
        """Checks that every judge, in both orders, prefers the result to an image generated in one shot (consensus).

        Raises: _DiscardedError if one does not.
        """
        if not self._roles.judges:
            return
        prompt, result = self.history.item.prompt, self.history.latest
        assert result is not None
        baseline = self._generate(prompt, (), derive_seed(self._seed, "baseline")).image
        for number, judge in enumerate(self._roles.judges):
            seed = derive_seed(self._seed, "judge", number)
            replies = judge.prefer(prompt, result, baseline, seed), judge.prefer(prompt, baseline, result, seed)
            if replies != ("first", "second"):
                raise _DiscardedError(
                    "consensus", f"judge {number} prefers {replies[0]}, and {replies[1]} with the order swapped"
                )

    def _to_record(self) -> TrajectoryRecord:
        """Returns the record of the trajectory, and stores its verification examples."""
        try:
            replies = self._writer.replies(self.history, accepted=True)
            record = self._writer.trajectory(self.history, replies, self._responses)
        except (ParseError, TranslationError) as error:
            raise _DiscardedError("translation", str(error)) from error
        self.verification = tuple(self._writer.verification(self.history, replies, self._retries, False))
        return record

    def _generate(self, prompt: str, references: tuple[ImageLike, ...], seed: int) -> ImageResponse:
        return self._image_model.generate(ImageRequest(prompt, references, seed=seed))

    def _append(self, event: Event) -> None:
        self.history = replace(self.history, events=(*self.history.events, event))
