"""The planning benchmark: does the controller's plan meet the prompt, before any image is generated?

The plan is made as the loop makes it: requirements are derived, the controller plans for them, the verifier checks the
plan, and a plan that misses a requirement is sampled again. The loop then "generates" a blank canvas, which costs
nothing. Each plan is also scored against the next prompt with as many objects, which is the control: a score that is as
high there says nothing about planning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TypedDict

import numpy as np

from clvr_jax.data.shapes import Canvas
from clvr_jax.display.console import progress
from clvr_jax.display.tables import Table, plain
from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.statistics import Rate, RateResult, wilson_interval
from clvr_jax.files.json_input import JSON
from clvr_jax.reasoning.conversation.protocols import Controller, GeneratedImage, GenerationRequest, ImageGenerator
from clvr_jax.reasoning.loop import loop
from clvr_jax.reasoning.loop.budget import Budget
from clvr_jax.reasoning.verification.verification import Verifier
from clvr_jax.worlds.shapes.check import check
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.layout import PlannedObject
from clvr_jax.worlds.shapes.metadata import Metadata, has_held_out_pair
from clvr_jax.worlds.shapes.oracle import parse_plan
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.requirements import check_requirement, requirements
from clvr_jax.worlds.shapes.scene import BACKGROUND, CANVAS, Scene, place

BENCHMARK = "planning"
BATCH_SIZE = 64
CONTROL = "plans of other prompts (control)"
COLUMNS = ("", "requirements exact", "plan right", "plan meets the exact requirements")


@dataclass(frozen=True)
class PlannedPrompt:
    """A prompt and the plan for it.

    Attributes:
      prompt: the prompt.
      objects: number of objects that it asks for.
      has_held_out: whether it names a pair of color and shape that no training data combine.
      requirements: as the verifier derives them; None if the run ended before they were used.
      plan: the plan as the controller words it; "" if there is none that can be read.
      is_exact: whether the derived requirements are the exact ones, in any order.
      is_right: whether a rendering of the plan is right by the detector.
      meets_requirements: whether the plan meets every exact requirement, that on the number of all objects included.
    """

    prompt: str
    objects: int
    has_held_out: bool
    requirements: tuple[str, ...] | None
    plan: str
    is_exact: bool
    is_right: bool
    meets_requirements: bool


class PlanRates(TypedDict):
    """The rates of a group of prompts; see the fields of `PlannedPrompt`."""

    requirements_exact: RateResult
    right: RateResult
    meets_requirements: RateResult


class PlanningResults(TypedDict):
    """The content of results.json; `plans` has the fields of `PlannedPrompt`."""

    benchmark: str
    model: str
    prompts: str
    seed: int
    retries: int
    summary: dict[str, PlanRates]
    plans: list[dict[str, JSON]]


class BlankCanvas(ImageGenerator):
    """An image generator that returns the empty canvas and evaluates no network."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GeneratedImage]:
        """Returns one blank image for each request."""
        return [GeneratedImage(np.full((CANVAS, CANVAS, 3), BACKGROUND, np.uint8), 0) for _ in requests]


