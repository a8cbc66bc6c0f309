"""What clients send to POST /v1/responses, as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from clvr_jax.serving.errors import ApiError
from clvr_jax.serving.requests import MAX_PROMPT_CHARACTERS, EditRequest, LoopOptions, StrictModel

_MAX_ITEMS = 256
_Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]


class InputText(StrictModel):
    """Text in a message."""

    type: Literal["input_text"]
    text: _Text


class InputImage(StrictModel):
    """An image in a message, as a data URL."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "high"] | None = None


class InputMessage(StrictModel):
    """A message of the user."""

    type: Literal["message"] = "message"
    role: Literal["user"]
    content: _Text | Annotated[list[InputText | InputImage], Field(max_length=_MAX_ITEMS)]


class InputImageCall(StrictModel):
    """An image of an earlier response, by the id of its output item."""

    type: Literal["image_generation_call"]
    id: Annotated[str, Field(max_length=64)]


class ImageTool(StrictModel):
    """The tool image_generation, the only one there is."""

    type: Literal["image_generation"]
    action: Literal["auto", "generate", "edit"] = "auto"
    model: Annotated[str, Field(max_length=300)] | None = None
    size: str | None = None
    quality: str | None = None
    output_format: str | None = None
    output_compression: int | None = None
    background: str | None = None
    moderation: str | None = None
    input_fidelity: str | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None


class ToolChoice(StrictModel):
    """The choice of the only tool."""

    type: Literal["image_generation"]


class ResponseRequest(LoopOptions):
    """The body of POST /v1/responses.

    input: a prompt, or messages of the user and images of earlier responses. previous_response_id: whose image is
    edited.
    """

    input: _Text | Annotated[list[InputMessage | InputImageCall], Field(min_length=1, max_length=_MAX_ITEMS)]
    tools: Annotated[list[ImageTool], Field(min_length=1, max_length=1)]
    tool_choice: Literal["auto", "required"] | ToolChoice | None = None
    previous_response_id: Annotated[str, Field(max_length=64)] | None = None
    stream: bool | None = None
    store: Literal[True] | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="after")
    def _check_tool(self) -> ResponseRequest:
        if self.tools[0].partial_images and not self.stream:
            raise ValueError("partial_images needs stream")
        return self

    @property
    def tool(self) -> ImageTool:
        """The tool with its options."""
        return self.tools[0]

    def texts_and_images(self) -> tuple[str, list[InputImage | InputImageCall]]:
        """Returns the texts of all messages, one per line, and the images in order."""
        if isinstance(self.input, str):
            return self.input, []
        texts: list[str] = []
        images: list[InputImage | InputImageCall] = []
        for item in self.input:
            if isinstance(item, InputImageCall):
                images.append(item)
            elif isinstance(item.content, str):
                texts.append(item.content)
            else:
                texts += [part.text for part in item.content if isinstance(part, InputText)]
                images += [part for part in item.content if isinstance(part, InputImage)]
        return "\n".join(texts), images

    def edit_request(self, prompt: str) -> EditRequest:
        """Returns the same request in the words of the images endpoints. Raises: pydantic's ValidationError."""
        options: dict[str, Any] = {name: getattr(self, name) for name in LoopOptions.model_fields}
        tool = self.tool.model_dump(exclude_none=True, exclude={"type", "action"})
        if tool.get("model") not in (None, self.model) and self.model is not None:
            raise ApiError(422, "tools.0.model: the server has one image model; name it once", "tools", "invalid_value")
        return EditRequest.model_validate(
            {**{name: value for name, value in options.items() if value is not None}, **tool, "prompt": prompt}
            | {"stream": self.stream, "user": self.user}
        )
