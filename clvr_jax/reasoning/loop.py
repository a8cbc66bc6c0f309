"""The closed loop: plan, generate, verify, correct, for many prompts together.

    c_0 = prompt
    (r_t, a_t) = controller(c_{t-1})
    a_t = <|terminate|>  ->  done
    a_t = <|image_gen|>  ->  x_t = generator(c_{t-1} + r_t),  c_t = c_{t-1} + r_t + x_t
    verifier(x_t) finds every requirement met  ->  accepted; else its report stands beside x_t in c_t

Every round makes one batched call of the controller, the generator and the verifier for all prompts that are not done
(a second one of the generator if several candidates are to be generated at a price that the first must show). What
happens to a prompt depends on its own replies, images and seed only, so that a batch gives the same as one at a time.

Source: arXiv 2605.14876, closed-loop inference. The verifier beside the controller, budgets, several candidates of a
step, and keep-best with roll-back are ours: edits drift, so an image worse than an earlier one is dropped and the reply
that led to it is carried out again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.image_io import ImageLike
from clvr_jax.reasoning.actions import TERMINATE, ParseError, Reply, parse, plan_items
from clvr_jax.reasoning.budget import Account, Budget
from clvr_jax.reasoning.events import Event, Finished, Generated, PlanVerified, Replied, RolledBack, Selected, Verified
from clvr_jax.reasoning.protocols import Controller, Conversation, GeneratedImage, GenerationRequest, ImageGenerator
from clvr_jax.reasoning.trajectory import (
    ACCEPTED,
    GAVE_UP,
    STEP_LIMIT,
    UNPARSEABLE,
    UNVERIFIED,
    Step,
    Trajectory,
    Verdict,
    best_step,
    package_versions,
)
from clvr_jax.reasoning.verification import Verification, VerificationMode, Verifier, plan_text

ROLLBACK_MARGIN = 0.5
"""How much lower the score of an image must be than that of an earlier one before the loop goes back, so that small
differences of probabilities send nobody back. Verdicts count whole items."""


def run(
    prompts: Sequence[str],
    controller: Controller,
    image_generator: ImageGenerator,
    budget: Budget | None = None,
    seeds: int | Sequence[int] = 0,
    on_event: Callable[[Event], None] | None = None,
    *,
    verification: VerificationMode = "controller",
    verifier: Verifier | None = None,
    model: str = "",
    versions: Mapping[str, str] | None = None,
    images: Sequence[Sequence[ImageLike]] | None = None,
) -> list[Trajectory]:
    """Runs the closed loop for a batch of prompts.

    Args:
      prompts: the requests.
      controller: plans, judges and decides.
      drawer: draws and edits.
      budget: limits per prompt; default Budget().
      seeds: one per prompt, or one for all. The place of a prompt in the batch does not enter its random numbers.
      on_event: called with every event as it happens.
      verification: who accepts an image. "separate": `verifier`, which sees each image alone. "controller": the
        controller, by the verdict in its next reply. "none": nobody; the controller's stop ends the run unverified.
      verifier: checks images and plans; needed for, and only for, "separate".
      model: recorded in the trajectories.
      versions: recorded in the trajectories next to package_versions().
      images: the user's own images of each prompt, which its controller and its generator have before all others as
        references; None: there are none. The verifier sees none of them: it checks generated images against the prompt.
    Returns: one trajectory per prompt, in order.
    Raises: ClvrError if the arguments do not fit or a model answers with the wrong number of results.
    """
    if isinstance(prompts, str):
        raise ClvrError("closed loop: prompts must be a list of texts, got one text; wrap it in a list")
    all_seeds = [int(seeds)] * len(prompts) if isinstance(seeds, int | np.integer) else [int(seed) for seed in seeds]
    if len(all_seeds) != len(prompts):
        raise ClvrError(
            f"closed loop: {len(prompts)} prompts but {len(all_seeds)} seeds; give one per prompt or one for all"
        )
    given = [tuple(own) for own in images] if images is not None else [()] * len(prompts)
    if len(given) != len(prompts):
        raise ClvrError(f"closed loop: {len(prompts)} prompts but images for {len(given)}; give a list for each prompt")
    if (verifier is not None) != (verification == "separate"):
        raise ClvrError(f"closed loop: verification {verification!r} with{'' if verifier else 'out'} a verifier")
    notify = on_event or (lambda event: None)
    budget = budget or Budget()
    if verification == "none" and budget.candidates > 1:
        raise UsageError(f"closed loop: verification none cannot choose among {budget.candidates} candidates")
    required: Sequence[tuple[str, ...]] = verifier.derive(prompts) if verifier and prompts else [()] * len(prompts)
    runs = [
        _Run(index, prompt, all_seeds[index], budget, notify, verification, required[index], given[index])
        for index, prompt in enumerate(prompts)
    ]
    recorded = {**package_versions(), **(versions or {})}
    results: dict[int, Trajectory] = {}
    started = time.monotonic()
    active = list(runs)
    while active:
        called = time.monotonic()
        asked = [(state, number, chat) for state in active for number, chat in state.conversations()]
        if asked:
            texts = controller.reply([chat for _, _, chat in asked])
            _check_count("controller", len(texts), len(asked))
            share = (time.monotonic() - called) / len(asked)
            for (state, number, _), text in zip(asked, texts, strict=True):
                state.receive_reply(number, text, share)
        if verifier is not None:
            _verify_plans(active, verifier)
        elapsed = time.monotonic() - started
        for state in active:
            state.decide(elapsed)
        while requests := [(state, request) for state in active for request in state.requests()]:
            called = time.monotonic()
            generated = image_generator.generate([request for _, request in requests])
            _check_count("drawer", len(generated), len(requests))
            share = (time.monotonic() - called) / len(requests)
            for (state, request), generated_image in zip(requests, generated, strict=True):
                state.receive(request, generated_image, share)
        if verifier is not None:
            _verify_images(active, verifier, started)
        for state in active:
            trajectory = state.finished(model, recorded)
            if trajectory is not None:
                results[state.index] = trajectory
                notify(Finished(state.index, trajectory))
        active = [state for state in active if state.index not in results]
    return [results[index] for index in range(len(runs))]


def _verify_plans(active: Sequence[_Run], verifier: Verifier) -> None:
    """Checks the plans that were made in this round."""
    planned = [(state, plan) for state in active if (plan := state.unverified_plan()) is not None]
    if planned:
        called = time.monotonic()
        found = verifier.check_plans([state.required for state, _ in planned], [plan for _, plan in planned])
        _check_count("verifier", len(found), len(planned))
        share = (time.monotonic() - called) / len(planned)
        for (state, _), verification in zip(planned, found, strict=True):
            state.take_plan(verification, share)


def _verify_images(active: Sequence[_Run], verifier: Verifier, started: float) -> None:
    """Checks the images that were generated in this round."""
    made = [(state, number) for state in active for number in state.unverified_images()]
    if made:
        called = time.monotonic()
        found = verifier.check([state.required for state, _ in made], [state.image(number) for state, number in made])
        _check_count("verifier", len(found), len(made))
        share = (time.monotonic() - called) / len(made)
        for (state, number), verification in zip(made, found, strict=True):
            state.take_verification(number, verification, share)
    for state in dict.fromkeys(state for state, _ in made):
        state.select(time.monotonic() - started)


def derive_seed(seed: int, *path: int | str) -> int:
    """A 31-bit seed that depends on `seed` and the path only, the same on every machine."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