def plan_prompts(
    controller: Controller,
    verifier: Verifier,
    prompts: Sequence[Metadata],
    *,
    retries: int = Budget().max_plan_retries,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> list[PlannedPrompt]:
    """Plans each prompt as the closed loop does.

    Args:
      controller, verifier: of the loop.
      prompts: metadata of the shapes world.
      retries: how often a plan that misses a requirement is sampled again.
      seed: of the samples.
      batch_size: prompts that are planned together; it changes only speed and memory.
    """
    budget = Budget(max_steps=1, max_plan_retries=retries)
    planned: list[PlannedPrompt] = []
    with progress("planning benchmark", len(prompts)) as advance:
        for begin in range(0, len(prompts), batch_size):
            batch = prompts[begin : begin + batch_size]
            trajectories = loop.run(
                [each["prompt"] for each in batch],
                controller,
                BlankCanvas(),
                budget,
                seed,
                verification="separate",
                verifier=verifier,
            )
            for metadata, trajectory in zip(batch, trajectories, strict=True):
                first = trajectory.steps[0] if trajectory.steps else None
                verification = None if first is None else first.verification
                derived = None if verification is None else tuple(each.text for each in verification.requirements)
                planned.append(_judged(metadata, derived, "" if first is None else first.reasoning, seed))
            advance(len(planned))
    return planned


def _judged(metadata: Metadata, derived: tuple[str, ...] | None, reply: str, seed: int) -> PlannedPrompt:
    exact = {str(each) for each in requirements(metadata)}
    plan = _read_plan(reply)
    return PlannedPrompt(
        metadata["prompt"],
        _objects(metadata),
        has_held_out_pair(metadata),
        derived,
        "; ".join(map(str, plan)),
        derived is not None and set(derived) == exact,
        *is_right(plan, metadata, seed),
    )


def _read_plan(reply: str) -> tuple[PlannedObject, ...]:
    try:
        return parse_plan(reply)
    except ClvrError:
        return ()


def _objects(metadata: Metadata) -> int:
    return sum(item["count"] for item in metadata["include"])


def is_right(plan: Sequence[PlannedObject], metadata: Metadata, seed: int = 0) -> tuple[bool, bool]:
    """Returns whether a plan meets a prompt: by the detector on a rendering of it, and by the exact requirements."""
    rng = np.random.default_rng(seed)
    scene = Scene(tuple(place(item.color, item.shape, item.cell, rng) for item in plan))
    reading = Canvas(scene).reading()
    met = all(check_requirement(each, reading)[1] for each in requirements(metadata))
    return bool(plan) and check(detect(render(scene)), metadata).correct, bool(plan) and met


def shifted(planned: Sequence[PlannedPrompt], prompts: Sequence[Metadata]) -> list[PlannedPrompt]:
    """Scores each plan against the next prompt with as many objects: the control."""
    by_objects: dict[int, list[int]] = {}
    for index, each in enumerate(planned):
        by_objects.setdefault(each.objects, []).append(index)
    found = []
    for rows in by_objects.values():
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
            if row != other:
                found.append(_judged(prompts[other], planned[row].requirements, f"Plan: {planned[row].plan}.", 0))
    return found


def summarize(planned: Sequence[PlannedPrompt], control: Sequence[PlannedPrompt]) -> dict[str, PlanRates]:
    """Rates with Wilson 95 % intervals: of all prompts, by number of objects, by held-out pairs, and of the control."""
    groups: dict[str, list[PlannedPrompt]] = {"all": list(planned)}
    for number in sorted({each.objects for each in planned}):
        groups[f"{number} objects"] = [each for each in planned if each.objects == number]
    groups["held-out pairs"] = [each for each in planned if each.has_held_out]
    groups["other pairs"] = [each for each in planned if not each.has_held_out]
    groups[CONTROL] = list(control)
    return {name: _rates(rows) for name, rows in groups.items() if rows}


def _rates(rows: Sequence[PlannedPrompt]) -> PlanRates:
    def rate(flags: Iterable[bool]) -> RateResult:
        count = sum(flags)
        return Rate(count, len(rows), wilson_interval(count, len(rows))).to_json()

    return {
        "requirements_exact": rate(each.is_exact for each in rows),
        "right": rate(each.is_right for each in rows),
        "meets_requirements": rate(each.meets_requirements for each in rows),
    }


def planning_table(results: PlanningResults) -> Table:
    """Returns the summary of results as a table."""
    rows = [
        (name, *map(_cell, (rates["requirements_exact"], rates["right"], rates["meets_requirements"])))
        for name, rates in results["summary"].items()
    ]
    return Table(COLUMNS, [rows], title=f"Planning benchmark: {results['model']}")


def _cell(rate: RateResult) -> str:
    low, high = rate["interval"]
    return f"{rate['rate']:.3f} [{low:.3f}, {high:.3f}] of {rate['of']}"


def markdown(results: PlanningResults) -> str:
    """Returns the results as Markdown."""
    lines = [
        f"# Planning benchmark: {plain(results['model'])}",
        "",
        f"Prompts: {plain(results['prompts'])}, seed {results['seed']}, plans sampled again at most "
        f"{results['retries']} times. In brackets 95 % intervals (Wilson), then the number of prompts. A plan is right "
        "if the detector accepts a rendering of it, which forgives objects that nobody asked for.",
        "",
        *planning_table(results).markdown(),
    ]
    return "\n".join(lines) + "\n"


def results(
    planned: Sequence[PlannedPrompt],
    metadata: Sequence[Metadata],
    *,
    model: str,
    prompts: str,
    seed: int,
    retries: int,
) -> PlanningResults:
    """Returns the content of results.json."""
    return {
        "benchmark": BENCHMARK,
        "model": model,
        "prompts": prompts,
        "seed": seed,
        "retries": retries,
        "summary": summarize(planned, shifted(planned, metadata)),
        "plans": [asdict(each) for each in planned],
    }
