"""Our own pipelines as chat and image models: requests of many threads are computed in batches.

The pipelines are not imported; protocols describe the methods that are used.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from clvr_jax.data.preprocessing.text import check_prompt
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.image_io import as_pil, pixels
from clvr_jax.interfaces import (
    ChatModel,
    ChatRequest,
    ChatResponse,
    ImageModel,
    ImageRequest,
    ImageResponse,
    Message,
    ProviderError,
    Token,
    Usage,
)
from clvr_jax.interfaces.thoughts import strip_thoughts
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.providers.batching import DynamicBatcher
from clvr_jax.providers.failures import NoReplyError


class Answer(Protocol):
    """An answer of a `BatchChatPipeline`."""

    @property
    def text(self) -> str:
        """The decoded message."""
        ...

    @property
    def input_tokens(self) -> int:
        """Number of tokens of the conversation, visual tokens included."""
        ...

    @property
    def output_tokens(self) -> int:
        """Number of generated tokens."""
        ...

    @property
    def tokens(self) -> tuple[Token, ...] | None:
        """The tokens with their probabilities; None unless requested."""
        ...


class Prepared(Protocol):
    """An encoded conversation."""

    @property
    def input_ids(self) -> Sequence[int]:
        """The token ids, visual tokens included."""
        ...


class ImageOutput(Protocol):
    """The output of an `ImagePipeline`."""

    @property
    def images(self) -> Sequence[Image.Image]:
        """One image for each prompt."""
        ...

    @property
    def nfe(self) -> int:
        """Number of network evaluations for each image."""
        ...


class BatchChatPipeline(Protocol):
    """The method of `pipelines.qwen3_vl.Qwen3VLPipeline` that is used on a mesh."""

    def answer_all(
        self,
        conversations: Sequence[Sequence[Message]],
        images: Sequence[Sequence[np.ndarray]],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        top_logprobs: int = 0,
    ) -> Sequence[Answer]:
        """Returns one answer for each conversation."""
        ...


class ChatPipeline(BatchChatPipeline, Protocol):
    """The attributes of `pipelines.qwen3_vl.Qwen3VLPipeline` that are used without a mesh."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        ...

    def prepare(self, messages: Sequence[Message], images: Sequence[np.ndarray]) -> Prepared:
        """Encodes a conversation. Raises: ClvrError for a conversation that cannot be encoded."""
        ...


class ImagePipeline(Protocol):
    """The methods of `pipelines.flux2.Flux2Pipeline` that are used."""

    def generate_each(
        self,
        prompts: Sequence[str],
        references: Sequence[Sequence[Image.Image]],
        seeds: Sequence[int],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> ImageOutput:
        """Generates one image for each prompt, in the pipeline's own size."""
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
    ) -> ImageOutput:
        """Generates one image of the given size."""
        ...


class LocalChatModel(ChatModel):
    """Our Qwen3-VL. Requests with greedy decoding share calls; each sampled request has its own call and seed.

    Args:
      pipeline: a `Qwen3VLPipeline`.
      name: model and revision, recorded with the responses.
      max_batch, wait: see `batching.DynamicBatcher`.
    """

    def __init__(self, pipeline: ChatPipeline, name: str, max_batch: int = 8, wait: float = 0.005):
        self._pipeline, self._name = pipeline, name
        self._batcher = DynamicBatcher(self._responses, max_batch, wait)

    @property
    def name(self) -> str:
        """The name that was given."""
        return self._name

    def chat(self, request: ChatRequest) -> ChatResponse:
        """Returns the response to one request.

        Raises: ProviderError "rejected" for a conversation that the pipeline cannot encode; NoReplyError for a thought
          without a reply.
        """
        began = time.monotonic()
        try:
            images = [pixels(image) for image in request.images]
            # Encoded here and again in the batch: for its length, and so that an invalid request joins no batch.
            input_tokens = len(self._pipeline.prepare(request.messages, images).input_ids)
            response = self._batcher(dataclasses.replace(request, images=images))
        except ClvrError as error:
            raise ProviderError(f"{self._name}: {error}", "rejected") from error
        usage = Usage(
            calls=1,
            input_tokens=input_tokens,
            output_tokens=len(self._pipeline.tokenizer(response.text)["input_ids"]),
            seconds=time.monotonic() - began,
        )
        reply = dataclasses.replace(without_thought(response), usage=usage)
        if response.text.strip() and not reply.text.strip():
            advice = "allow more tokens, or have the model think less"
            raise NoReplyError(f"{self._name}: the answer is a thought without a reply; {advice}", "down", usage)
        return reply

    def close(self) -> None:
        """Completes all waiting requests and refuses further ones."""
        self._batcher.close()

    def _responses(self, requests: Sequence[ChatRequest]) -> list[ChatResponse]:
        # A call has one temperature and one seed for all rows, so that sampled requests have calls of their own.
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            alone = () if request.temperature == 0 else (index,)
            groups.setdefault((request.max_tokens, request.top_logprobs, *alone), []).append(index)
        responses: dict[int, ChatResponse] = {}
        for rows in groups.values():
            first = requests[rows[0]]
            answers = self._pipeline.answer_all(
                [requests[row].messages for row in rows],
                [[pixels(image) for image in requests[row].images] for row in rows],
                first.max_tokens,
                first.temperature,
                first.seed,
                first.top_logprobs,
            )
            for row, answer in zip(rows, answers, strict=True):
                responses[row] = ChatResponse(answer.text, tokens=answer.tokens)
        return [responses[index] for index in range(len(requests))]


