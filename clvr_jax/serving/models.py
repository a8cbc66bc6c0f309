"""The models of a server: what they can do, the keys of their works, and the function that performs a batch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from clvr_jax.data.preprocessing.text import bucket_for
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.image_io import ImageLike, as_pil
from clvr_jax.interfaces import Message
from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline, VLMController
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.image_generator import Flux2ImageGenerator
from clvr_jax.pipelines.qwen3_vl import ChatAnswer, Qwen3VLPipeline
from clvr_jax.reasoning.conversation.protocols import GeneratedImage
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
from clvr_jax.serving.scheduling.scheduler import Job, Task

_SMALL_BYTES = 256 << 20
"""Weights of all models together up to which calls run at the same time."""

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class Sampling:
    """How the images of a request are generated. None takes the model's own value.

    Attributes:
      size: of the images; None takes that of the first reference, and the model's own without references.
      steps: of the solver.
      guidance: scale of classifier-free guidance.
    """

    size: Size | None = None
    steps: int | None = None
    guidance: float | None = None


class StageKey(NamedTuple):
    """The key of works of the vision-language model. variant: what else must be equal in a batch."""

    stage: str
    variant: Any = None


class GenerationKey(NamedTuple):
    """The key of image generations.

    stage: "generate" in a loop, "one-shot" without. shape: what images of one call have in common: the text bucket in
    tokens, and the sizes of the references; None if each image has a call of its own. Loops then get into step whatever
    the number of their references.
    """

    stage: str
    sampling: Sampling
    shape: tuple[int, tuple[Size, ...]] | None


@dataclass(frozen=True)
class OneShotWork:
    """One image is generated from the prompt itself, as `clvr sample` does."""

    prompt: str
    images: tuple[ImageLike, ...]
    seed: int


@dataclass(frozen=True)
class ChatWork:
    """The vision-language model continues a conversation; see `Qwen3VLPipeline.answer_all`."""

    messages: Sequence[Message]
    images: Sequence[ImageLike]
    max_new_tokens: int
    temperature: float
    seed: int
    top_logprobs: int


class ServedModels:
    """The pipeline of a server.

    Args:
      pipeline: image generator, controller and verifier.
      name: of the image model in the API.
      image_rows: see `Flux2Pipeline.generate_each`.

    Attributes:
      chat_name: name of the controller in the API; None if it is not a Qwen3-VL of this process.
    """

    def __init__(self, pipeline: ClosedLoopPipeline, name: str, image_rows: int = 1):
        self._pipeline, self.name, self._image_rows = pipeline, name, image_rows
        self.flux = pipeline.flux
        self.chat_name = f"{name}-controller" if isinstance(pipeline.controller, VLMController) else None

    @property
    def has_loop(self) -> bool:
        """Whether there are a controller and a verifier, without which only one-shot images are generated."""
        return self._pipeline.controller is not None and self._pipeline.verifier is not None

    @property
    def token_pixels(self) -> int:
        """Both sides of an image are multiples of this number of pixels."""
        return int(self.flux.vae.config.token_pixels)

    @property
    def default_size(self) -> Size:
        """The size of an image without references."""
        return self.flux.settings.sample_size, self.flux.settings.sample_size

    @property
    def vlm(self) -> Qwen3VLPipeline:
        """The pipeline of the controller. Raises: ClvrError if there is none in this process."""
        if not isinstance(self._pipeline.controller, VLMController):
            raise ClvrError("this server has no vision-language model of its own")
        return self._pipeline.controller.pipeline

    def key(self, work: Work | OneShotWork | ChatWork, sampling: Sampling) -> Any:
        """Returns the key of a work; works with equal keys share a batch."""
        if isinstance(work, GenerationWork):
            request = work.request
            if self._image_rows == 1:
                return GenerationKey("generate", sampling, None)
            length = self.flux.fit_history(request.prompt, request.replies).length
            return GenerationKey("generate", sampling, (self._bucket(length), _sizes(request.images)))
        if isinstance(work, OneShotWork):
            if self._image_rows == 1:
                return GenerationKey("one-shot", sampling, None)
            length = self.flux.prompt_length(work.prompt)
            return GenerationKey("one-shot", sampling, (self._bucket(length), _sizes(work.images)))
        if isinstance(work, ReplyWork):
            # A batch of conversations is compiled for an even number of images.
            number = len(work.conversation.images)
            return StageKey("reply", (work.conversation.attempt > 0, number + number % 2))
        if isinstance(work, ChatWork):
            return StageKey("chat", (work.max_new_tokens, work.temperature, work.top_logprobs, len(work.images)))
        names = {RequirementsWork: "requirements", PlanWork: "plan", VerificationWork: "verify"}
        return StageKey(names[type(work)])

    def perform(
        self, key: Any, tasks: Sequence[Task], is_stopping: Callable[[Job], bool] = lambda job: False
    ) -> list[Task]:
        """Performs the works of tasks with this key, and hands each job its result.

        Args:
          key: of all tasks.
          tasks: at least one.
          is_stopping: whether a job is to be stopped, so that its image is not wanted any more. It is asked between
            denoising steps.
        Returns: the tasks that were not performed: those of jobs that are to be stopped, and those from the first one
          on that failed after others had succeeded. If the first one fails, the error is raised.
        """
        if isinstance(key, GenerationKey):
            return self._generate(key, tasks, is_stopping)
        if key.stage == "chat":
            began = time.monotonic()
            answers = self._chat([task.work for task in tasks])
            share = (time.monotonic() - began) / len(tasks)
            for task, answer in zip(tasks, answers, strict=True):
                task.job.receive(task.work, answer, share)
            return []
        assert self._pipeline.controller is not None
        roles = Roles(self._pipeline.controller, Flux2ImageGenerator(self.flux), self._pipeline.verifier)
        perform([(task.job, task.work) for task in tasks], roles)
        return []

    def _generate(self, key: GenerationKey, tasks: Sequence[Task], is_stopping: Callable[[Job], bool]) -> list[Task]:
        """Generates images call by call, so that each image is there as soon as its own call is done."""
        size = self._image_rows if key.shape is None else len(tasks)
        calls = [tasks[start : start + size] for start in range(0, len(tasks), size)]
        undone: list[Task] = []
        for number, call in enumerate(calls):

            def on_step(row: int, done: int, steps: int, call: Sequence[Task] = call) -> bool:
                call[row].job.progress(call[row].work, done, steps)
                return not is_stopping(call[row].job)

            began = time.monotonic()
            try:
                images = self._images(key, [task.work for task in call], on_step)
            except Exception:
                if number == 0:
                    raise
                return [*undone, *(task for rest in calls[number:] for task in rest)]
            share = (time.monotonic() - began) / len(call)
            for task, image in zip(call, images, strict=True):
                if image is None:
                    undone.append(task)
                else:
                    task.job.receive(task.work, image, share)
        return undone

    def _images(
        self, key: GenerationKey, works: Sequence[Any], on_step: Callable[[int, int, int], bool]
    ) -> list[GeneratedImage | None]:
        """Generates one image for each work, None for those that are not wanted any more."""
        sampling, rows = key.sampling, self._image_rows
        if key.stage == "generate":
            generator = Flux2ImageGenerator(self.flux, sampling.steps, sampling.guidance, sampling.size, rows)
            return generator.generate_wanted([work.request for work in works], on_step)
        height, width = sampling.size or (None, None)
        output = self.flux.generate_each(
            [work.prompt for work in works],
            [[as_pil(image) for image in work.images] for work in works],
            [work.seed for work in works],
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            height=height,
            width=width,
            rows_per_call=rows,
            on_step=on_step,
        )
        return [None if image is None else GeneratedImage(image, output.nfe) for image in output.images]

    def _chat(self, works: Sequence[ChatWork]) -> list[ChatAnswer]:
        first = works[0]
        return self.vlm.answer_all(
            [work.messages for work in works],
            [[as_pil(image) for image in work.images] for work in works],
            first.max_new_tokens,
            first.temperature,
            [work.seed for work in works],
            first.top_logprobs,
        )

    def _bucket(self, length: int) -> int:
        return bucket_for(length, self.flux.settings.text_buckets)


def check_calls(pipeline: ClosedLoopPipeline, calls: int | None) -> int:
    """Returns the number of calls in which a batch is computed at the same time.

    On a CPU each program of a small model runs on one core, so there are as many calls as cores, up to 4. The programs
    of larger models use all cores, and each call reads all weights: one call. So it is on an accelerator.

    Args:
      pipeline: the models.
      calls: the requested number, None for the best one.
    Raises: UsageError if more than one is requested and not possible.
    """
    parts: list[Flux2Pipeline | Qwen3VLPipeline] = [pipeline.flux]
    if isinstance(pipeline.controller, VLMController):
        parts.append(pipeline.controller.pipeline)
    # Programs of several devices that run in another order on each would wait for each other forever.
    is_possible = all(part.layout is None and part.offloader is None for part in parts)
    if calls is not None:
        if calls > 1 and not is_possible:
            raise UsageError(f"--concurrent-calls {calls}: must be 1 with --mesh.* or --offload")
        return calls
    size = sum(array.nbytes for array in jax.live_arrays())
    if not is_possible or jax.default_backend() != "cpu" or size > _SMALL_BYTES:
        return 1
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _sizes(images: Sequence[ImageLike]) -> tuple[Size, ...]:
    return tuple((image.height, image.width) for image in map(as_pil, images))
