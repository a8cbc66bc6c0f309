"""The state of one prompt in the closed loop: its history, its candidates, and what happens next.

A scheduler asks every state for its next works (see `reasoning.work`), performs those of one kind in one batched call,
and hands the results back. Nothing in a state depends on other prompts of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from clvr_jax.files.image_io import ImageLike
from clvr_jax.reasoning.conversation.actions import (
    NO_IMAGE,
    TERMINATE,
    ParseError,
    PendingReply,
    Reply,
    parse,
    plan_items,
)
from clvr_jax.reasoning.conversation.protocols import Conversation, GeneratedImage, GenerationRequest
from clvr_jax.reasoning.loop.budget import Account, Budget
from clvr_jax.reasoning.loop.decisions import is_settled, outcome_of_stop, rollback_target
from clvr_jax.reasoning.loop.events import Event, Generated, PlanVerified, Replied, RolledBack, Selected, Verified
from clvr_jax.reasoning.loop.work import GenerationWork, PlanWork, ReplyWork, RequirementsWork, VerificationWork, Work
from clvr_jax.reasoning.seeds import derive_seed
from clvr_jax.reasoning.trajectories.edits import Edit, Parent
from clvr_jax.reasoning.trajectories.trajectory import (
    ACCEPTED,
    STEP_LIMIT,
    UNPARSEABLE,
    Step,
    Trajectory,
    Verdict,
    best_step,
    result_step,
)
from clvr_jax.reasoning.verification.verification import Verification, VerificationMode, plan_text


class PromptState:
    """The loop's state of one prompt.

    `_history` holds the numbers of the steps that form the current history, oldest first. `_candidates` maps the images
    that were generated from the latest reply, numbered from `_first_candidate` on, to the controller's reply to each;
    None where the reply is still due. `_is_selection_due` says that images wait for a separate verifier: the
    candidates, and after an edit also the history; see `reasoning.editable`, which uses `_earlier_attempts` too.
    """

    def __init__(
        self,
        index: int,
        prompt: str,
        seed: int,
        budget: Budget,
        notify: Callable[[Event], None],
        mode: VerificationMode,
        given: tuple[ImageLike, ...] = (),
    ):
        self._user_images = given
        self.index = index
        self._required: tuple[str, ...] | None = None if mode == "separate" else ()
        self._is_selection_due = False
        self._mode = mode
        self._plans: list[tuple[float, int, PendingReply]] = []
        self._is_plan_settled = False
        self._prompt = prompt
        self._seed = seed
        self._budget = budget
        self._account = Account(budget)
        self._notify = notify
        self._steps: list[Step] = []
        self._history: list[int] = []
        self._candidates: dict[int, PendingReply | None] = {NO_IMAGE: None}
        self._first_candidate = 0
        self._attempts: dict[int, int] = {}
        self._earlier_attempts: dict[int, int] = {}
        self._edits: list[Edit] = []
        self._parent: Parent | None = None
        self._pending: PendingReply | None = None
        self._num_wanted = 0
        self._rollbacks: dict[int, int] = {}
        self._seconds = 0.0
        self._booked_seconds = 0.0
        self._outcome: str | None = None
        self._error: str | None = None

    @property
    def required(self) -> tuple[str, ...]:
        """The requirements that the verifier derived; () before that and without a verifier."""
        return self._required or ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps so far."""
        return tuple(self._steps)

    @property
    def best(self) -> int | None:
        """The number of the step with the best image so far; None if there is no image."""
        return result_step(self._steps, self._edits, self._parent)

    def next_work(self, elapsed: float) -> Sequence[Work]:
        """Returns the works that the prompt needs next, all of one kind; none once the loop has ended.

        Works that were returned before are returned again until their results are received, so a scheduler that keeps
        them asks again only after all of them are done.

        Args:
          elapsed: wall-clock seconds since the run began, for the limit on time.
        """
        while self._outcome is None:
            if self._required is None:
                return [RequirementsWork(self._prompt)]
            if self._pending is not None:
                if requests := self._requests():
                    return [GenerationWork(request) for request in requests]
            elif self._is_selection_due:
                if images := self._unverified_images():
                    return [VerificationWork(number, self.required, self._image(number)) for number in images]
                self._select(elapsed)
            elif conversations := self._conversations():
                return [ReplyWork(number, conversation) for number, conversation in conversations]
            elif (plan := self._unverified_plan()) is not None:
                return [PlanWork(self.required, plan)]
            else:
                self._decide(elapsed)
        return []

    def receive(self, work: Work, result: Any, seconds: float) -> None:
        """Stores the result of a work that took `seconds`."""
        if isinstance(work, RequirementsWork):
            self._required = tuple(result)
        elif isinstance(work, ReplyWork):
            self._receive_reply(work.number, result, seconds)
        elif isinstance(work, PlanWork):
            self._receive_plan_verification(result, seconds)
        elif isinstance(work, GenerationWork):
            self._receive_image(work.request, result, seconds)
        else:
            self._receive_verification(work.number, result, seconds)

    def stop(self, outcome: str) -> None:
        """Ends the loop now, without another work; the best image so far is the result. Does nothing after the end.

        Args:
          outcome: STOPPED or CANCELED.
        """
        if self._outcome is None:
            self._finish(outcome)

    def _conversations(self) -> list[tuple[int, Conversation]]:
        """Returns the conversations that wait for a reply, each with the number of its latest step."""
        return [(number, self._conversation(number)) for number, reply in self._candidates.items() if reply is None]

    def _receive_reply(self, number: int, text: str, seconds: float) -> None:
        """Stores the controller's reply to the image of step `number`; an unreadable one is requested again."""
        self._seconds += seconds
        attempt = self._attempts.get(number, 0)
        try:
            reply = parse(text, has_image=number != NO_IMAGE)
        except ParseError as error:
            self._notify(Replied(self.index, attempt, text, str(error)))
            self._attempts[number] = attempt + 1
            has_plan = number == NO_IMAGE and bool(self._plans)
            if attempt < (self._budget.max_plan_retries if has_plan else self._budget.max_parse_retries):
                return
            if has_plan:  # one that misses a requirement is better than none
                self._settle_plan()
                return
            self._error = str(error)
            del self._candidates[number]
            return
        self._notify(Replied(self.index, attempt, text, None))
        self._candidates[number] = PendingReply(reply, attempts=attempt + 1)
        if number != NO_IMAGE and self._mode == "controller":
            verdict = Verdict(reply.unmet or (), reply.reasoning)
            self._steps[number] = replace(self._steps[number], verdict=verdict)

    def _unverified_plan(self) -> str | None:
        """Returns the plan of the first reply if the verifier still has to check it, else None."""
        first = self._candidates.get(NO_IMAGE)
        if first is None or not self._required or first.reply.action == TERMINATE or self._is_plan_settled:
            return None
        return plan_text(plan_items(first.reply.reasoning))

    def _receive_plan_verification(self, verification: Verification, seconds: float) -> None:
        """Stores a verified plan; requests another one if it misses a requirement and retries are left."""
        self._seconds += seconds
        first, attempt = self._candidates[NO_IMAGE], self._attempts.get(NO_IMAGE, 0)
        assert first is not None
        self._notify(PlanVerified(self.index, attempt, verification))
        # Among equal scores the earliest wins: the first plan is greedy, later ones are sampled.
        self._plans.append((verification.score, -len(self._plans), first))
        if is_settled(verification) or attempt >= self._budget.max_plan_retries:
            self._settle_plan()
        else:
            self._candidates[NO_IMAGE] = None
            self._attempts[NO_IMAGE] = attempt + 1

    def _settle_plan(self) -> None:
        """Carries out the plan with the best score."""
        self._candidates[NO_IMAGE] = max(self._plans, key=lambda plan: plan[:2])[2]
        self._is_plan_settled = True

    def _unverified_images(self) -> list[int]:
        """Returns the numbers of the images that the verifier has not checked."""
        return [
            number for number, step in enumerate(self._steps) if step.image is not None and step.verification is None
        ]

    def _image(self, number: int) -> ImageLike:
        """Returns the image of a step."""
        image = self._steps[number].image
        assert image is not None
        return image

    def _receive_verification(self, number: int, verification: Verification, seconds: float) -> None:
        """Stores the verification of the image of step `number`."""
        self._seconds += seconds
        self._steps[number] = replace(self._steps[number], verification=verification)
        self._notify(Verified(self.index, number, verification))

    def _select(self, elapsed: float) -> None:
        """Accepts the best verified candidate, rolls back, or passes it on to the controller.

        After an edit there may be no new candidate; then the loop continues from the latest image, if none is accepted.
        """
        self._is_selection_due = False
        has_candidates = bool(self._candidates)
        chosen = self._select_best() if has_candidates else self._history[-1]
        self._candidates = {chosen: None}
        if self._is_accepted():
            self._finish(ACCEPTED)
            return
        limit = self._account.spent(elapsed)
        if limit is not None:
            self._finish(limit)
            return
        target = self._rollback_target() if has_candidates else None
        if target is not None:
            self._start(self._roll_back(target))

    def _is_accepted(self) -> bool:
        """Whether the loop may end, because an image meets all requirements; without edits only the latest one can."""
        return self._is_any_accepted(self._history)

    def _is_any_accepted(self, numbers: Sequence[int]) -> bool:
        """Whether one of these images meets all requirements."""
        verifications = [self._steps[number].verification for number in numbers]
        return any(verification is not None and verification.accepted for verification in verifications)

    def _decide(self, elapsed: float) -> None:
        """Ends the loop, or starts what the controller asked for, once every candidate has its reply."""
        replies = {number: pending for number, pending in self._candidates.items() if pending is not None}
        if not replies:
            self._finish(UNPARSEABLE)
            return
        self._error = None  # another candidate could be read
        if NO_IMAGE in replies:
            pending = replies[NO_IMAGE]
        else:  # a separate verifier has already selected one
            pending = replies[self._history[-1] if self._mode == "separate" else self._select_best()]
        reply = pending.reply
        verified = self._mode == "controller" and self._budget.stop_when == "verified" and reply.unmet == ()
        if reply.action == TERMINATE or verified:
            last = Step(reply.reasoning, TERMINATE, seconds=self._unbooked_seconds(), attempts=pending.attempts)
            self._steps.append(last)
            self._finish(outcome_of_stop(reply, self._mode, bool(self._history), self.required))
            return
        if self._mode == "controller":
            target = self._rollback_target()
            if target is not None:
                pending = self._roll_back(target)
        limit = self._account.spent(elapsed)
        if limit is not None:
            self._finish(limit)
            return
        self._start(pending)

    def _requests(self) -> list[GenerationRequest]:
        """Returns the requests for the next images: as many candidates as the budget allows."""
        assert self._pending is not None
        replies, images = self._replies_and_images(self._history)
        seeds = [
            derive_seed(self._seed, "draw", len(self._steps) + extra)
            for extra in range(self._account.affordable(self._num_wanted))
        ]
        replies = (*replies, self._pending.reply.text)
        requests = [GenerationRequest(self._prompt, replies, images, seed, len(self._user_images)) for seed in seeds]
        if not requests:
            self._pending = None
            if self._budget.stop_when == "drawn":
                self._finish(STEP_LIMIT)
        return requests

    def _receive_image(self, request: GenerationRequest, generated: GeneratedImage, seconds: float) -> None:
        """Stores a generated image as a step."""
        assert self._pending is not None
        self._seconds += seconds
        self._account.charge(generated.nfe)
        step = Step(
            reasoning=self._pending.reply.reasoning,
            action=self._pending.reply.action,
            references=tuple(self._history),
            image=generated.image,
            nfe=generated.nfe,
            seconds=self._unbooked_seconds(),
            attempts=self._pending.attempts,
            redraw=self._pending.redraw + len(self._candidates),
            seed=request.seed,
            left_out=generated.left_out,
        )
        number = len(self._steps)
        self._candidates[number] = None
        self._num_wanted -= 1
        self._steps.append(step)
        self._notify(Generated(self.index, number, step))

    def finished(self, model: str, versions: Mapping[str, str]) -> Trajectory | None:
        """Returns the trajectory once the loop has ended, None before."""
        return None if self._outcome is None else self._trajectory(self._outcome, model, versions)

    def _trajectory(self, outcome: str, model: str = "", versions: Mapping[str, str] | None = None) -> Trajectory:
        """Returns all steps so far as a trajectory with this outcome."""
        return Trajectory(
            self._prompt,
            tuple(self._steps),
            outcome,
            model,
            self._seed,
            versions or {},
            self._seconds,
            self._error,
            self._user_images,
            tuple(self._edits),
            self._parent,
        )

    def _conversation(self, number: int) -> Conversation:
        replies, images = self._replies_and_images(self._history if number == NO_IMAGE else [*self._history, number])
        attempt = self._earlier_attempts.get(number, 0) + self._attempts.get(number, 0)
        seed = derive_seed(self._seed, "reply", number + 1, attempt)
        verification = None if number == NO_IMAGE else self._steps[number].verification
        report = "" if verification is None else verification.report
        return Conversation(self._prompt, replies, images, seed, attempt, report, self.required, len(self._user_images))

    def _replies_and_images(self, numbers: Sequence[int]) -> tuple[tuple[str, ...], tuple[ImageLike, ...]]:
        """Returns the replies of steps with action tokens, and the user's images followed by the steps' images."""
        steps = [self._steps[number] for number in numbers]
        generated = tuple(step.image for step in steps if step.image is not None)
        return tuple(step.reasoning + step.action for step in steps), (*self._user_images, *generated)

    def _start(self, pending: PendingReply) -> None:
        """Starts the generation that a reply asks for."""
        self._candidates, self._attempts, self._first_candidate = {}, {}, len(self._steps)
        self._pending, self._num_wanted = pending, self._budget.candidates
        self._is_selection_due = self._mode == "separate"

    def _select_best(self) -> int:
        """Appends the best candidate to the history, drops the others, and returns its number."""
        numbers = range(self._first_candidate, len(self._steps))  # including those whose verdict could not be read
        best = best_step(self._steps[numbers.start :])
        assert best is not None
        chosen = numbers[best]
        for number in numbers:
            if number != chosen:
                self._steps[number] = replace(self._steps[number], rolled_back=True)
        if len(numbers) > 1:
            self._notify(Selected(self.index, chosen, tuple(numbers)))
        self._history.append(chosen)
        return chosen

    def _rollback_target(self) -> int | None:
        """Returns the step that the loop returns to if it may do so once more, else None."""
        target = rollback_target(self._steps, self._history)
        return target if target is not None and self._rollbacks.get(target, 0) < self._budget.max_rollbacks else None

    def _roll_back(self, target: int) -> PendingReply:
        """Drops the history after step `target`; returns the reply that followed it, to be carried out again."""
        # A step is dropped as soon as it is worse than an earlier one, so the best image is always in the history.
        length = self._history.index(target) + 1
        dropped = self._history[length:]
        again = self._steps[dropped[0]]
        for number in dropped:
            self._steps[number] = replace(self._steps[number], rolled_back=True)
        self._notify(RolledBack(self.index, dropped[-1], target))
        self._history = self._history[:length]
        self._rollbacks[target] = self._rollbacks.get(target, 0) + 1
        same = (again.references, again.reasoning)
        redraws = [step.redraw for step in self._steps if (step.references, step.reasoning) == same]
        return PendingReply(Reply(again.reasoning, again.action), again.attempts, max(redraws) + 1)

    def _unbooked_seconds(self) -> float:
        """Returns the time since the last call, which the next step is charged for."""
        seconds, self._booked_seconds = self._seconds - self._booked_seconds, self._seconds
        return seconds

    def _finish(self, outcome: str) -> None:
        self._outcome = outcome
        if self._steps:  # the last verification may have led to no step of its own
            last = self._steps[-1]
            self._steps[-1] = replace(last, seconds=last.seconds + self._unbooked_seconds())
