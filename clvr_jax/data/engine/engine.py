"""One prompt becomes one verified trajectory, or none.

    generate_base_image -> inspect -> refine -> validate -> finalize

Every picture is checked on a list of questions made for it (passive verification): one no discards the trajectory, for
a wrong step must never become something to learn from. The director may ask whether it is done (active verification);
the answer names gaps, and may send it back to an earlier picture. At the end the result must be accepted once more, and
be preferred to a picture drawn in one shot, by every judge and in both orders. What is left is told in the words of the
loop, with proxy prompts for every step.

Source: arXiv 2605.14876, trajectory synthesis. Seeds, retries and the order of the checks are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from clvr_jax.data.engine.actions import EndTrajectory, ImageEdit, ResultValidation, Turn, read_turn
from clvr_jax.data.engine.roles import Check, Crew, Event, History, PromptItem
from clvr_jax.data.engine.states import END, MACHINE, START, State, StateName, check_machine
from clvr_jax.data.trajectory_record import TrajectoryRecord
from clvr_jax.errors import ClvrError
from clvr_jax.reasoning.actions import IMAGE_GEN, TERMINATE, ParseError, parse
from clvr_jax.reasoning.answers import AnswerError
from clvr_jax.reasoning.images import Picture
from clvr_jax.reasoning.loop import derive_seed
from clvr_jax.reasoning.tools import ImageTask, ImageTool, Made
from clvr_jax.reasoning.trajectory import ACCEPTED, Step, Trajectory, Verdict, package_versions

Stage = Literal["drawn", "verified", "accepted", "preferred", "kept"]
STAGES: tuple[Stage, ...] = ("drawn", "verified", "accepted", "preferred", "kept")
"""How far a prompt came: a first picture that passed, all pictures passed, the result accepted, preferred, told."""


@dataclass(frozen=True)
class Settings:
    """max_turns: of the director, failed ones included. max_pictures: drawn at most, so references are fewer.
    verify: whether pictures are checked (passive verification); without it only for measuring what it is worth.
    versions: recorded with every trajectory."""

    max_turns: int = 24
    max_pictures: int = 8
    verify: bool = True
    machine: Mapping[StateName, State] = field(default_factory=lambda: MACHINE)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_machine(self.machine)


@dataclass(frozen=True)
class Outcome:
    """What came of a prompt. record: the trajectory, None if it was discarded. stage: the last one it reached, None
    before the first. reason: why it was discarded, of few kinds, for counting. detail: in words. history: all of it."""

    item: PromptItem
    record: TrajectoryRecord | None
    stage: Stage | None
    reason: str = ""
    detail: str = ""
    history: History | None = None


class _DiscardedError(Exception):
    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def synthesize(
    item: PromptItem, crew: Crew, image_tool: ImageTool, settings: Settings | None = None, seed: int = 0
) -> Outcome:
    """Makes the trajectory of one prompt.

    Args:
      item: the prompt.
      crew: who plays the roles for it.
      image_tool: what draws.
      settings: budgets.
      seed: of the run; with the prompt's id it decides every other seed, so that a prompt gives the same wherever and
        whenever it is worked on.
    Returns: the outcome; what a role or the image tool raises as ClvrError discards the trajectory and is told there.
    """
    settings = settings or Settings()
    making = _Making(item, crew, image_tool, settings, derive_seed(seed, item.id))
    try:
        return Outcome(item, making.record(), "kept", history=making.history)
    except _DiscardedError as why:
        return Outcome(item, None, making.stage, why.reason, str(why), making.history)
    except ClvrError as error:
        return Outcome(item, None, making.stage, "provider", str(error), making.history)


class _Making:
    """A trajectory while it is made."""

    def __init__(self, item: PromptItem, crew: Crew, image_tool: ImageTool, settings: Settings, seed: int):
        self.history = History(item)
        self.stage: Stage | None = None
        self._crew, self._image_tool, self._settings, self._seed = crew, image_tool, settings, seed
        self._made: list[Made] = []

    def record(self) -> TrajectoryRecord:
        """Runs the machine to its end. Raises: _DiscardedError."""
        state, failures = START, 0
        for number in range(self._settings.max_turns):
            if state == END:
                break
            following, error = self._turn(state, number)
            failures = failures + 1 if error else 0
            if failures > self._settings.machine[state].retries:
                raise _DiscardedError("invalid action", error)
            state = following
        if state != END:
            raise _DiscardedError("budget", f"not done after {self._settings.max_turns} turns")
        self.stage = "verified"
        final = self._crew.verifier.validate(self.history)
        if not final.accepted:
            raise _DiscardedError("final acceptance", "; ".join(final.gaps) or final.feedback)
        self.stage = "accepted"
        self._compare()
        self.stage = "preferred"
        return self._told()

    def _turn(self, state: StateName, number: int) -> tuple[StateName, str]:
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
            return state, str(error)
        following = self._settings.machine[state].actions[turn.action.name]
        if isinstance(turn.action, EndTrajectory):
            validation = next(event.validation for event in reversed(self.history.events) if event.validation)
            if not validation.accepted:
                raise _DiscardedError("gave up", "; ".join(validation.gaps) or validation.feedback)
            self._note(Event(state, turn))
        elif isinstance(turn.action, ResultValidation):
            self._validate(state, turn)
        else:
            self._picture(state, turn, number)
        return following, ""

    def _picture(self, state: StateName, turn: Turn, number: int) -> None:
        """Draws and checks."""
        references = turn.action.ref_img_list if isinstance(turn.action, ImageEdit) else ()
        assert not isinstance(turn.action, ResultValidation | EndTrajectory)
        shown = tuple(self.history.pictures[reference] for reference in references)
        made = self._draw(turn.action.prompt, shown, derive_seed(self._seed, "draw", number))
        picture, place = made.image, len(self.history.pictures)
        checks: tuple[Check, ...] = ()
        if self._settings.verify:
            questions = self._crew.verifier.checklist(self.history, turn)
            checks = self._crew.verifier.check(self.history, turn, questions, picture)
            if not checks or len(checks) != len(questions):
                raise _DiscardedError(
                    "provider", f"a checklist of {len(questions)} questions got {len(checks)} answers"
                )
        self.history = replace(
            self.history, pictures=(*self.history.pictures, picture), path=(*self.history.path, place)
        )
        self._made.append(made)
        self._note(Event(state, turn, place, checks))
        if failed := [check for check in checks if not check.passed]:
            raise _DiscardedError(
                "passive verification", "; ".join(f"{one.question}: {one.evidence}" for one in failed)
            )
        self.stage = "drawn"

    def _validate(self, state: StateName, turn: Turn) -> None:
        """Active verification, and the way back to an earlier picture."""
        found = self._crew.verifier.validate(self.history)
        self._note(Event(state, turn, validation=found))
        if found.roll_back_to is not None and not found.accepted:
            if found.roll_back_to not in self.history.path:
                raise _DiscardedError(
                    "provider", f"a validation goes back to picture {found.roll_back_to}, which is not there"
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
        """The record: the path as the loop would have gone it."""
        history, path = self.history, self.history.path
        replies, proxies = self._crew.translator.replies(history), self._crew.translator.proxies(history)
        if len(replies) != len(path) + 1 or len(proxies) != len(path):
            raise _DiscardedError(
                "translation", f"{len(path)} pictures got {len(replies)} replies and {len(proxies)} proxy prompts"
            )
        try:
            read = [parse(reply, has_picture=number > 0) for number, reply in enumerate(replies)]
        except ParseError as error:
            raise _DiscardedError("translation", str(error)) from error
        wrong = [one.action for one in read[:-1] if one.action != IMAGE_GEN]
        if wrong or read[-1].action != TERMINATE or read[-1].unmet:
            raise _DiscardedError(
                "translation", "the replies do not draw each picture and then stop with nothing unmet"
            )
        steps = [
            Step(
                one.reasoning,
                IMAGE_GEN,
                tuple(range(number)),
                history.pictures[picture],
                Verdict(following.unmet or (), following.reasoning),
                nfe=self._made[picture].usage.nfe,
                seconds=self._made[picture].usage.seconds,
            )
            for number, (one, following, picture) in enumerate(zip(read, read[1:], path, strict=False))
        ]
        trajectory = Trajectory(
            history.item.prompt,
            (*steps, Step(read[-1].reasoning, TERMINATE)),
            ACCEPTED,
            self._image_tool.name,
            self._seed,
            {**package_versions(), **self._settings.versions},
            sum(made.usage.seconds for made in self._made),
        )
        checks = {event.picture: event.checks for event in history.events}
        checklists = [[[check.question, check.evidence] for check in checks[picture]] for picture in path]
        return TrajectoryRecord(
            history.item.id, trajectory, history.item.metadata, (*checklists, None), (*proxies, None)
        )

    def _draw(self, prompt: str, references: tuple[Picture, ...], seed: int) -> Made:
        return self._image_tool.draw(ImageTask(prompt, references, seed=seed))

    def _note(self, event: Event) -> None:
        self.history = replace(self.history, events=(*self.history.events, event))
