"""What clients send, as pydantic models. Unknown fields are refused, and so are known fields that nothing supports."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from clvr_jax.serving.index.rows import DamagedRowError
from clvr_jax.serving.jobs import Mode

MAX_PROMPT_CHARACTERS = 32_000
MAX_MESSAGE_CHARACTERS = 2**20
MAX_CANDIDATES = 8

UNSUPPORTED = {
    "mask": "the model edits whole images; describe the change in the prompt",
    "style": "no model here has styles; describe the style in the prompt",
    "negative_prompt": "FLUX.2 takes no negative prompt; describe what the image should show",
    "top_p": "top-p is that of the model's generation_config.json",
    "stop": "a reply ends where the model ends it, or at max_tokens",
    "tools": "the vision-language model calls no tools",
    "tool_choice": "the vision-language model calls no tools",
    "functions": "the vision-language model calls no tools",
    "response_format": "replies are plain text",
    "presence_penalty": "penalties are those of the model's generation_config.json",
    "frequency_penalty": "penalties are those of the model's generation_config.json",
    "logit_bias": "logits cannot be biased",
    "audio": "the models read and write text and images",
    "modalities": "the models read and write text and images",
    "instructions": "the controller follows the instructions that it was trained on; put your wishes into the input",
    "reasoning": "the loop's effort is set by quality, max_steps, max_nfe and max_seconds",
    "max_output_tokens": "the loop is limited by max_steps, max_nfe and max_seconds",
    "text": "the output is images",
    "temperature": "the image model has no temperature; seed sets what is random",
    "include": "the output always has everything",
    "conversation": "give previous_response_id",
    "parallel_tool_calls": "there is one tool, which is called for each image",
    "input_image_mask": "the model edits whole images; describe the change in the input",
    "verification": "this server always verifies with a separate verifier",
}
"""Fields of OpenAI's API and of our command line that the server knows and refuses, each with the reason."""


class StrictModel(BaseModel):
    """A request body. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def _check_words(value: str) -> str:
    if not value.strip():
        raise ValueError("has no words")
    return value


Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS), AfterValidator(_check_words)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def _check_size(value: str) -> str:
    if value != "auto" and not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", value):
        raise ValueError("give auto or WIDTHxHEIGHT in pixels, such as 1024x768")
    return value


SizeText = Annotated[str, AfterValidator(_check_size)]


class LoopOptions(StrictModel):
    """How images are generated: the fields that all endpoints with images take. None takes the default."""

    model: Annotated[str, Field(max_length=300)] | None = None
    mode: Mode | None = None
    seed: Seed | None = None
    num_inference_steps: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, lt=1000)] | None = None
    max_steps: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_nfe: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    stop_when: Literal["controller", "drawn"] | None = None
    candidates: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] | None = None

    @field_validator("guidance_scale", "max_seconds")
    @classmethod
    def _is_finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError("must be a finite number")
        return value

    @model_validator(mode="after")
    def _check_one_shot(self) -> LoopOptions:
        if self.chosen_mode == "one-shot":
            names = ("max_steps", "max_nfe", "max_seconds", "stop_when", "candidates")
            if given := [name for name in names if getattr(self, name) is not None]:
                raise ValueError(f"{given[0]} limits a loop, but this request asks for one shot")
        if self.stop_when == "drawn" and (self.candidates or 1) > 1:
            raise ValueError("stop_when drawn verifies nothing, so it cannot choose among candidates")
        return self

    @property
    def chosen_mode(self) -> Mode | None:
        """The mode that the request asks for; None for the server's default."""
        return self.mode


class LoopFields(LoopOptions):
    """Fields that both the images endpoints and POST /v1/loops take."""

    prompt: Prompt
    size: SizeText | None = None

    @property
    def height_and_width(self) -> tuple[int, int] | None:
        """The size in pixels; None for auto."""
        if self.size in (None, "auto"):
            return None
        width, height = map(int, str(self.size).split("x"))
        return height, width


Quality = Literal["auto", "low", "medium", "high", "standard", "hd"]
OutputFormat = Literal["png", "jpeg", "webp"]
MEDIUM_STEPS = 4
"""Limit on the images of a loop with quality medium."""


