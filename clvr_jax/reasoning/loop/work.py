"""The pieces of work of the closed loop, and the one function that performs them.

`PromptState.next_work` says what a prompt needs next. A scheduler collects works of one kind from many prompts, calls
`perform`, and asks again: `loop.run` does so in lockstep, the server (`clvr_jax.serving`) whenever a prompt is ready.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from clvr_jax.errors import ClvrError
from clvr_jax.files.image_io import ImageLike
from clvr_jax.reasoning.conversation.protocols import Controller, Conversation, GenerationRequest, ImageGenerator
from clvr_jax.reasoning.verification.verification import Verifier


@dataclass(frozen=True)
class RequirementsWork:
    """The verifier derives the requirements of a prompt."""

    prompt: str


@dataclass(frozen=True)
class ReplyWork:
    """The controller replies to the image of step `number`, or to the prompt if there is no image yet."""

    number: int
    conversation: Conversation


@dataclass(frozen=True)
class PlanWork:
    """The verifier checks a plan against the requirements."""

    requirements: tuple[str, ...]
    plan: str


@dataclass(frozen=True)
class GenerationWork:
    """The image generator generates one image."""

    request: GenerationRequest


@dataclass(frozen=True)
class VerificationWork:
    """The verifier checks the image of step `number` against the requirements."""

    number: int
    requirements: tuple[str, ...]
    image: ImageLike = field(repr=False, compare=False)


Work = RequirementsWork | ReplyWork | PlanWork | GenerationWork | VerificationWork


class Receiver(Protocol):
    """What works belong to: the state of a prompt, or a job that has one."""

    def receive(self, work: Any, result: Any, seconds: float) -> None:
        """Stores the result of a work that took `seconds`."""
        ...


@dataclass(frozen=True)
class Roles:
    """The models that perform works. verifier: None if no separate verifier takes part."""

    controller: Controller
    image_generator: ImageGenerator
    verifier: Verifier | None = None


def perform(batch: Sequence[tuple[Receiver, Work]], roles: Roles, clock: Callable[[], float] = time.monotonic) -> None:
    """Performs works of one kind in one batched call, and hands each state its result.

    Args:
      batch: works, all of the same class, each with the state that it belongs to. A state may occur several times.
      roles: the models.
      clock: the time in seconds; see `loop.run`.
    Raises: ClvrError if a model returns the wrong number of results, and what the models raise. No state is changed
      then, so that a scheduler may perform the same works again in smaller batches.
    """
    called = clock()
    works = [work for _, work in batch]
    who, results = _results(works, roles)
    if len(results) != len(batch):
        raise ClvrError(f"closed loop: the {who} was asked for {len(batch)} results and returned {len(results)}")
    share = (clock() - called) / max(1, len(batch))
    for (state, work), result in zip(batch, results, strict=True):
        state.receive(work, result, share)


def _results(works: Sequence[Any], roles: Roles) -> tuple[str, Sequence[Any]]:
    """Calls the model that performs the works; returns its role and its results."""
    kind = type(works[0])
    if kind is ReplyWork:
        return "controller", roles.controller.reply([work.conversation for work in works])
    if kind is GenerationWork:
        return "image generator", roles.image_generator.generate([work.request for work in works])
    assert roles.verifier is not None
    if kind is RequirementsWork:
        return "verifier", roles.verifier.derive([work.prompt for work in works])
    required = [work.requirements for work in works]
    if kind is PlanWork:
        return "verifier", roles.verifier.check_plans(required, [work.plan for work in works])
    return "verifier", roles.verifier.check(required, [work.image for work in works])
