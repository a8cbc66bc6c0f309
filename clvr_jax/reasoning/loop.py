"""The closed loop: plan, draw, look, correct, for many prompts together.

    c_0 = prompt
    (r_t, a_t) = controller(c_{t-1})        r_t also holds the verdict on picture t - 1
    a_t = <|terminate|>  ->  done
    a_t = <|image_gen|>  ->  x_t = drawer(c_{t-1} + r_t),  c_t = c_{t-1} + r_t + x_t

Every round makes one batched controller call and one batched drawer call for all prompts that are not done. What
happens to a prompt depends on its own replies, pictures and seed only, so that a batch gives the same as one at a time.

Source: arXiv 2605.14876, closed-loop inference. Budgets and keep-best with roll-back are ours: edits drift, so a
picture that is worse than an earlier one is dropped and the reply that led to it is drawn again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.reasoning.actions import TERMINATE, ParseError, Reply, parse
from clvr_jax.reasoning.budget import Account, Budget
from clvr_jax.reasoning.events import Drawn, Event, Finished, Replied, RolledBack
from clvr_jax.reasoning.images import Picture
from clvr_jax.reasoning.protocols import Controller, Conversation, Drawer, Drawing, DrawRequest
from clvr_jax.reasoning.trajectory import (
    ACCEPTED,
    GAVE_UP,
    UNPARSEABLE,
    Step,
    Trajectory,
    Verdict,
    best_step,
    package_versions,
)


def run(
    prompts: Sequence[str],
    controller: Controller,
    drawer: Drawer,
    budget: Budget | None = None,
    seeds: int | Sequence[int] = 0,
    on_event: Callable[[Event], None] | None = None,
    *,
    model: str = "",
    versions: Mapping[str, str] | None = None,
) -> list[Trajectory]:
    """Runs the closed loop for a batch of prompts.

    Args:
      prompts: the requests.
      controller: plans, judges and decides.
      drawer: draws and edits.
      budget: limits per prompt; default Budget().
      seeds: one per prompt, or one for all. The place of a prompt in the batch does not enter its random numbers.
      on_event: called with every event as it happens.
      model: recorded in the trajectories.
      versions: recorded in the trajectories next to package_versions().
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
    notify = on_event or (lambda event: None)
    budget = budget or Budget()
    runs = [_Run(index, prompt, all_seeds[index], budget, notify) for index, prompt in enumerate(prompts)]
    recorded = {**package_versions(), **(versions or {})}
    results: dict[int, Trajectory] = {}
    started = time.monotonic()
    active = list(runs)
    while active:
        called = time.monotonic()
        texts = controller.reply([state.conversation() for state in active])
        _check_count("controller", len(texts), len(active))
        share = (time.monotonic() - called) / len(active)
        elapsed = time.monotonic() - started
        asked = [(state, state.hear(text, share, elapsed)) for state, text in zip(active, texts, strict=True)]
        requests = [(state, request) for state, request in asked if request is not None]
        if requests:
            called = time.monotonic()
            drawings = drawer.draw([request for _, request in requests])
            _check_count("drawer", len(drawings), len(requests))
            share = (time.monotonic() - called) / len(requests)
            for (state, request), drawing in zip(requests, drawings, strict=True):
                state.receive(request, drawing, share)
        for state in active:
            trajectory = state.finished(model, recorded)
            if trajectory is not None:
                results[state.index] = trajectory
                notify(Finished(state.index, trajectory))
        active = [state for state in active if state.index not in results]
    return [results[index] for index in range(len(runs))]


