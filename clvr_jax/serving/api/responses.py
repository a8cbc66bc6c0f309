"""/v1/responses: the loop as the tool image_generation, with an item for each image and for each look at one.

A response is a loop: `resp_X` is the loop `loop_X`, and `ig_X_2` its image of step 2.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from clvr_jax.errors import ClvrError
from clvr_jax.files.image_io import as_pil
from clvr_jax.reasoning.trajectories.trajectory import CANCELED, Step, Trajectory
from clvr_jax.serving.api.bodies import BoundedRoute
from clvr_jax.serving.api.images import conditioning_of, format_fields, size_of, usage_of
from clvr_jax.serving.api.loops import entry_of
from clvr_jax.serving.api.response_requests import InputImageCall, ResponseRequest, ToolChoice
from clvr_jax.serving.api.streams import KEEPALIVE, event_bytes, result_of, stream_response
from clvr_jax.serving.errors import ApiError, message_of, of_validation
from clvr_jax.serving.index.rows import DamagedRowError
from clvr_jax.serving.jobs import LoopJob
from clvr_jax.serving.requests import UNSUPPORTED, EditRequest, stored_request
from clvr_jax.serving.service import Service, encode

STORED = "response"
"""Where the request of a loop keeps what only responses have."""
_RESPONSE_ID = re.compile(r"resp_([0-9a-f]{24})")
_CALL_ID = re.compile(r"ig_([0-9a-f]{24}_\d{1,4})")


def response_routes(service: Service) -> APIRouter:
    """Returns the endpoints."""
    router = APIRouter(route_class=BoundedRoute)

    @router.post("/v1/responses")
    async def create(body: ResponseRequest, request: Request) -> Response:
        """Generates or edits an image by a loop."""
        spec, view = await asyncio.to_thread(_spec, service, body)
        (job,) = await service.start_loops([spec])
        view = replace(view, key=job.id.removeprefix("loop_"), created=job.created)

        def leave() -> None:
            service.scheduler.stop(job, CANCELED)

        if body.stream:
            return stream_response(_stream(service, job, view), leave)
        try:
            trajectory = await result_of(job.result, request, leave)
        except ApiError as error:
            if error.status_code != 422:
                raise
            return JSONResponse(view.failed(error.message))
        return JSONResponse(await asyncio.to_thread(view.ended, service, trajectory))

    @router.get("/v1/responses/{response_id}")
    async def retrieve(response_id: str) -> Response:
        """Returns a response, with its images."""
        return JSONResponse(await asyncio.to_thread(_stored, service, response_id))

    return router


@dataclass(frozen=True)
class _View:
    """A response as clients see it.

    Attributes:
      body: the request in the words of the images endpoints.
      own: the fields that are repeated in the response: previous_response_id, metadata, tools, tool_choice.
      action: "generate" or "edit".
      model: name of the image model.
      key: what its ids have in common.
      created: when it began, in seconds.
    """

    body: EditRequest
    own: dict[str, Any]
    action: str
    model: str
    key: str = ""
    created: float = 0.0

    def head(self, status: str) -> dict[str, Any]:
        """Returns a response without output."""
        return {
            "id": f"resp_{self.key}", "object": "response", "created_at": int(self.created), "status": status,
            "model": self.model, "output": [], "error": None, "incomplete_details": None, "instructions": None,
            "parallel_tool_calls": False, "temperature": None, "top_p": None,
            "loop_id": f"loop_{self.key}", **self.own,
        }  # fmt: skip

    def failed(self, message: str, code: str = "server_error") -> dict[str, Any]:
        """Returns a response that has no image."""
        return {**self.head("failed"), "error": {"code": code, "message": message}}

    def ended(self, service: Service, trajectory: Trajectory) -> dict[str, Any]:
        """Returns the response with all that its loop made."""
        output = [item for number in range(len(trajectory.steps)) for item in self._items(trajectory, number)]
        shown = {
            "output": output,
            "usage": _usage(service, trajectory),
            "outcome": trajectory.outcome,
            "unmet": None if trajectory.unmet is None else list(trajectory.unmet),
            "seed": trajectory.seed,
            "best": None if trajectory.best is None else self.call_id(trajectory.best),
        }
        if trajectory.outcome == CANCELED:
            return {**self.head("incomplete"), **shown, "incomplete_details": {"reason": CANCELED}}
        if trajectory.best is None:
            reason = trajectory.error or "the controller stopped"
            return {**self.failed(f"no image was generated ({trajectory.outcome}: {reason})"), **shown}
        return {**self.head("completed"), **shown}

    def call_id(self, step: int) -> str:
        """Returns the id of the item of an image."""
        return f"ig_{self.key}_{step}"

    def call(self, status: str, step: int) -> dict[str, Any]:
        """Returns the item of an image that is not there yet."""
        return {"id": self.call_id(step), "type": "image_generation_call", "status": status, "result": None}

    def image(self, prompt: str, steps: Sequence[Step], step: int) -> dict[str, Any]:
        """Returns the item of an image."""
        image = steps[step].image
        assert image is not None
        data = encode(image, self.body.kind, self.body.output_compression)
        return {
            **self.call("completed", step),
            "result": base64.b64encode(data).decode(),
            "revised_prompt": conditioning_of(prompt, steps, step),
            "action": self.action,
            **format_fields(self.body, size_of(image)),
        }

    def look(self, step: int, text: str) -> dict[str, Any]:
        """Returns the item of a look at an image: what is there, and what is unmet."""
        summary = [{"type": "summary_text", "text": text}]
        return {"id": f"rs_{self.key}_{step}", "type": "reasoning", "status": "completed", "summary": summary}

    def _items(self, trajectory: Trajectory, number: int) -> list[dict[str, Any]]:
        step = trajectory.steps[number]
        items = [] if step.image is None else [self.image(trajectory.prompt, trajectory.steps, number)]
        return items if step.verification is None else [*items, self.look(number, step.verification.report)]


class _Events:
    """Numbers the events of a stream, and the items of its output."""

    def __init__(self) -> None:
        self._number = -1
        self.items: list[dict[str, Any]] = []

    def encode(self, kind: str, **fields: Any) -> bytes:
        """Encodes the next event."""
        self._number += 1
        return event_bytes({"type": f"response.{kind}", "sequence_number": self._number, **fields}, f"response.{kind}")

    def added(self, item: dict[str, Any]) -> bytes:
        """Encodes the beginning of the next item."""
        self.items.append(item)
        return self.encode("output_item.added", output_index=len(self.items) - 1, item=item)

    def done(self, item: dict[str, Any]) -> bytes:
        """Encodes the end of the item that began last."""
        self.items[-1] = item
        return self.encode("output_item.done", output_index=len(self.items) - 1, item=item)

    def of_call(self, kind: str, **fields: Any) -> bytes:
        """Encodes an event of the image that is generated."""
        own = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return self.encode(f"image_generation_call.{kind}", **own, **fields)


async def _stream(service: Service, job: LoopJob, view: _View) -> AsyncIterator[bytes]:
    events, wanted, sent = _Events(), view.body.partial_images or 0, 0
    begun: int | None = None  # the step whose item has begun
    for kind in ("created", "in_progress"):
        yield events.encode(kind, response=view.head("in_progress"))
    async for event in job.log.follow(keepalive=service.limits.keepalive_seconds):
        if event is None:
            yield KEEPALIVE
        elif event["type"] == "generation_started" and begun is None:
            begun = event["step"]
            yield events.added(view.call("in_progress", begun))
            yield events.of_call("in_progress")
            yield events.of_call("generating")
        elif event["type"] == "image":
            step, begun = event["step"], None
            if not events.items or events.items[-1]["id"] != view.call_id(step):  # a further candidate
                yield events.added(view.call("in_progress", step))
                yield events.of_call("in_progress")
                yield events.of_call("generating")
            item = await asyncio.to_thread(view.image, job.spec.prompt, job.state.steps, step)
            if sent < wanted:
                made = {name: item[name] for name in ("size", "quality", "background", "output_format")}
                image = item["result"]
                yield events.of_call("partial_image", partial_image_index=sent, partial_image_b64=image, **made)
                sent += 1
            yield events.of_call("completed")
            yield events.done(item)
        elif event["type"] == "verification":
            look = view.look(event["step"], event["report"])
            yield events.added({**look, "status": "in_progress", "summary": []})
            yield events.done(look)
    if begun is not None:  # canceled before it was generated
        yield events.done(view.call("failed", begun))
    try:
        trajectory = job.result.result(timeout=5)  # the log is complete, so it is there
    except Exception as error:  # noqa: BLE001 - becomes the last event
        yield events.encode("failed", response=view.failed(message_of(error)))
        return
    # In the order in which all of this happened; verifications of one step may come after the images of others.
    response = {**await asyncio.to_thread(view.ended, service, trajectory), "output": events.items}
    yield events.encode(response["status"], response=response)


def _spec(service: Service, body: ResponseRequest) -> tuple[Any, _View]:
    """Returns the loop that a request asks for. Raises: ApiError."""
    prompt, references = body.texts_and_images()
    limit = service.limits.max_images
    if len(references) + (body.previous_response_id is not None) > limit:
        raise ApiError(422, f"input: at most {limit} images", "input", "invalid_value")
    images = [
        _earlier_image(service, each.id, "input")
        if isinstance(each, InputImageCall)
        else service.decode_image(each.image_url, "input")
        for each in references
    ]
    if body.previous_response_id is not None:
        previous = _previous(service, body.previous_response_id)
        if body.tool.action != "generate":
            images.insert(0, previous)
    if body.tool.action == "edit" and not images:
        raise ApiError(422, "action edit: there is no image to edit", "tools", "invalid_value")
    if body.tool.action == "generate" and images:
        raise ApiError(422, "action generate takes no images; choose edit or auto", "tools", "invalid_value")
    try:
        request = body.edit_request(prompt)
    except ValidationError as error:
        raise of_validation(error, UNSUPPORTED) from error
    (spec,) = service.specs(request, images)
    tools = [each.model_dump(exclude_none=True) for each in body.tools]
    choice = body.tool_choice.model_dump() if isinstance(body.tool_choice, ToolChoice) else body.tool_choice or "auto"
    own = {
        "previous_response_id": body.previous_response_id,
        "metadata": body.metadata or {},
        "tools": tools,
        "tool_choice": choice,
    }
    action = "edit" if images else "generate"
    stored = {**spec.request, STORED: {**own, "action": action}}
    return replace(spec, request=stored), _View(request, own, action, service.models.name)


def _previous(service: Service, response_id: str) -> Image.Image:
    """Returns the best image of a response. Raises: ApiError, 404 for an unknown one, 409 if it has no image yet."""
    loop_id = _loop_id(response_id, "previous_response_id")
    entry = service.store.entry(loop_id)
    if entry is None:
        raise ApiError(404, "no such response; it may have been deleted", "previous_response_id", "not_found")
    if service.is_running(entry):
        raise ApiError(409, "the previous response is not finished", "previous_response_id", "not_finished")
    if entry["best"] is None:
        raise ApiError(409, "the previous response has no image", "previous_response_id", "no_image")
    return _earlier_image(service, f"ig_{loop_id.removeprefix('loop_')}_{entry['best']}", "previous_response_id")


def _earlier_image(service: Service, call_id: str, param: str) -> Image.Image:
    found = _CALL_ID.fullmatch(call_id)
    if found is None:
        raise ApiError(404, f"no such image: {call_id[:64]!r}", param, "not_found")
    loop_id, step = f"loop_{found[1]}".rsplit("_", 1)
    try:
        return as_pil(service.store.image(loop_id, int(step)))
    except ClvrError as error:
        raise ApiError(404, "no such image; it may have been deleted", param, "not_found") from error


def _loop_id(response_id: str, param: str) -> str:
    found = _RESPONSE_ID.fullmatch(response_id)
    if found is None:
        raise ApiError(404, f"no such response: {response_id[:64]!r}", param, "not_found")
    return f"loop_{found[1]}"


def _stored(service: Service, response_id: str) -> dict[str, Any]:
    """Returns a response that was made before. Raises: ApiError, 404."""
    loop_id = _loop_id(response_id, "response_id")
    entry = entry_of(service, loop_id)
    request = dict(entry["request"])
    own = request.pop(STORED, None)
    if own is None:
        raise ApiError(404, "no such response; GET /v1/loops has this loop", "response_id", "not_found")
    if not isinstance(own, dict) or own.get("action") not in ("edit", "generate"):
        raise DamagedRowError(f"the entry of loop {loop_id}: request: {STORED} is damaged; delete the loop")
    action = own.pop("action")
    body = stored_request({**request, "prompt": entry["prompt"]}, loop_id)
    view = _View(body, own, action, entry["model"], loop_id.removeprefix("loop_"), entry["created"])
    if service.is_running(entry):
        return view.head("in_progress")
    if entry["images"] is None:
        return view.failed(entry["error"] or f"the loop was {entry['status']}")
    return view.ended(service, service.store.trajectory(loop_id))


def _usage(service: Service, trajectory: Trajectory) -> dict[str, Any]:
    usage = usage_of(service, [trajectory])
    del usage["input_tokens_details"]
    no_cache = {"cached_tokens": 0, "cache_write_tokens": 0}
    return {**usage, "input_tokens_details": no_cache, "output_tokens_details": {"reasoning_tokens": 0}}
