"""The models of a server: what they can do, the keys of their works, and the function that performs a batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from clvr_jax.data.preprocessing.text import bucket_for
from clvr_jax.errors import ClvrError
from clvr_jax.image_io import ImageLike, as_pil
from clvr_jax.interfaces import Message
from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline, Flux2ImageGenerator, VLMController
from clvr_jax.pipelines.qwen3_vl import ChatAnswer, Qwen3VLPipeline
from clvr_jax.reasoning.protocols import GeneratedImage
from clvr_jax.reasoning.work import (
    GenerationWork,
    PlanWork,
    ReplyWork,
    RequirementsWork,
    Roles,
    VerificationWork,
    Work,
    perform,
)
from clvr_jax.serving.scheduler import Task

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

    stage: "generate" in a loop, "one-shot" without. text_bucket: in tokens. references: their sizes.
    """

    stage: str
    sampling: Sampling
    text_bucket: int
    references: tuple[Size, ...]


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
            length = self.flux.fit_history(request.prompt, request.replies).length
            return GenerationKey("generate", sampling, self._bucket(length), _sizes(request.images))
        if isinstance(work, OneShotWork):
            length = self.flux.prompt_length(work.prompt)
            return GenerationKey("one-shot", sampling, self._bucket(length), _sizes(work.images))
        if isinstance(work, ReplyWork):
            # A batch of conversations is compiled for an even number of images.
            number = len(work.conversation.images)
            return StageKey("reply", (work.conversation.attempt > 0, number + number % 2))
        if isinstance(work, ChatWork):
            return StageKey("chat", (work.max_new_tokens, work.temperature, work.top_logprobs, len(work.images)))
        names = {RequirementsWork: "requirements", PlanWork: "plan", VerificationWork: "verify"}
        return StageKey(names[type(work)])

    def perform(self, key: Any, tasks: Sequence[Task]) -> None:
        """Performs the works of tasks with this key in one call, and hands each job its result."""
        if key.stage in ("chat", "one-shot"):
            began, works = time.monotonic(), [task.work for task in tasks]
            results: Sequence[Any] = self._chat(works) if key.stage == "chat" else self._one_shot(works, key.sampling)
            share = (time.monotonic() - began) / len(tasks)
            for task, result in zip(tasks, results, strict=True):
                task.job.receive(task.work, result, share)
            return
        sampling = key.sampling if isinstance(key, GenerationKey) else Sampling()
        assert self._pipeline.controller is not None
        generator = Flux2ImageGenerator(
            self.flux, sampling.steps, sampling.guidance, sampling.size, rows_per_call=self._image_rows
        )
        perform(
            [(task.job, task.work) for task in tasks],
            Roles(self._pipeline.controller, generator, self._pipeline.verifier),
        )

    def _one_shot(self, works: Sequence[OneShotWork], sampling: Sampling) -> list[GeneratedImage]:
        size = sampling.size or (None, None)
        output = self.flux.generate_each(
            [work.prompt for work in works],
            [[as_pil(image) for image in work.images] for work in works],
            [work.seed for work in works],
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            height=size[0],
            width=size[1],
            rows_per_call=self._image_rows,
        )
        return [GeneratedImage(image, output.nfe) for image in output.images]

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


def _sizes(images: Sequence[ImageLike]) -> tuple[Size, ...]:
    return tuple((image.height, image.width) for image in map(as_pil, images))
