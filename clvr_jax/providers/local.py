"""Our own pipelines as providers: calls from many threads become batches.

The pipelines are given, not imported; what is asked of them is written down here.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from clvr_jax.data.text import check_prompt
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.image_io import as_pil, pixels
from clvr_jax.interfaces import (
    ChatModel,
    ChatRequest,
    ChatResponse,
    ImageModel,
    ImageRequest,
    ImageResponse,
    ProviderError,
    Usage,
)
from clvr_jax.providers.batching import DynamicBatcher
from clvr_jax.providers.failures import NoReplyError
from clvr_jax.reasoning.context import Message
from clvr_jax.reasoning.thoughts import strip_thoughts


class ManyChatsPipeline(Protocol):
    """What is used of `pipelines.vlm.Qwen3VLPipeline` on a mesh."""

    def answer_all(
        self,
        conversations: Sequence[Sequence[Message]],
        images: Sequence[Sequence[np.ndarray]],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        top_logprobs: int = 0,
    ) -> Sequence[Any]:
        """One answer for each conversation, with `text`, `input_tokens`, `output_tokens` and `tokens`."""
        ...


class ChatPipeline(ManyChatsPipeline, Protocol):
    """What more is used of it without a mesh."""

    tokenizer: Any

    def prepare(self, messages: Sequence[Message], images: Sequence[np.ndarray]) -> Any:
        """Something with `input_ids`. Raises: ClvrError for a chat that cannot be read."""
        ...


class ImagePipeline(Protocol):
    """What is used of `pipelines.flux2.Flux2Pipeline`; outputs have `images` (PIL) and `nfe` (of each of them)."""

    def generate_each(
        self,
        prompts: Sequence[str],
        references: Sequence[Sequence[Image.Image]],
        seeds: Sequence[int],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Any:
        """One picture for each prompt, in the pipeline's own size."""
        ...

    def __call__(
        self,
        prompt: str,
        images: Sequence[Image.Image] = (),
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
    ) -> Any:
        """One picture of the given size."""
        ...


class LocalChatModel(ChatModel):
    """Our Qwen3-VL. Greedy questions that wait together share a call; every sampled one has its own, and its own seed.

    Args:
      pipeline: a `Qwen3VLPipeline`.
      name: model and revision, as it is recorded.
      max_batch, wait: see `batching.DynamicBatcher`.
    """

    def __init__(self, pipeline: ChatPipeline, name: str, max_batch: int = 8, wait: float = 0.005):
        self._pipeline, self._name = pipeline, name
        self._gathered = DynamicBatcher(self._answers, max_batch, wait)

    @property
    def name(self) -> str:
        """As it was given."""
        return self._name

    def chat(self, question: ChatRequest) -> ChatResponse:
        """See `ChatModel`.

        Raises: ProviderError "rejected" for a chat that the pipeline cannot read; NoReplyError for a thought without a
          reply.
        """
        began = time.monotonic()
        try:
            shown = [pixels(image) for image in question.images]
            # Read here and again in the batch: for its length, and so that a bad chat never gets among good ones.
            input_tokens = len(self._pipeline.prepare(question.messages, shown).input_ids)
            answer = self._gathered(dataclasses.replace(question, images=shown))
        except ClvrError as error:
            raise ProviderError(f"{self._name}: {error}", "rejected") from error
        usage = Usage(
            calls=1,
            input_tokens=input_tokens,
            output_tokens=len(self._pipeline.tokenizer(answer.text)["input_ids"]),
            seconds=time.monotonic() - began,
        )
        reply = dataclasses.replace(without_thought(answer), usage=usage)
        if answer.text.strip() and not reply.text.strip():
            advice = "allow more tokens, or have the model think less"
            raise NoReplyError(f"{self._name}: the answer is a thought without a reply; {advice}", "down", usage)
        return reply

    def close(self) -> None:
        """Answers what waits, then takes no more."""
        self._gathered.close()

    def _answers(self, questions: Sequence[ChatRequest]) -> list[ChatResponse]:
        # One call has one temperature and one seed, and samples its rows in turn: sampled rows must be alone.
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, question in enumerate(questions):
            alone = () if question.temperature == 0 else (index,)
            groups.setdefault((question.max_tokens, question.top_logprobs, *alone), []).append(index)
        found: dict[int, ChatResponse] = {}
        for rows in groups.values():
            first = questions[rows[0]]
            answers = self._pipeline.answer_all(
                [questions[row].messages for row in rows],
                [[pixels(image) for image in questions[row].images] for row in rows],
                first.max_tokens,
                first.temperature,
                first.seed,
                first.top_logprobs,
            )
            found.update(
                {row: ChatResponse(one.text, tokens=one.tokens) for row, one in zip(rows, answers, strict=True)}
            )
        return [found[index] for index in range(len(questions))]


