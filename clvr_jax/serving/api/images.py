"""POST /v1/images/generations and /v1/images/edits, and GET /v1/images/{id}/content."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse, Response

from clvr_jax.files.image_io import ImageLike, as_pil
from clvr_jax.reasoning.conversation.context import conditioning_text
from clvr_jax.reasoning.trajectories.trajectory import CANCELED, Step, Trajectory
from clvr_jax.serving.api.bodies import BoundedRoute
from clvr_jax.serving.api.streams import KEEPALIVE, event_bytes, result_of, stream_response
from clvr_jax.serving.errors import ApiError, api_error, of_validation
from clvr_jax.serving.jobs import LoopJob
from clvr_jax.serving.requests import UNSUPPORTED, EditRequest, ImageRequest
from clvr_jax.serving.service import Service, encode


def _multipart() -> dict[str, Any]:
    """Returns the description of the body of an edit in the OpenAPI schema."""
    fields = EditRequest.model_json_schema()
    images = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}
    properties = {"image": images, **fields["properties"]}
    schema = {"type": "object", "required": ["image", "prompt"], "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def image_routes(service: Service) -> APIRouter:
    """Returns the endpoints."""
    router = APIRouter(route_class=BoundedRoute)

    @router.post("/v1/images/generations")
    async def generations(body: ImageRequest, request: Request) -> Response:
        """Generates images from a prompt."""
        return await _answer(service, body, [], request, "image_generation")

    @router.post("/v1/images/edits", openapi_extra=_multipart())
    async def edits(request: Request) -> Response:
        """Edits or combines images."""
        body, images = await _read_edit(service, request)
        return await _answer(service, body, images, request, "image_edit")

    @router.get("/v1/images/{image_id}/content")
    async def content(image_id: str) -> Response:
        """Returns the bytes of an image."""
        data, media_type = await asyncio.to_thread(service.image, image_id)
        return Response(data, media_type=media_type)

    return router


async def _read_edit(service: Service, request: Request) -> tuple[EditRequest, list[Image.Image]]:
    """Reads a multipart body: its fields, and its images in order."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "send the images and the fields as multipart/form-data", code="invalid_content_type")
    limits = service.limits
    # Twice the number of images, so that one too many is counted here and named.
    async with request.form(max_files=2 * limits.max_images + 1, max_fields=100) as form:
        fields: dict[str, Any] = {}
        files: list[bytes] = []
        for name, value in form.multi_items():
            if re.fullmatch(r"image(\[\d*\])?", name):
                if not isinstance(value, UploadFile):
                    raise ApiError(422, "image must be a file", "image", "invalid_value")
                files.append(await value.read())
            elif isinstance(value, UploadFile) and name not in UNSUPPORTED:
                raise ApiError(
                    422, f"unknown file {name[:100]!r}; images are sent as image", name[:100], "unknown_parameter"
                )
            elif name in fields:
                raise ApiError(422, f"the field {name[:100]!r} is given twice", name[:100], "invalid_value")
            else:
                fields[name] = value if isinstance(value, str) else ""
    try:
        body = EditRequest.model_validate(fields)
    except ValidationError as error:
        raise of_validation(error, UNSUPPORTED) from error
    if not 1 <= len(files) <= limits.max_images:
        message = f"give from 1 to {limits.max_images} images, got {len(files)}"
        raise ApiError(422, message, "image", "invalid_value")
    images = [await asyncio.to_thread(service.read_image, content, "image") for content in files]
    return body, images


async def _answer(
    service: Service, body: ImageRequest, images: Sequence[Image.Image], request: Request, kind: str
) -> Response:
    specs = await asyncio.to_thread(service.specs, body, images, body.n or 1)
    jobs = await service.start_loops(specs)

    def leave() -> None:
        for job in jobs:
            service.scheduler.stop(job, CANCELED)

    if body.stream:
        return stream_response(_stream(service, body, jobs[0], kind), leave)
    try:
        trajectories = [await result_of(job.result, request, leave) for job in jobs]
        entries = [
            await asyncio.to_thread(entry_for, body, job, trajectory, str(request.base_url))
            for job, trajectory in zip(jobs, trajectories, strict=True)
        ]
    except ApiError:
        leave()  # the other images of a request that failed
        raise
    usage = usage_of(service, trajectories)
    size = size_of(trajectories[0].image)
    return JSONResponse({"created": int(time.time()), "data": entries, **format_fields(body, size), "usage": usage})


