"""The jobs that a server runs: a loop, a one-shot image, or one reply of the vision-language model."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from clvr_jax.files.image_io import ImageLike
from clvr_jax.pipelines.qwen3_vl import ChatAnswer
from clvr_jax.reasoning.conversation.actions import IMAGE_GEN
from clvr_jax.reasoning.conversation.protocols import GeneratedImage
from clvr_jax.reasoning.loop.budget import Budget
from clvr_jax.reasoning.loop.editable import Branch, EditablePromptState
from clvr_jax.reasoning.loop.events import (
    Edited,
    Event,
    Generated,
    PlanVerified,
    Replied,
    RolledBack,
    Selected,
    Verified,
)
from clvr_jax.reasoning.loop.resumable import ResumablePromptState
from clvr_jax.reasoning.loop.work import GenerationWork
from clvr_jax.reasoning.trajectories.trajectory import (
    CANCELED,
    UNVERIFIED,
    Step,
    Trajectory,
    package_versions,
    step_to_dict,
)
from clvr_jax.reasoning.verification.verification import Verification
from clvr_jax.serving.event_log import EventLog
from clvr_jax.serving.index.records import NewLoop
from clvr_jax.serving.models import ChatWork, OneShotWork, Sampling, ServedModels
from clvr_jax.serving.scheduling.futures import deliver, deliver_error
from clvr_jax.serving.scheduling.scheduler import Task

Mode = Literal["loop", "one-shot"]
INTERRUPTED = "interrupted"
"""Status of a loop that the end of the server cut off."""


@dataclass(frozen=True)
class LoopSpec:
    """A loop to run.

    Attributes:
      prompt, seed, images: see `reasoning.loop.run`.
      mode: "one-shot" generates one image from the prompt itself, without plan and verification.
      budget: limits of the loop.
      sampling: how its images are generated.
      request: the fields of the HTTP request that are stored with the loop, as JSON values.
      branch: what the loop takes over from another one.
    """

    prompt: str
    seed: int
    mode: Mode = "loop"
    budget: Budget = Budget()
    sampling: Sampling = Sampling()
    images: tuple[ImageLike, ...] = field(default=(), repr=False, compare=False)
    request: Mapping[str, Any] = field(default_factory=dict)
    branch: Branch | None = field(default=None, repr=False)


class OneShotState:
    """The state of a one-shot image, with the methods of `PromptState` that a job calls."""

    def __init__(self, spec: LoopSpec, notify: Callable[[Event], None]):
        self._spec, self._notify = spec, notify
        self._step: Step | None = None
        self._outcome: str | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """The step of the image once it is generated."""
        return () if self._step is None else (self._step,)

    @property
    def best(self) -> int | None:
        """0 once there is an image."""
        return None if self._step is None else 0

    def next_work(self, elapsed: float) -> Sequence[OneShotWork]:
        """Returns the generation; [] once it is done."""
        spec = self._spec
        return [] if self._outcome is not None else [OneShotWork(spec.prompt, spec.images, spec.seed)]

    def receive(self, work: OneShotWork, result: GeneratedImage, seconds: float) -> None:
        """Stores the image, which took `seconds`."""
        self._step = Step("", IMAGE_GEN, image=result.image, nfe=result.nfe, seconds=seconds, seed=work.seed)
        self._outcome = UNVERIFIED
        self._notify(Generated(0, 0, self._step))

    def stop(self, outcome: str) -> None:
        """Ends without an image."""
        self._outcome = self._outcome or outcome

    def finished(self, model: str, versions: Mapping[str, str]) -> Trajectory | None:
        """Returns the trajectory at the end, None before."""
        if self._outcome is None:
            return None
        spec, seconds = self._spec, sum(step.seconds for step in self.steps)
        given = tuple(spec.images)
        return Trajectory(
            spec.prompt, self.steps, self._outcome, model, spec.seed, versions, seconds, given_images=given
        )


class LoopJob:
    """A loop, or a one-shot image, as a job of the scheduler.

    Args:
      spec: what to run.
      models: of the server.
      log: receives the events.
      on_end: (job, trajectory, error) is called by the device thread at the end; one of the last two is None.
      on_turn: called by the device thread with the job before each of its works.

    Attributes:
      state: the loop's own state, which only the device thread changes.
      started: when its first work began, in seconds; None while it waits.
      elapsed: seconds since then, without those between two replicas that ran it.
      result: the trajectory, once it is stored.
      is_interrupted: whether the end of the server stopped the loop.
    """

    def __init__(
        self,
        spec: LoopSpec,
        models: ServedModels,
        log: EventLog,
        on_end: Callable[[LoopJob, Trajectory | None, BaseException | None], None],
        on_turn: Callable[[LoopJob], None] = lambda _: None,
    ):
        self.id = f"loop_{secrets.token_hex(12)}"
        self.spec, self.log, self._models, self._on_end, self._on_turn = spec, log, models, on_end, on_turn
        self.created = time.time()
        self.started: float | None = None
        self.elapsed = self._earlier = 0.0
        self.result: Future[Trajectory] = Future()
        self.is_interrupted = False
        self._best: int | None = None
        self._requirements: tuple[str, ...] = ()
        self._generations: tuple[int, Sequence[Any]] = 0, ()
        self.state: ResumablePromptState | OneShotState
        if spec.mode == "one-shot":
            self.state = OneShotState(spec, self._notify)
        else:
            self.state = ResumablePromptState(
                0, spec.prompt, spec.seed, spec.budget, self._notify, spec.images, spec.branch
            )

    @property
    def best(self) -> int | None:
        """The number of the step with the best image so far; None if there is no image."""
        return self.state.best

    def listing(self) -> NewLoop:
        """Returns what the index has about a loop that was just accepted."""
        spec = self.spec
        return NewLoop(self.id, self.created, spec.mode, spec.prompt, self._models.name, spec.seed, spec.request)

    def tasks(self, elapsed: float) -> list[Task]:
        """Returns the next works with their keys."""
        self.elapsed = self._earlier + elapsed
        if self.started is None:
            self.started = time.time()
            self.log.append("started")
            if self.spec.branch is not None:
                parent = self.spec.branch.parent
                self.log.append("branched", parent=parent.id, step=parent.step, images=parent.inherited,
                                instruction=self.spec.branch.instruction, steps=self._inherited_steps())  # fmt: skip
        works: Sequence[Any] = self.state.next_work(self.elapsed)
        if isinstance(self.state, EditablePromptState) and self.state.required != self._requirements:
            self._requirements = self.state.required
            self.log.append("requirements", requirements=list(self.state.required))
        if (best := self.best) is not None and best != self._best:
            self._best = best
            self.log.append("best", step=best)
        if works and isinstance(works[0], GenerationWork | OneShotWork):
            steps = self.spec.sampling.steps or self._models.flux.settings.num_inference_steps
            replies = works[0].request.replies if isinstance(works[0], GenerationWork) else ("",)
            self.log.append("generation_started", step=len(self.state.steps), images=len(works),
                            num_inference_steps=steps, text=replies[-1])  # fmt: skip
            self._generations = len(self.state.steps), works
        if works:
            self._on_turn(self)
        return [Task(self._models.key(work, self.spec.sampling), self, work) for work in works]

    def resume(self, loop_id: str, created: float, started: float | None, elapsed: float) -> None:
        """Continues a loop of another replica, whose state was restored, under its id. Arguments: as the attributes."""
        self.id, self.created, self.started, self._earlier = loop_id, created, started, elapsed
        self._best = self.best
        if isinstance(self.state, EditablePromptState):
            self._requirements = self.state.required

    def receive(self, work: Any, result: Any, seconds: float) -> None:
        """Passes the result of a work on to the loop."""
        self.state.receive(work, result, seconds)

    def progress(self, work: Any, done: int, steps: int) -> None:
        """Reports a denoising step that is done."""
        first, works = self._generations
        number = next(index for index, each in enumerate(works) if each is work)
        if done:
            self.log.append("denoising_step", step=first + number, done=done, num_inference_steps=steps)

    def stop(self, outcome: str) -> None:
        """Ends the loop with its best image so far."""
        self.is_interrupted = outcome == INTERRUPTED
        self.state.stop(CANCELED if self.is_interrupted else outcome)

    def end(self) -> None:
        """Passes the trajectory on."""
        trajectory = self.state.finished(self._models.name, package_versions())
        assert trajectory is not None
        self._on_end(self, trajectory, None)

    def fail(self, error: BaseException) -> None:
        """Passes an error on."""
        self._on_end(self, None, error)

    def _inherited_steps(self) -> list[dict[str, Any]]:
        """Returns the steps that a branch begins with, as GET /v1/loops/{id} shows them."""
        found = []
        for number, step in enumerate(self.state.steps):
            shown = step_to_dict(step, f"{self.id}_{number}")
            found.append({**shown, "image_id": shown.pop("image")})
        return found

    def _notify(self, event: Event) -> None:
        """Translates an event of the loop for those who follow it."""
        if isinstance(event, Replied):
            is_plan = not self.state.steps
            kind = "plan" if is_plan else "decision"
            self.log.append(kind, text=event.text, attempt=event.attempt, error=event.error)
        elif isinstance(event, PlanVerified):
            self.log.append("plan_verification", attempt=event.attempt, **_shown(event.verification))
        elif isinstance(event, Generated):
            step = event.step
            self.log.append("image", step=event.number, image_id=f"{self.id}_{event.number}", nfe=step.nfe,
                            seconds=round(step.seconds, 4), redraw=step.redraw, left_out=step.left_out)  # fmt: skip
            inherited = self.spec.branch.parent.inherited if self.spec.branch else 0
            own = self.state.steps[inherited:]
            nfe, images = sum(each.nfe for each in own), sum(each.image is not None for each in own)
            self.log.append("budget", images=images, max_steps=self.spec.budget.max_steps, nfe=nfe,
                            max_nfe=self.spec.budget.max_nfe, max_seconds=self.spec.budget.max_seconds)  # fmt: skip
        elif isinstance(event, Verified):
            self.log.append("verification", step=event.number, accepted=event.verification.accepted,
                            **_shown(event.verification))  # fmt: skip
        elif isinstance(event, Selected):
            self.log.append("selected", step=event.number, among=list(event.among))
        elif isinstance(event, RolledBack):
            self.log.append("rolled_back", step=event.number, to=event.to)
        elif isinstance(event, Edited):
            given = {name: value for name, value in event.edit.to_dict().items() if value not in (None, [])}
            self.log.append("edited", **given)


class ChatJob:
    """One reply of the vision-language model as a job of the scheduler. result: the reply."""

    def __init__(self, work: ChatWork, models: ServedModels):
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = time.time()
        self.result: Future[ChatAnswer] = Future()
        self._work, self._models = work, models
        self._answer: ChatAnswer | None = None
        self._is_stopped = False

    def tasks(self, elapsed: float) -> list[Task]:
        """Returns the one work; [] once it is done."""
        if self._answer is not None or self._is_stopped:
            return []
        return [Task(self._models.key(self._work, Sampling()), self, self._work)]

    def receive(self, work: ChatWork, result: ChatAnswer, seconds: float) -> None:
        """Stores the reply."""
        self._answer = result

    def progress(self, work: ChatWork, done: int, steps: int) -> None:
        """Is not called: a reply has no denoising steps."""

    def stop(self, outcome: str) -> None:
        """Ends without a reply."""
        self._is_stopped = True

    def end(self) -> None:
        """Passes the reply on."""
        if self._answer is None:
            self.result.cancel()
        else:
            deliver(self.result, self._answer)

    def fail(self, error: BaseException) -> None:
        """Passes an error on."""
        deliver_error(self.result, error)


def _shown(verification: Verification) -> dict[str, Any]:
    shown = {"description": verification.description, "report": verification.report, "verifier": verification.verifier}
    return {**shown, "requirements": verification.to_dict()["requirements"]}