class ImageRequest(LoopFields):
    """The body of POST /v1/images/generations."""

    n: Annotated[int, Field(ge=1, le=10)] | None = None
    quality: Quality | None = None
    output_format: OutputFormat | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> ImageRequest:
        if self.partial_images is not None and not self.stream:
            raise ValueError("partial_images needs stream")
        if self.stream and (self.n or 1) > 1:
            raise ValueError("a stream has one image; leave n out")
        if self.stream and self.response_format == "url":
            raise ValueError("a stream has images as b64_json; leave response_format out")
        if self.output_compression is not None and self.kind == "png":
            raise ValueError("output_compression needs output_format jpeg or webp")
        if self.mode is not None and self.level != "auto":
            raise ValueError("quality chooses a mode by itself; give mode or quality")
        if self.max_steps is not None and self.level == "medium":
            raise ValueError("quality medium sets max_steps; give one of them")
        return self

    @property
    def kind(self) -> Literal["png", "jpeg", "webp"]:
        """The format of the images."""
        return self.output_format or "png"

    @property
    def level(self) -> Literal["auto", "low", "medium", "high"]:
        """The quality in OpenAI's newer words."""
        known: dict[str, Any] = {"standard": "medium", "hd": "high"}
        level: Literal["auto", "low", "medium", "high"] = known.get(self.quality or "auto", self.quality or "auto")
        return level

    @property
    def chosen_mode(self) -> Mode | None:
        """The mode by field or by quality."""
        by_quality: dict[str, Mode] = {"low": "one-shot", "medium": "loop", "high": "loop"}
        return self.mode or by_quality.get(self.level)


class EditRequest(ImageRequest):
    """The fields of POST /v1/images/edits beside its images."""

    input_fidelity: Literal["high"] | None = None


def stored_request(fields: Mapping[str, Any], loop_id: str) -> EditRequest:
    """Reads the request that is stored with a loop. Raises: DamagedRowError."""
    try:
        return EditRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the request"
        raise DamagedRowError(
            f"the entry of loop {loop_id}: request: {place}: {first['msg']}; delete the loop"
        ) from error


class LoopRequest(LoopFields):
    """The body of POST /v1/loops.

    images: the user's own images, base64 or data URLs.
    """

    images: list[str] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None


MAX_INSTRUCTION_CHARACTERS = 4_000
Instruction = Annotated[str, Field(min_length=1, max_length=MAX_INSTRUCTION_CHARACTERS)]
StepNumber = Annotated[int, Field(ge=0, le=9999)]


class PlanRequest(StrictModel):
    """The body of POST /v1/loops/{id}/plan.

    requirements: what the verifier checks from now on. instruction: what the next image is generated by.
    """

    requirements: Annotated[list[Annotated[str, Field(max_length=300)]], Field(min_length=1, max_length=64)] | None = (
        None
    )
    instruction: Instruction | None = None

    @model_validator(mode="after")
    def _has_one(self) -> PlanRequest:
        if self.requirements is None and self.instruction is None:
            raise ValueError("give requirements, an instruction, or both")
        return self


class RollbackRequest(StrictModel):
    """The body of POST /v1/loops/{id}/rollback. step: whose image the loop returns to."""

    step: StepNumber


class BranchRequest(StrictModel):
    """The body of POST /v1/loops/{id}/branch.

    step: whose image the new loop continues from. prompt: of the new loop, if it is another one. instruction: what its
    first image is generated by. seed: of the new loop, drawn at random if it is not given.
    """

    step: StepNumber
    prompt: Prompt | None = None
    instruction: Instruction | None = None
    seed: Seed | None = None


class ImageUrl(StrictModel):
    """An image in a message: a data URL."""

    url: str
    detail: Literal["auto", "high"] | None = None


class TextPart(StrictModel):
    """Text in a message."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=MAX_MESSAGE_CHARACTERS)]


class ImagePart(StrictModel):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(StrictModel):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(max_length=MAX_MESSAGE_CHARACTERS)] | list[TextPart | ImagePart]

    @model_validator(mode="after")
    def _check_images(self) -> ChatMessage:
        parts = [] if isinstance(self.content, str) else self.content
        if self.role == "system" and any(isinstance(part, ImagePart) for part in parts):
            raise ValueError("a message of the role system has no images")
        return self


class StreamOptions(StrictModel):
    """Options of a stream. include_usage: send the usage in a last chunk."""

    include_usage: bool | None = None


ONLY_TEXT = ("max_tokens", "max_completion_tokens", "temperature", "logprobs", "top_logprobs")
"""Fields of a chat that only the vision-language model takes."""
ONLY_IMAGES = ("size", "quality", "output_format", *(name for name in LoopOptions.model_fields if name != "seed"))
"""Fields of a chat that only the image model takes, `model` apart."""


class ChatRequest(LoopOptions):
    """The body of POST /v1/chat/completions, for the vision-language model or for the image model."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=256)]
    model: Annotated[str, Field(max_length=300)] | None  # required, and null is refused
    size: SizeText | None = None
    quality: Quality | None = None
    output_format: OutputFormat | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    n: Literal[1] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatRequest:
        if self.model is None:
            raise ValueError("name the model; GET /v1/models lists them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same limit; give one of them")
        return self