async def _stream(service: Service, body: ImageRequest, job: LoopJob, kind: str) -> AsyncIterator[bytes]:
    """Sends an event after each generation, as many as were asked for, and one with the result."""
    wanted, sent = body.partial_images or 0, 0
    async for event in job.log.follow(keepalive=service.limits.keepalive_seconds):
        if event is None:
            yield KEEPALIVE
        elif event["type"] == "image" and sent < wanted:
            image = job.state.steps[event["step"]].image
            assert image is not None
            encoded = await asyncio.to_thread(encode, image, body.kind, body.output_compression)
            size = size_of(image)
            data = {"type": f"{kind}.partial_image", "b64_json": base64.b64encode(encoded).decode(),
                    "partial_image_index": sent, "created_at": int(time.time()),
                    **format_fields(body, size)}  # fmt: skip
            yield event_bytes(data, data["type"])
            sent += 1
    try:
        trajectory = job.result.result(timeout=5)  # the log is complete, so it is there
    except Exception as error:
        raise api_error(error) from error
    entry = await asyncio.to_thread(entry_for, body, job, trajectory, "")
    data = {"type": f"{kind}.completed", **entry, "created_at": int(time.time()),
            **format_fields(body, size_of(trajectory.image)), "usage": usage_of(service, [trajectory])}  # fmt: skip
    yield event_bytes(data, data["type"])


def entry_for(body: ImageRequest, job: LoopJob, trajectory: Trajectory, base_url: str) -> dict[str, Any]:
    """Returns one image of a response. Raises: ApiError if the loop has no image."""
    if job.is_interrupted:
        raise ApiError(
            503, "the server is shutting down and stopped this request", code="shutting_down", retry_after=10
        )
    best, image = trajectory.best, trajectory.image
    if image is None or best is None:
        reason = trajectory.error or "the controller stopped"
        raise ApiError(422, f"no image was generated ({trajectory.outcome}: {reason})", "prompt", "no_image")
    if body.response_format == "url":
        content = {"url": f"{base_url}v1/images/{job.id}_{best}.{body.kind}/content"}
    else:
        content = {"b64_json": base64.b64encode(encode(image, body.kind, body.output_compression)).decode()}
    return {
        **content,
        "revised_prompt": conditioning_of(trajectory.prompt, trajectory.steps, best),
        "seed": trajectory.seed,
        "loop_id": job.id,
        "outcome": trajectory.outcome,
        "unmet": None if trajectory.unmet is None else list(trajectory.unmet),
    }


def conditioning_of(prompt: str, steps: Sequence[Step], step: int) -> str:
    """Returns the text that the image of a step was generated from, with all replies."""
    own = steps[step]
    if not own.reasoning:
        return prompt
    replies = [steps[number].reasoning for number in own.references]
    return conditioning_text(prompt, [*replies, own.reasoning])


def format_fields(body: ImageRequest, size: str) -> dict[str, Any]:
    """Returns fields that say how the image was made. An automatic quality is high: a loop with all its steps."""
    quality = "high" if body.level == "auto" and body.mode != "one-shot" else body.level
    quality = "low" if quality == "auto" else quality
    return {"background": "opaque", "output_format": body.kind, "quality": quality, "size": size}


def size_of(image: ImageLike | None) -> str:
    """Returns the size of an image as WIDTHxHEIGHT; "auto" without one."""
    if image is None:
        return "auto"
    pillow = as_pil(image)
    return f"{pillow.width}x{pillow.height}"


def usage_of(service: Service, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Counts tokens: of the prompts and the users' images as input, of all generated images as output."""
    token = service.models.token_pixels

    def tokens(image: Any) -> int:
        pil = as_pil(image)
        return (pil.width // token) * (pil.height // token)

    text = sum(service.models.flux.prompt_length(each.prompt) for each in trajectories)
    given = sum(tokens(image) for each in trajectories for image in each.given_images)
    made = sum(tokens(step.image) for each in trajectories for step in each.generated)
    return {
        "input_tokens": text + given,
        "output_tokens": made,
        "total_tokens": text + given + made,
        "input_tokens_details": {"text_tokens": text, "image_tokens": given},
        "generations": sum(len(each.generated) for each in trajectories),
        "nfe": sum(each.nfe for each in trajectories),
    }
