"""POST /v1/chat/completions: the controller alone, as a vision-language model; see `image_chat` for the image model."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from starlette.responses import JSONResponse, Response

from clvr_jax.interfaces import Message, Token
from clvr_jax.pipelines.qwen3_vl import ChatAnswer
from clvr_jax.reasoning.trajectories.trajectory import CANCELED
from clvr_jax.serving.api.bodies import BoundedRoute
from clvr_jax.serving.api.image_chat import answer_with_image
from clvr_jax.serving.api.streams import event_bytes, result_of, stream_response, with_keepalive
from clvr_jax.serving.errors import ApiError, api_error
from clvr_jax.serving.jobs import ChatJob
from clvr_jax.serving.models import ChatWork
from clvr_jax.serving.requests import ONLY_IMAGES, ChatRequest, TextPart
from clvr_jax.serving.service import Service

DEFAULT_TOKENS = 256
_TOKEN_BUCKETS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""A program is compiled for each limit on tokens, so a limit is rounded up to one of these and the reply is cut."""


def chat_routes(service: Service) -> APIRouter:
    """Returns the endpoint."""
    router = APIRouter(route_class=BoundedRoute)

    @router.post("/v1/chat/completions")
    async def completions(body: ChatRequest, request: Request) -> Response:
        """Continues a conversation, which may have images, by one reply, or by an image."""
        if body.model == service.models.name:
            return await answer_with_image(service, body, request)
        if service.models.chat_name is None:
            raise ApiError(404, "this server has no vision-language model of its own", "model", "model_not_found")
        service.check_model(body.model, service.models.chat_name)
        if given := [name for name in ONLY_IMAGES if getattr(body, name) is not None and name != "model"]:
            message = f"{given[0]} is not supported by the vision-language model"
            raise ApiError(422, message, given[0], "unsupported_parameter")
        limit = body.max_completion_tokens or body.max_tokens or DEFAULT_TOKENS
        if limit > service.limits.max_chat_tokens:
            message = f"max_tokens: at most {service.limits.max_chat_tokens} on this server, got {limit}"
            raise ApiError(422, message, "max_tokens", "invalid_value")
        messages, images = await asyncio.to_thread(_conversation, service, body)
        if len(images) > service.limits.max_images:
            raise ApiError(422, f"messages: at most {service.limits.max_images} images", "messages", "invalid_value")
        top = max(1, body.top_logprobs or 0) if body.logprobs else 0
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        bucket = next(each for each in _TOKEN_BUCKETS if each >= limit)
        job = service.submit_chat(ChatWork(messages, images, bucket, body.temperature or 0.0, seed, top))

        def leave() -> None:
            service.scheduler.stop(job, CANCELED)

        if body.stream:
            return stream_response(_stream(service, body, job, limit), leave)
        answer = _cut(service, await result_of(job.result, request, leave), limit)
        reply = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": reply, "logprobs": _logprobs(body, answer), "finish_reason": _reason(answer)}
        return JSONResponse({**_head(service, job, "chat.completion"), "choices": [choice], "usage": _usage(answer)})

    return router


def _conversation(service: Service, body: ChatRequest) -> tuple[list[Message], list[Image.Image]]:
    """Returns the messages as models read them, and their images in order."""
    messages: list[Message] = []
    images: list[Image.Image] = []
    for message in body.messages:
        if isinstance(message.content, str):
            messages.append({"role": message.role, "content": message.content})
            continue
        if message.role == "assistant" and any(not isinstance(part, TextPart) for part in message.content):
            raise ApiError(422, "a message of the role assistant has no images", "messages", "invalid_value")
        parts: list[dict[str, Any]] = []
        for part in message.content:
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
            else:
                images.append(service.decode_image(part.image_url.url, "image_url"))
                parts.append({"type": "image"})
        messages.append({"role": message.role, "content": parts})
    return messages, images


async def _stream(service: Service, body: ChatRequest, job: ChatJob, limit: int) -> AsyncIterator[bytes]:
    """Sends the reply in one piece once it is complete; the model decodes whole batches of replies."""
    head = _head(service, job, "chat.completion.chunk")

    def chunk(delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event_bytes({**head, "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    async for comment in with_keepalive(job.result, service.limits.keepalive_seconds):
        yield comment
    try:
        answer = _cut(service, job.result.result(timeout=0), limit)
    except Exception as error:
        raise api_error(error) from error
    yield chunk({"content": answer.text}, logprobs=_logprobs(body, answer))
    yield chunk({}, _reason(answer))
    if body.stream_options is not None and body.stream_options.include_usage:
        yield event_bytes({**head, "choices": [], "usage": _usage(answer)})
    yield event_bytes("[DONE]")


def _cut(service: Service, answer: ChatAnswer, limit: int) -> ChatAnswer:
    """Returns a reply of at most `limit` tokens; the model was given the next larger bucket."""
    if answer.output_tokens <= limit:
        return answer
    tokenizer = service.models.vlm.tokenizer
    ids = tokenizer.encode(answer.text, add_special_tokens=False)[:limit]
    tokens = None if answer.tokens is None else answer.tokens[:limit]
    return ChatAnswer(tokenizer.decode(ids), answer.input_tokens, limit, tokens, is_complete=False)


def _head(service: Service, job: ChatJob, kind: str) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": int(job.created), "model": service.models.chat_name}


def _reason(answer: ChatAnswer) -> str:
    return "stop" if answer.is_complete else "length"


def _usage(answer: ChatAnswer) -> dict[str, int]:
    total = answer.input_tokens + answer.output_tokens
    return {
        "prompt_tokens": answer.input_tokens,
        "completion_tokens": answer.output_tokens,
        "total_tokens": total,
    }


def _logprobs(body: ChatRequest, answer: ChatAnswer) -> dict[str, Any] | None:
    """Returns the logprobs of the reply's tokens; None if they were not asked for."""
    if answer.tokens is None:
        return None
    top = body.top_logprobs or 0
    content = [{**_token(each.text, each.logprob), "top_logprobs": _top(each, top)} for each in answer.tokens]
    return {"content": content, "refusal": None}


def _top(token: Token, count: int) -> list[dict[str, Any]]:
    ordered = sorted(token.top.items(), key=lambda entry: -entry[1])
    return [_token(text, logprob) for text, logprob in ordered[:count]]


def _token(text: str, logprob: float) -> dict[str, Any]:
    # JSON has no infinity; OpenAI's value for an impossible token is -9999.
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}