class MeshChatModel(ChatModel):
    """Our Qwen3-VL, sharded over the active layout, with greedy decoding.

    With several processes, all of them make the same requests in the same order, each in one thread.

    Args:
      pipeline: a `Qwen3VLPipeline` that was loaded on the layout.
      name: model and revision, recorded with the responses.
      batch: number of requests in a call, which the mesh shards; a smaller call is padded, so that one batch size is
        compiled.
    """

    def __init__(self, pipeline: BatchChatPipeline, name: str, batch: int):
        if batch < 1:
            raise UsageError(f"{name}: batch must be at least 1, got {batch}")
        self._pipeline, self._name, self._batch = pipeline, name, batch

    @property
    def name(self) -> str:
        """The name that was given."""
        return self._name

    def chat(self, request: ChatRequest) -> ChatResponse:
        """Returns the response to one request."""
        return self.chat_all([request])[0]

    def chat_all(self, requests: Sequence[ChatRequest]) -> list[ChatResponse]:
        """Returns the responses in the order of the requests; requests with the same number of images share calls.

        The response to a thought without a reply has the text "".
        Raises: ProviderError "rejected" for a conversation that cannot be encoded, or a temperature above 0.
        """
        groups: dict[tuple[int, int, int], list[int]] = {}
        for index, request in enumerate(requests):
            if request.temperature:
                raise ProviderError(f"{self._name}: decodes greedily on a mesh, not at a temperature", "rejected")
            groups.setdefault((len(request.images), request.max_tokens, request.top_logprobs), []).append(index)
        responses: dict[int, ChatResponse] = {}
        for indices in groups.values():
            for begin in range(0, len(indices), self._batch):
                part = indices[begin : begin + self._batch]
                responses.update(zip(part, self._responses([requests[index] for index in part]), strict=True))
        return [responses[index] for index in range(len(requests))]

    def _responses(self, requests: Sequence[ChatRequest]) -> list[ChatResponse]:
        began, first = time.monotonic(), requests[0]
        padded = [*requests, *[requests[-1]] * (self._batch - len(requests))]
        images = [[pixels(image) for image in request.images] for request in padded]
        try:
            answers = self._pipeline.answer_all(
                [request.messages for request in padded],
                images,
                first.max_tokens,
                top_logprobs=first.top_logprobs,
            )
        except ClvrError as error:
            raise ProviderError(f"{self._name}: {error}", "rejected") from error
        seconds = (time.monotonic() - began) / len(requests)
        return [
            without_thought(
                ChatResponse(
                    answer.text,
                    Usage(
                        calls=1,
                        input_tokens=answer.input_tokens,
                        output_tokens=answer.output_tokens,
                        seconds=seconds,
                    ),
                    answer.tokens,
                )
            )
            for answer in answers[: len(requests)]
        ]


def without_thought(response: ChatResponse) -> ChatResponse:
    """Returns the reply after a model's thought, with its tokens; the text is "" for a thought without a reply."""
    text = strip_thoughts(response.text) or ""
    if text == response.text:
        return response
    tokens = list(response.tokens or ())
    while tokens and len("".join(token.text for token in tokens)) > len(text):
        tokens.pop(0)
    is_aligned = "".join(token.text for token in tokens) == text
    return dataclasses.replace(response, text=text, tokens=tuple(tokens) if response.tokens and is_aligned else None)


class LocalImageModel(ImageModel):
    """Our FLUX.2. Concurrent requests share calls if they have no size of their own.

    Args:
      pipeline: a `Flux2Pipeline`.
      name: model and revision, recorded with the images.
      steps, guidance: of the solver; the model's own if None.
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
        self._batcher = DynamicBatcher(self._generate_all, max_batch, wait)

    @property
    def name(self) -> str:
        """The name that was given."""
        return self._name

    def generate(self, request: ImageRequest) -> ImageResponse:
        """Returns one image, (height, width, 3) uint8.

        Raises: ProviderError "rejected" for a prompt, size or reference that the pipeline cannot use.
        """
        began = time.monotonic()
        try:
            check_prompt(request.prompt)
            references = [as_pil(image) for image in request.references]
            image, nfe = self._batcher(dataclasses.replace(request, references=references))
        except ClvrError as error:
            raise ProviderError(f"{self._name}: {error}", "rejected") from error
        return ImageResponse(image, Usage(calls=1, pictures=1, nfe=nfe, seconds=time.monotonic() - began))

    def close(self) -> None:
        """Completes all waiting requests and refuses further ones."""
        self._batcher.close()

    def _generate_all(self, requests: Sequence[ImageRequest]) -> list[tuple[np.ndarray, int]]:
        generated: dict[int, tuple[np.ndarray, int]] = {}
        together = []
        for index, request in enumerate(requests):
            if request.size is None:
                together.append(index)
                continue
            height, width = request.size
            output = self._pipeline(
                request.prompt,
                [as_pil(image) for image in request.references],
                height=height,
                width=width,
                seed=request.seed,
                **self._sampler,
            )
            generated[index] = (pixels(output.images[0]), output.nfe)
        if together:
            output = self._pipeline.generate_each(
                [requests[index].prompt for index in together],
                [[as_pil(image) for image in requests[index].references] for index in together],
                [requests[index].seed for index in together],
                **self._sampler,
            )
            images = [(pixels(image), output.nfe) for image in output.images]
            generated.update(zip(together, images, strict=True))
        return [generated[index] for index in range(len(requests))]