_FIRST = -1
"""Stands for the picture that the first reply judges: none."""


@dataclass(frozen=True)
class _Draft:
    """A reply that waits for its pictures."""

    reply: Reply
    attempts: int = 1
    redraw: int = 0


class _Run:
    """One prompt on its way.

    `_path` holds the steps that form the current history, oldest first; `_table` those drawn after it, which are step
    `_group` and what follows, and the reply that each of them got, None if it waits for one.
    """

    def __init__(
        self,
        index: int,
        prompt: str,
        seed: int,
        budget: Budget,
        notify: Callable[[Event], None],
        mode: VerificationMode,
        required: tuple[str, ...],
        given: tuple[ImageLike, ...],
    ):
        self._given = given
        self.index = index
        self.required = required
        self._mode = mode
        self._plans: list[tuple[float, int, _Draft]] = []
        self._is_plan_settled = False
        self._prompt = prompt
        self._seed = seed
        self._budget = budget
        self._account = Account(budget)
        self._notify = notify
        self._steps: list[Step] = []
        self._path: list[int] = []
        self._table: dict[int, _Draft | None] = {_FIRST: None}
        self._group = 0
        self._attempts: dict[int, int] = {}
        self._draft: _Draft | None = None
        self._wanted = 0
        self._rollbacks: dict[int, int] = {}
        self._seconds = 0.0
        self._booked_seconds = 0.0
        self._outcome: str | None = None
        self._error: str | None = None

    def conversations(self) -> list[tuple[int, Conversation]]:
        """What the controller is asked next: the steps to reply to, and the history that leads to each."""
        if self._draft is not None:  # a reply that is carried out again
            return []
        return [(number, self._conversation(number)) for number, draft in self._table.items() if draft is None]

    def receive_reply(self, number: int, text: str, seconds: float) -> None:
        """Takes the controller's reply to the picture of step `number`; one that cannot be read is asked for again."""
        self._seconds += seconds
        attempt = self._attempts.get(number, 0)
        try:
            reply = parse(text, has_image=number != _FIRST)
        except ParseError as error:
            self._notify(Replied(self.index, attempt, text, str(error)))
            self._attempts[number] = attempt + 1
            if attempt < self._budget.max_parse_retries:
                return
            if number == _FIRST and self._plans:  # a plan that misses a requirement is better than none
                self._settle_plan()
                return
            self._error = str(error)
            del self._table[number]
            return
        self._notify(Replied(self.index, attempt, text, None))
        self._table[number] = _Draft(reply, attempts=attempt + 1)
        if number != _FIRST and self._mode == "controller":
            verdict = Verdict(reply.unmet or (), reply.reasoning)
            self._steps[number] = replace(self._steps[number], verdict=verdict)

    def unverified_plan(self) -> str | None:
        """The plan of the first reply, if the verifier has to check it."""
        draft = self._table.get(_FIRST)
        if draft is None or not self.required or draft.reply.action == TERMINATE or self._is_plan_settled:
            return None
        return plan_text(plan_items(draft.reply.reasoning))

    def take_plan(self, verification: Verification, seconds: float) -> None:
        """Keeps the best plan so far; one that misses a requirement is made again while retries are left."""
        self._seconds += seconds
        draft, attempt = self._table[_FIRST], self._attempts.get(_FIRST, 0)
        assert draft is not None
        self._notify(PlanVerified(self.index, attempt, verification))
        # The earliest among equals: later ones are sampled.
        self._plans.append((verification.score, -len(self._plans), draft))
        if verification.accepted or len(self._plans) > self._budget.max_plan_retries:
            self._settle_plan()
        else:
            self._table[_FIRST] = None
            self._attempts[_FIRST] = attempt + 1

    def _settle_plan(self) -> None:
        """Takes the best plan, however good it is."""
        self._table[_FIRST] = max(self._plans, key=lambda plan: plan[:2])[2]
        self._is_plan_settled = True

    def unverified_images(self) -> list[int]:
        """The images on the table that the verifier has not seen; none if nobody is to look."""
        if self._outcome is not None:
            return []
        return [number for number in self._table if number != _FIRST and self._steps[number].verification is None]

    def image(self, number: int) -> ImageLike:
        """The image of a step."""
        image = self._steps[number].image
        assert image is not None
        return image

    def take_verification(self, number: int, verification: Verification, seconds: float) -> None:
        """Takes what the verifier found out about an image."""
        self._seconds += seconds
        self._steps[number] = replace(self._steps[number], verification=verification)
        self._notify(Verified(self.index, number, verification))

    def select(self, elapsed: float) -> None:
        """Once all images on the table are verified: accepts, goes back, or leaves the best one to the controller."""
        chosen = self._choose()
        self._table = {chosen: None}
        verification = self._steps[chosen].verification
        assert verification is not None
        if verification.accepted:
            self._finish(ACCEPTED)
            return
        limit = self._account.spent(elapsed)
        if limit is not None:
            self._finish(limit)
            return
        place = self._place_to_return_to()
        if place is not None:
            self._begin(self._roll_back(place))

    def decide(self, elapsed: float) -> None:
        """Once all pictures on the table are judged: ends, or takes the best one's reply as what to draw next."""
        if self._draft is not None or self._outcome is not None:
            return
        drafts = {number: draft for number, draft in self._table.items() if draft is not None}
        if len(drafts) < len(self._table):
            return
        if not drafts:
            self._finish(UNPARSEABLE)
            return
        self._error = None  # of a candidate that is not needed
        if _FIRST in drafts:
            draft = drafts[_FIRST]
        else:  # a separate verifier has chosen already
            draft = drafts[self._path[-1] if self._mode == "separate" else self._choose()]
        reply = draft.reply
        verified = self._mode == "controller" and self._budget.stop_when == "verified" and reply.unmet == ()
        if reply.action == TERMINATE or verified:
            self._steps.append(Step(reply.reasoning, TERMINATE, seconds=self._take_seconds(), attempts=draft.attempts))
            self._finish(self._outcome_of_stop(reply))
            return
        if self._mode == "controller":
            place = self._place_to_return_to()
            if place is not None:
                draft = self._roll_back(place)
        limit = self._account.spent(elapsed)
        if limit is not None:
            self._finish(limit)
            return
        self._begin(draft)

    def requests(self) -> list[GenerationRequest]:
        """What to draw now: as many candidates of the next step as can be paid for."""
        if self._draft is None:
            return []
        replies, images = self._history(self._path)
        seeds = [
            derive_seed(self._seed, "draw", len(self._steps) + extra)
            for extra in range(self._account.affordable(self._wanted))
        ]
        replies = (*replies, self._draft.reply.text)
        requests = [GenerationRequest(self._prompt, replies, images, seed, len(self._given)) for seed in seeds]
        if not requests:
            self._draft = None
            if self._budget.stop_when == "drawn":
                self._finish(STEP_LIMIT)
        return requests

    def receive(self, request: GenerationRequest, generated_image: GeneratedImage, seconds: float) -> None:
        """Takes a picture that was asked for."""
        assert self._draft is not None
        self._seconds += seconds
        self._account.charge(generated_image.nfe)
        step = Step(
            reasoning=self._draft.reply.reasoning,
            action=self._draft.reply.action,
            references=tuple(self._path),
            image=generated_image.image,
            nfe=generated_image.nfe,
            seconds=self._take_seconds(),
            attempts=self._draft.attempts,
            redraw=self._draft.redraw + len(self._table),
            seed=request.seed,
            left_out=generated_image.left_out,
        )
        number = len(self._steps)
        self._table[number] = None
        self._wanted -= 1
        self._steps.append(step)
        self._notify(Generated(self.index, number, step))

    def finished(self, model: str, versions: Mapping[str, str]) -> Trajectory | None:
        """The trajectory once the prompt is done, None before."""
        if self._outcome is None:
            return None
        steps = tuple(self._steps)
        return Trajectory(
            self._prompt, steps, self._outcome, model, self._seed, versions, self._seconds, self._error, self._given
        )

    def _conversation(self, number: int) -> Conversation:
        replies, images = self._history(self._path if number == _FIRST else [*self._path, number])
        attempt = self._attempts.get(number, 0)
        seed = derive_seed(self._seed, "reply", number + 1, attempt)
        verification = None if number == _FIRST else self._steps[number].verification
        report = "" if verification is None else verification.report
        return Conversation(self._prompt, replies, images, seed, attempt, report, self.required, len(self._given))

    def _history(self, path: Sequence[int]) -> tuple[tuple[str, ...], tuple[ImageLike, ...]]:
        """Replies with action tokens of some steps; and the user's own images with those of the steps."""
        steps = [self._steps[number] for number in path]
        made = tuple(step.image for step in steps if step.image is not None)
        return tuple(step.reasoning + step.action for step in steps), (*self._given, *made)

    def _begin(self, draft: _Draft) -> None:
        """Makes a reply the one that is carried out next."""
        self._table, self._attempts, self._group = {}, {}, len(self._steps)
        self._draft, self._wanted = draft, self._budget.candidates

    def _outcome_of_stop(self, reply: Reply) -> str:
        """How a run ends that the controller stops."""
        if not self._path:
            return GAVE_UP
        if self._mode == "controller":
            return GAVE_UP if reply.unmet else ACCEPTED
        # A verification that had something to check has not accepted the image, or the run would have ended before.
        return GAVE_UP if self.required else UNVERIFIED

    def _choose(self) -> int:
        """Puts the best image on the table into the history and the others aside; returns its number."""
        numbers = range(self._group, len(self._steps))  # with those whose judgment could not be read
        best = best_step(self._steps[numbers.start :])
        assert best is not None
        chosen = numbers[best]
        for number in numbers:
            if number != chosen:
                self._steps[number] = replace(self._steps[number], rolled_back=True)
        if len(numbers) > 1:
            self._notify(Selected(self.index, chosen, tuple(numbers)))
        self._path.append(chosen)
        return chosen

    def _place_to_return_to(self) -> int | None:
        """The best earlier picture if the latest one is worse and the loop may go back there once more."""
        if not self._path:
            return None
        tip = self._path[-1]
        best, latest = best_step(self._steps[:tip]), self._steps[tip].score
        if best is None or latest is None:
            return None
        best_score = self._steps[best].score
        if best_score is None or latest > best_score - ROLLBACK_MARGIN:
            return None
        return best if self._rollbacks.get(best, 0) < self._budget.max_rollbacks else None

    def _roll_back(self, place: int) -> _Draft:
        """Drops what came after step `place` from the history; returns the reply made there, to be drawn again."""
        # Steps are dropped as soon as they are worse, and only the latest can be better than all before it: the best
        # picture is always part of the current history.
        kept = self._path.index(place) + 1
        dropped = self._path[kept:]
        again = self._steps[dropped[0]]
        for number in dropped:
            self._steps[number] = replace(self._steps[number], rolled_back=True)
        self._notify(RolledBack(self.index, dropped[-1], place))
        self._path = self._path[:kept]
        self._rollbacks[place] = self._rollbacks.get(place, 0) + 1
        said = (again.references, again.reasoning)
        redraws = [step.redraw for step in self._steps if (step.references, step.reasoning) == said]
        return _Draft(Reply(again.reasoning, again.action), again.attempts, max(redraws) + 1)

    def _take_seconds(self) -> float:
        """Time that no step has been charged for yet."""
        seconds, self._booked_seconds = self._seconds - self._booked_seconds, self._seconds
        return seconds

    def _finish(self, outcome: str) -> None:
        self._outcome = outcome
        if self._steps:  # the time of a last verdict that led to no step of its own
            last = self._steps[-1]
            self._steps[-1] = replace(last, seconds=last.seconds + self._take_seconds())


def _check_count(who: str, got: int, expected: int) -> None:
    if got != expected:
        raise ClvrError(f"closed loop: the {who} was asked for {expected} results and returned {got}")
