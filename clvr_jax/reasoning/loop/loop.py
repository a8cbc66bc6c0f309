"""The closed loop: plan, generate, verify, correct, for many prompts together.

    c_0 = prompt
    (r_t, a_t) = controller(c_{t-1})
    a_t = <|terminate|>  ->  done
    a_t = <|image_gen|>  ->  x_t = generator(c_{t-1} + r_t),  c_t = c_{t-1} + r_t + x_t
    verifier(x_t) finds every requirement met  ->  accepted; else its report is added to x_t in c_t

Every round makes one batched call of the controller, the generator and the verifier for all prompts that are not done.
The generator is called twice if a limit on NFE applies to several candidates: the first image shows what one costs. The
result of a prompt depends on its own replies, images and seed only, so a batch gives the same images as single prompts.

Source: arXiv 2605.14876, closed-loop inference. Our additions are the separate verifier, budgets, several candidates
per step, and roll-back: an image that is worse than an earlier one is dropped, and the reply before it is carried out
again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.image_io import ImageLike
from clvr_jax.reasoning.conversation.protocols import Controller, ImageGenerator
from clvr_jax.reasoning.loop.budget import Budget
from clvr_jax.reasoning.loop.events import Event, Finished
from clvr_jax.reasoning.loop.prompt_state import PromptState
from clvr_jax.reasoning.loop.work import (
    GenerationWork,
    PlanWork,
    ReplyWork,
    RequirementsWork,
    Roles,
    VerificationWork,
    Work,
    perform,
)
from clvr_jax.reasoning.trajectories.trajectory import Trajectory, package_versions
from clvr_jax.reasoning.verification.verification import VerificationMode, Verifier


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
    clock: Callable[[], float] = time.monotonic,
) -> list[Trajectory]:
    """Runs the closed loop for a batch of prompts.

    Args:
      prompts: the requests.
      controller: plans, judges and decides.
      image_generator: generates and edits images.
      budget: limits per prompt; default Budget().
      seeds: one per prompt, or one for all. The position of a prompt in the batch does not enter its random numbers.
      on_event: called with every event when it happens.
      verification: who accepts an image. "separate": `verifier`, which sees each image alone. "controller": the
        controller, by the verdict in its next reply. "none": nobody; the controller's stop ends the run unverified.
      verifier: checks images and plans; needed for, and only for, "separate".
      model: recorded in the trajectories.
      versions: recorded in the trajectories next to package_versions().
      images: the user's own images for each prompt, or None. The controller and the generator see them before all
        generated images. The verifier does not: it checks generated images against the prompt.
      clock: seconds, for the limit on them and for the trajectories. Processes that run the loop together share one.
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
    states = [
        PromptState(index, prompt, all_seeds[index], budget, notify, verification, given[index])
        for index, prompt in enumerate(prompts)
    ]
    recorded = {**package_versions(), **(versions or {})}
    roles = Roles(controller, image_generator, verifier)
    _perform_all(states, RequirementsWork, roles, 0.0, clock)
    results: dict[int, Trajectory] = {}
    started = clock()
    active = list(states)
    while active:
        for kind in (ReplyWork, PlanWork):
            _perform_all(active, kind, roles, clock() - started, clock)
        # Several calls if a limit on NFE applies to several candidates: the first image shows what one costs.
        while _perform_all(active, GenerationWork, roles, clock() - started, clock):
            pass
        _perform_all(active, VerificationWork, roles, clock() - started, clock)
        elapsed = clock() - started
        for state in active:
            state.next_work(elapsed)  # accepts or rejects what was verified
        for state in active:
            trajectory = state.finished(model, recorded)
            if trajectory is not None:
                results[state.index] = trajectory
                notify(Finished(state.index, trajectory))
        active = [state for state in active if state.index not in results]
    return [results[index] for index in range(len(states))]


def _perform_all(
    states: Sequence[PromptState], kind: type[Work], roles: Roles, elapsed: float, clock: Callable[[], float]
) -> bool:
    """Performs the next works of this kind of all states in one call; returns whether there were any."""
    works = [(state, work) for state in states for work in state.next_work(elapsed) if isinstance(work, kind)]
    if works:
        perform(works, roles, clock)
    return bool(works)