def derive_seed(seed: int, *path: int | str) -> int:
    """A 31-bit seed that depends on `seed` and the path only, the same on every machine."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


@dataclass(frozen=True)
class _Draft:
    """A step that waits for its picture."""

    reply: Reply
    attempts: int = 1
    redraw: int = 0


class _Run:
    """One prompt on its way. `_path` holds the steps that form the current history, oldest first."""

    def __init__(self, index: int, prompt: str, seed: int, budget: Budget, notify: Callable[[Event], None]):
        self.index = index
        self._prompt = prompt
        self._seed = seed
        self._budget = budget
        self._account = Account(budget)
        self._notify = notify
        self._steps: list[Step] = []
        self._path: list[int] = []
        self._draft: _Draft | None = None
        self._rollbacks: dict[int, int] = {}
        self._attempt = 0
        self._seconds = 0.0
        self._booked_seconds = 0.0
        self._outcome: str | None = None
        self._error: str | None = None

    def conversation(self) -> Conversation:
        """What the controller is asked next."""
        replies, images = self._history()
        seed = derive_seed(self._seed, "reply", len(self._steps), self._attempt)
        return Conversation(self._prompt, replies, images, seed, self._attempt)

    def hear(self, text: str, seconds: float, elapsed: float) -> DrawRequest | None:
        """Takes the controller's reply; returns what to draw now, None if nothing (done, or to be asked again)."""
        self._seconds += seconds
        try:
            reply = parse(text, has_picture=bool(self._path))
        except ParseError as error:
            self._notify(Replied(self.index, self._attempt, text, str(error)))
            self._attempt += 1
            if self._attempt > self._budget.max_parse_retries:
                self._finish(UNPARSEABLE, str(error))
            return None
        self._notify(Replied(self.index, self._attempt, text, None))
        draft = _Draft(reply, attempts=self._attempt + 1)
        self._attempt = 0
        if self._path:
            tip = self._path[-1]
            self._steps[tip] = replace(self._steps[tip], verdict=Verdict(reply.unmet or (), reply.reasoning))
        if reply.action == TERMINATE:
            self._steps.append(Step(reply.reasoning, TERMINATE, seconds=self._take_seconds(), attempts=draft.attempts))
            self._finish(ACCEPTED if self._path and not reply.unmet else GAVE_UP)
            return None
        place = self._place_to_return_to()
        if place is not None:
            draft = self._roll_back(place)
        limit = self._account.spent(elapsed)
        if limit is not None:
            self._finish(limit)
            return None
        self._draft = draft
        replies, images = self._history()
        seed = derive_seed(self._seed, "draw", len(self._steps))
        return DrawRequest(self._prompt, (*replies, draft.reply.text), images, seed)

    def receive(self, request: DrawRequest, drawing: Drawing, seconds: float) -> None:
        """Takes the picture that was asked for."""
        assert self._draft is not None
        self._seconds += seconds
        self._account.charge(drawing.nfe)
        step = Step(
            reasoning=self._draft.reply.reasoning,
            action=self._draft.reply.action,
            references=tuple(self._path),
            image=drawing.image,
            nfe=drawing.nfe,
            seconds=self._take_seconds(),
            attempts=self._draft.attempts,
            redraw=self._draft.redraw,
            seed=request.seed,
        )
        self._path.append(len(self._steps))
        self._steps.append(step)
        self._notify(Drawn(self.index, self._path[-1], step))

    def finished(self, model: str, versions: Mapping[str, str]) -> Trajectory | None:
        """The trajectory once the prompt is done, None before."""
        if self._outcome is None:
            return None
        return Trajectory(
            self._prompt, tuple(self._steps), self._outcome, model, self._seed, versions, self._seconds, self._error
        )

    def _history(self) -> tuple[tuple[str, ...], tuple[Picture, ...]]:
        """Replies with action tokens and pictures of the current history."""
        steps = [self._steps[number] for number in self._path]
        return tuple(step.reasoning + step.action for step in steps), tuple(
            step.image for step in steps if step.image is not None
        )

    def _place_to_return_to(self) -> int | None:
        """The best earlier picture if the latest one is worse and the loop may go back there once more."""
        if not self._path:
            return None
        tip = self._path[-1]
        best, latest = best_step(self._steps[:tip]), self._steps[tip].verdict
        if best is None or latest is None:
            return None
        best_verdict = self._steps[best].verdict
        if best_verdict is None or latest.score <= best_verdict.score:
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
        return _Draft(Reply(again.reasoning, again.action), again.attempts, again.redraw + 1)

    def _take_seconds(self) -> float:
        """Time that no step has been charged for yet."""
        seconds, self._booked_seconds = self._seconds - self._booked_seconds, self._seconds
        return seconds

    def _finish(self, outcome: str, error: str | None = None) -> None:
        self._outcome, self._error = outcome, error
        if self._steps:  # the time of a last verdict that led to no step of its own
            last = self._steps[-1]
            self._steps[-1] = replace(last, seconds=last.seconds + self._take_seconds())


def _check_count(who: str, got: int, expected: int) -> None:
    if got != expected:
        raise ClvrError(f"closed loop: the {who} was asked for {expected} results and returned {got}")
