"""Systems behind endpoints: an image tool alone, or with a vision-language model as its controller."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from clvr_jax.errors import UsageError
from clvr_jax.evaluation.systems.models import Mode, budget_for_mode, non_default_fields
from clvr_jax.evaluation.systems.system import System, SystemOutput
from clvr_jax.files.json_input import JSON
from clvr_jax.interfaces import ChatModel, ImageModel, ImageRequest, ProviderError, Usage
from clvr_jax.providers.loop_roles import MAX_REPLY_TOKENS, REWRITE_PROMPT, ChatModelController, ImageModelGenerator
from clvr_jax.reasoning.loop.budget import Budget
from clvr_jax.reasoning.loop.loop import run

_WAVES, _AHEAD = 8, 2


def endpoint_system(
    tool: ImageModel,
    mode: Mode = "one-shot",
    budget: Budget | None = None,
    controller: ChatModel | None = None,
    in_flight: int = 16,
    controller_tokens: int | None = None,
) -> System:
    """Returns an image tool as a system. Prompts are processed concurrently, and each has its own usage.

    A prompt that the tool's policy refuses has no image and counts as not correct. Every other failure ends the run,
    which can be resumed later; a missing or truncated reply of the controller is such a failure.

    Args:
      tool: generates the images, such as an `OpenAIImageModel`.
      mode: as in `systems.planned`; "one-shot" sends the prompt as it is.
      budget: limits per prompt.
      controller: plans and judges by the instructions of the loop; needed for all modes but one-shot.
      in_flight: number of concurrent prompts.
      controller_tokens: maximum tokens of a reply of the controller, for models that think first; the default of the
        loop if None.
    Raises: UsageError if the mode needs a controller and there is none.
    """
    settings: dict[str, JSON] = {"mode": mode, "model": tool.name}
    if mode == "one-shot":
        return _concurrent(lambda prompt, seed: _one_shot(tool, prompt, seed), settings, [tool], in_flight)
    if controller is None:
        raise UsageError(f"mode {mode} needs a controller; give a vision-language model")
    limits = budget_for_mode(mode, budget)
    tokens = controller_tokens or MAX_REPLY_TOKENS
    plan_prompt = None if mode == "closed-loop" else REWRITE_PROMPT

    def generate_one(prompt: str, seed: int) -> SystemOutput:
        generator, planner = ImageModelGenerator(tool), ChatModelController(controller, plan_prompt, tokens)
        try:
            (trajectory,) = run([prompt], planner, generator, limits, seed, model=tool.name)
        except ProviderError as error:
            return _refused(error, generator.usage + planner.usage)
        usage = generator.usage + planner.usage
        return replace(SystemOutput.from_result(trajectory), nfe=usage.nfe or None, usage=usage)

    settings |= {"controller": controller.name, **non_default_fields(limits)}
    if controller_tokens is not None:
        settings["controller_tokens"] = controller_tokens
    return _concurrent(generate_one, settings, [tool, controller], in_flight)


def _one_shot(tool: ImageModel, prompt: str, seed: int) -> SystemOutput:
    try:
        result = tool.generate(ImageRequest(prompt, seed=seed))
    except ProviderError as error:
        return _refused(error, error.usage)
    return SystemOutput(result.image, result.usage.nfe or None, result.usage)


def _refused(error: ProviderError, usage: Usage) -> SystemOutput:
    if error.fault != "refused":
        raise error
    return SystemOutput(None, usage=usage, outcome="refused")


def _concurrent(
    generate_one: Callable[[str, int], SystemOutput],
    settings: dict[str, JSON],
    providers: Sequence[ImageModel | ChatModel],
    in_flight: int,
) -> System:
    """Returns the system that generates with several threads; the first of `providers` is its device."""

    def timed(prompt: str, seed: int) -> SystemOutput:
        began = time.monotonic()
        output = generate_one(prompt, seed)
        seconds = time.monotonic() - began
        adapted = tuple(f"{each.name}: {note}" for each in providers for note in getattr(each, "adapted", ()))
        return replace(output, seconds=seconds, adapted=adapted)

    def generate(prompts: list[str], seeds: list[int]) -> Iterator[SystemOutput]:
        threads = ThreadPoolExecutor(in_flight)
        waiting: deque[Future[SystemOutput]] = deque()
        try:
            for prompt, seed in zip(prompts, seeds, strict=True):
                waiting.append(threads.submit(timed, prompt, seed))
                # Finished images wait for earlier ones: with no limit a whole batch would be held in memory.
                if len(waiting) >= _AHEAD * in_flight:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)

    # Large batches, because connections are idle only at the end of a batch.
    return System(generate, settings, providers[0].name, batch_size=_WAVES * in_flight)
