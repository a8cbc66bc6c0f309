"""Systems behind endpoints: any image tool alone, or planned by any vision-language model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from clvr_jax.errors import UsageError
from clvr_jax.evaluation.drawn import Drawn
from clvr_jax.evaluation.systems import Mode, System, described, limits_of
from clvr_jax.providers.loop_roles import MAX_REPLY_TOKENS, REWRITE_PROMPT, AskedController, ToolDrawer
from clvr_jax.reasoning.budget import Budget
from clvr_jax.reasoning.loop import run
from clvr_jax.reasoning.tools import ImageTask, ImageTool, ProviderError, Usage, VisionLanguageModel

_WAVES = 8


def endpoint_system(
    tool: ImageTool,
    mode: Mode = "one-shot",
    budget: Budget | None = None,
    controller: VisionLanguageModel | None = None,
    in_flight: int = 16,
    controller_tokens: int | None = None,
) -> System:
    """An image tool as a system. Prompts are drawn side by side, each with a bill of its own.

    A prompt that the tool's policy refuses has no picture and counts as wrong; every other failure ends the run, which
    can go on later. No reply of the controller, or one that is cut, is such a failure.

    Args:
      tool: draws, e.g. an `OpenAIImageTool`.
      mode: see `systems.planned`; "one-shot" sends the prompt as it is.
      budget: limits per prompt.
      controller: plans and judges, told how by the loop's contract; for all modes but one-shot.
      in_flight: prompts at a time.
      controller_tokens: most tokens of a reply of the controller, for models that think first.
    """
    settings: dict[str, Any] = {"mode": mode, "model": tool.name}
    if mode == "one-shot":
        return _side_by_side(lambda prompt, seed: _one_shot(tool, prompt, seed), settings, tool.name, in_flight)
    if controller is None:
        raise UsageError(f"{mode} needs a controller that plans; give a vision-language model")
    limits = limits_of(mode, budget)
    tokens = controller_tokens or MAX_REPLY_TOKENS
    plan_prompt = None if mode == "closed-loop" else REWRITE_PROMPT

    def draw(prompt: str, seed: int) -> Drawn:
        drawer, asked = ToolDrawer(tool), AskedController(controller, plan_prompt, tokens)
        try:
            (trajectory,) = run([prompt], asked, drawer, limits, seed, model=tool.name)
        except ProviderError as error:
            return _refused(error, drawer.usage + asked.usage)
        usage = drawer.usage + asked.usage
        return replace(Drawn.of(trajectory), nfe=usage.nfe or None, usage=usage)

    settings |= {"controller": controller.name, **described(limits)}
    if controller_tokens is not None:
        settings["controller_tokens"] = controller_tokens
    return _side_by_side(draw, settings, tool.name, in_flight)


def _one_shot(tool: ImageTool, prompt: str, seed: int) -> Drawn:
    try:
        made = tool.draw(ImageTask(prompt, seed=seed))
    except ProviderError as error:
        return _refused(error, error.usage)
    return Drawn(made.image, made.usage.nfe or None, made.usage)


def _refused(error: ProviderError, usage: Usage) -> Drawn:
    if error.fault != "refused":
        raise error
    return Drawn(None, usage=usage, outcome="refused")


def _side_by_side(draw: Callable[[str, int], Drawn], settings: dict[str, Any], device: str, in_flight: int) -> System:
    def timed(prompt: str, seed: int) -> Drawn:
        began = time.monotonic()
        drawn = draw(prompt, seed)
        return replace(drawn, seconds=time.monotonic() - began)

    def draw_all(prompts: list[str], seeds: list[int]) -> Iterator[Drawn]:
        threads = ThreadPoolExecutor(in_flight)
        try:
            yield from threads.map(timed, prompts, seeds)
        finally:
            threads.shutdown(cancel_futures=True)

    # Large batches: only at their ends connections lie idle.
    return System(draw_all, settings, device, batch_size=_WAVES * in_flight)