class MeshChatModel(ChatModel):
    """Our Qwen3-VL, spread over the active layout; greedy.

    Where there are several processes, all of them ask the same questions in the same order, each in one thread.

    Args:
      pipeline: a `Qwen3VLPipeline` that was loaded within the layout.
      name: model and revision, as it is recorded.
      batch: questions of a call, which the mesh cuts; a call of fewer is filled up, so that there are few programs.
    """

    def __init__(self, pipeline: ManyChatsPipeline, name: str, batch: int):
        if batch < 1:
            raise UsageError(f"{name}: batch must be at least 1, got {batch}")
        self._pipeline, self._name, self._batch = pipeline, name, batch

    @property
    def name(self) -> str:
        """As it was given."""
        return self._name

    def chat(self, question: ChatRequest) -> ChatResponse:
        """See `ChatModel`."""
        return self.chat_all([question])[0]

    def chat_all(self, questions: Sequence[ChatRequest]) -> list[ChatResponse]:
        """See `ChatModel`; those with as many pictures share calls. A thought without a reply is "".

        Raises: ProviderError "rejected" for a chat that cannot be read, or one that is to be answered by chance.
        """
        alike: dict[tuple[int, int, int], list[int]] = {}
        for index, question in enumerate(questions):
            if question.temperature:
                raise ProviderError(f"{self._name}: is asked greedily on a mesh, not at a temperature", "rejected")
            alike.setdefault((len(question.images), question.max_tokens, question.top_logprobs), []).append(index)
        found: dict[int, ChatResponse] = {}
        for indices in alike.values():
            for begin in range(0, len(indices), self._batch):
                part = indices[begin : begin + self._batch]
                answers = self._answers([questions[index] for index in part])
                found.update(zip(part, answers, strict=True))
        return [found[index] for index in range(len(questions))]

    def _answers(self, questions: Sequence[ChatRequest]) -> list[ChatResponse]:
        began, first = time.monotonic(), questions[0]
        filled = [*questions, *[questions[-1]] * (self._batch - len(questions))]
        shown = [[pixels(image) for image in question.images] for question in filled]
        try:
            told = self._pipeline.answer_all(
                [question.messages for question in filled],
                shown,
                first.max_tokens,
                top_logprobs=first.top_logprobs,
            )
        except ClvrError as error:
            raise ProviderError(f"{self._name}: {error}", "rejected") from error
        seconds = (time.monotonic() - began) / len(questions)
        return [
            without_thought(
                ChatResponse(
                    one.text,
                    Usage(calls=1, input_tokens=one.input_tokens, output_tokens=one.output_tokens, seconds=seconds),
                    one.tokens,
                )
            )
            for one in told[: len(questions)]
        ]


def without_thought(answer: ChatResponse) -> ChatResponse:
    """Returns the reply behind a model's thought, with its tokens; "" for a thought without a reply."""
    text = strip_thoughts(answer.text) or ""
    if text == answer.text:
        return answer
    tokens = list(answer.tokens or ())
    while tokens and len("".join(token.text for token in tokens)) > len(text):
        tokens.pop(0)
    is_whole = "".join(token.text for token in tokens) == text
    return dataclasses.replace(answer, text=text, tokens=tuple(tokens) if answer.tokens and is_whole else None)


class LocalImageModel(ImageModel):
    """Our FLUX.2. Tasks that wait together are drawn together where their shapes agree.

    Args:
      pipeline: a `Flux2Pipeline`.
      name: model and revision, as it is recorded.
      steps, guidance: of the sampler; the model's own if None.
      max_batch, wait: see `batching.DynamicBatcher`.
    """

    def __init__(
        self,
        pipeline: ImagePipeline,
        name: str,
        steps: int | None = None,
        guidance: float | None = None,
        max_batch: int = 8,
        wait: float = 0.005,
    ):
        self._pipeline, self._name = pipeline, name
        self._sampler: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
        self._gathered = DynamicBatcher(self._draw_all, max_batch, wait)

    @property
    def name(self) -> str:
        """As it was given."""
        return self._name

    def generate(self, task: ImageRequest) -> ImageResponse:
        """See `ImageModel`. The picture is (height, width, 3) uint8.

        Raises: ProviderError "rejected" for a prompt, size or reference that the pipeline cannot use.
        """
        began = time.monotonic()
        try:
            check_prompt(task.prompt)
            picture, nfe = self._gathered(
                dataclasses.replace(task, references=[as_pil(each) for each in task.references])
            )
        except ClvrError as error:
            raise ProviderError(f"{self._name}: {error}", "rejected") from error
        return ImageResponse(picture, Usage(calls=1, pictures=1, nfe=nfe, seconds=time.monotonic() - began))

    def close(self) -> None:
        """Draws what waits, then takes no more."""
        self._gathered.close()

    def _draw_all(self, tasks: Sequence[ImageRequest]) -> list[tuple[np.ndarray, int]]:
        made: dict[int, tuple[np.ndarray, int]] = {}
        together = []
        for index, task in enumerate(tasks):
            if task.size is None:
                together.append(index)
                continue
            height, width = task.size
            output = self._pipeline(
                task.prompt,
                [as_pil(image) for image in task.references],
                height=height,
                width=width,
                seed=task.seed,
                **self._sampler,
            )
            made[index] = (pixels(output.images[0]), output.nfe)
        if together:
            output = self._pipeline.generate_each(
                [tasks[index].prompt for index in together],
                [[as_pil(image) for image in tasks[index].references] for index in together],
                [tasks[index].seed for index in together],
                **self._sampler,
            )
            pictures = [(pixels(image), output.nfe) for image in output.images]
            made.update(zip(together, pictures, strict=True))
        return [made[index] for index in range(len(tasks))]
