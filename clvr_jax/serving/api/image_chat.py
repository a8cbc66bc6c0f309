"""Chats with the image model: the last message is the prompt, and the reply is an image."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from PIL import Image
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from clvr_jax.reasoning.trajectories.trajectory import CANCELED, Trajectory
from clvr_jax.serving.api.images import entry_for, usage_of
from clvr_jax.serving.api.streams import event_bytes, result_of, stream_response, with_keepalive
from clvr_jax.serving.errors import ApiError, api_error, of_validation
from clvr_jax.serving.jobs import LoopJob
from clvr_jax.serving.requests import (
    ONLY_TEXT,
    UNSUPPORTED,
    ChatMessage,
    ChatRequest,
    EditRequest,
    ImagePart,
    LoopOptions,
    TextPart,
)
from clvr_jax.serving.service import Service


async def answer_with_image(service: Service, body: ChatRequest, request: Request) -> Response:
    """Answers a chat with the image model."""
    if given := [name for name in ONLY_TEXT if getattr(body, name) is not None]:
        raise ApiError(422, f"{given[0]} is not supported by the image model", given[0], "unsupported_parameter")
    prompt, images = await asyncio.to_thread(_last_turn, service, body)
    own = {
        name: getattr(body, name) for name in (*LoopOptions.model_fields, "size", "quality", "output_format", "user")
    }
    try:
        image_request = EditRequest.model_validate({**own, "prompt": prompt})
    except ValidationError as error:
        raise of_validation(error, UNSUPPORTED) from error
    (job,) = await service.start_loops(await asyncio.to_thread(service.specs, image_request, images))

    def leave() -> None:
        service.scheduler.stop(job, CANCELED)

    if body.stream:
        return stream_response(_stream(service, body, image_request, job), leave)
    trajectory = await result_of(job.result, request, leave)
    content, loop = await asyncio.to_thread(_content, image_request, job, trajectory)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content, "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    usage = await asyncio.to_thread(_usage, service, trajectory)
    return JSONResponse({**_head(service, job, "chat.completion"), "choices": [choice], "usage": usage, **loop})


async def _stream(
    service: Service, body: ChatRequest, image_request: EditRequest, job: LoopJob
) -> AsyncIterator[bytes]:
    """Sends the image in one chunk once the loop has ended."""
    head = _head(service, job, "chat.completion.chunk")

    def chunk(delta: dict[str, Any], reason: str | None = None, **loop: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event_bytes({**head, "choices": [choice], **loop})

    yield chunk({"role": "assistant"})
    async for comment in with_keepalive(job.result, service.limits.keepalive_seconds):
        yield comment
    try:
        trajectory = job.result.result(timeout=0)
    except Exception as error:
        raise api_error(error) from error
    content, loop = await asyncio.to_thread(_content, image_request, job, trajectory)
    yield chunk({"content": content}, **loop)
    yield chunk({}, "stop")
    if body.stream_options is not None and body.stream_options.include_usage:
        usage = await asyncio.to_thread(_usage, service, trajectory)
        yield event_bytes({**head, "choices": [], "usage": usage})
    yield event_bytes("[DONE]")


def _last_turn(service: Service, body: ChatRequest) -> tuple[str, list[Image.Image]]:
    """Returns the text of the last message, and its images after those of the reply before it, which are edited.

    Earlier turns are in these images already. Raises: ApiError for a conversation of another form.
    """
    *earlier, last = body.messages
    if any(message.role == "system" for message in body.messages):
        raise ApiError(422, f"system messages are not supported: {UNSUPPORTED['instructions']}", "messages")
    if last.role != "user":
        raise ApiError(422, "the last message must be the user's", "messages", "invalid_value")
    if earlier and earlier[-1].role != "assistant":
        raise ApiError(422, "put texts and images of one turn into one message", "messages", "invalid_value")
    replied = _images(earlier[-1]) if earlier else []
    if earlier and not replied:
        raise ApiError(422, "the reply before the last message has no image to edit", "messages", "invalid_value")
    found = [*replied, *_images(last)]
    if len(found) > service.limits.max_images:
        raise ApiError(422, f"messages: at most {service.limits.max_images} images", "messages", "invalid_value")
    images = [service.decode_image(part.image_url.url, "image_url") for part in found]
    if isinstance(last.content, str):
        return last.content, images
    return "\n".join(part.text for part in last.content if isinstance(part, TextPart)), images


def _images(message: ChatMessage) -> list[ImagePart]:
    return [] if isinstance(message.content, str) else [part for part in message.content if isinstance(part, ImagePart)]


def _content(
    image_request: EditRequest, job: LoopJob, trajectory: Trajectory
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the parts of the reply, and what is known of its loop. Raises: ApiError if there is no image."""
    entry = entry_for(image_request, job, trajectory, "")
    url = f"data:image/{image_request.kind};base64,{entry.pop('b64_json')}"
    return [{"type": "image_url", "image_url": {"url": url}}], entry


def _head(service: Service, job: LoopJob, kind: str) -> dict[str, Any]:
    return {
        "id": job.id.replace("loop_", "chatcmpl-"),
        "object": kind,
        "created": int(job.created),
        "model": service.models.name,
    }


def _usage(service: Service, trajectory: Trajectory) -> dict[str, int]:
    usage = usage_of(service, [trajectory])
    return {
        "prompt_tokens": usage["input_tokens"],
        "completion_tokens": usage["output_tokens"],
        "total_tokens": usage["total_tokens"],
    }
