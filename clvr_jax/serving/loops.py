"""/v1/loops: loops that continue without a connection, their events, and their control."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from clvr_jax.json_input import UncheckedJSON
from clvr_jax.reasoning.trajectory import CANCELED, STOPPED
from clvr_jax.serving.bodies import BoundedRoute
from clvr_jax.serving.errors import ApiError
from clvr_jax.serving.event_log import EventLog
from clvr_jax.serving.jobs import LoopJob
from clvr_jax.serving.requests import LoopRequest
from clvr_jax.serving.service import Service
from clvr_jax.serving.streams import KEEPALIVE, event_bytes, stream_response

_MAX_PAGE = 100
OWN_FIELDS = ("parent", "response")
"""What is stored in the request of a loop, but is no field of it: see `edits` and `responses`."""


def loop_routes(service: Service) -> APIRouter:
    """Returns the endpoints."""
    router = APIRouter(route_class=BoundedRoute)

    @router.post("/v1/loops", status_code=202)
    async def start(body: LoopRequest, request: Request) -> Response:
        """Starts a loop."""
        texts = body.images or []
        if len(texts) > service.limits.max_images:
            raise ApiError(422, f"images: at most {service.limits.max_images}", "images", "invalid_value")
        images = [await asyncio.to_thread(service.decode_image, text, "images") for text in texts]
        (job,) = service.submit(await asyncio.to_thread(service.specs, body, images))
        return JSONResponse(loop_item(service, job.id), 202, {"Location": f"/v1/loops/{job.id}"})

    @router.get("/v1/loops")
    async def listing(
        limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = 20,
        before: Annotated[str | None, Query(max_length=64)] = None,
        query: Annotated[str, Query(max_length=200)] = "",
    ) -> Response:
        """Lists loops, newest first.

        `before` is the id after which the next page begins; `query` has words that must all be in the prompt.
        """
        if before is not None:
            entry_of(service, before)
        entries = service.store.entries(limit + 1, before, query)
        page = [_shown(service, entry) for entry in entries[:limit]]
        return JSONResponse({"object": "list", "data": page, "has_more": len(entries) > limit})

    @router.get("/v1/loops/{loop_id}")
    async def item(loop_id: str) -> Response:
        """Returns a loop, with its steps once it is finished."""
        return JSONResponse(await asyncio.to_thread(loop_item, service, loop_id, True))

    @router.get("/v1/loops/{loop_id}/events")
    async def events(
        loop_id: str, last_event_id: Annotated[str | None, Header(max_length=20)] = None
    ) -> StreamingResponse:
        """Sends the events of a loop, those after Last-Event-ID if it is given."""
        after = -1
        if last_event_id:
            if not last_event_id.isascii() or not last_event_id.isdigit():
                raise ApiError(422, "Last-Event-ID must be the number of an event", "last-event-id", "invalid_value")
            after = int(last_event_id)
        job = service.jobs.get(loop_id)
        log = EventLog(None, service.store.events(loop_id)) if job is None else job.log
        if job is None and not log.events:
            entry = entry_of(service, loop_id)
            log = EventLog(None, [{"id": 0, "type": "done", "status": entry["status"], "error": entry["error"]}])
        return stream_response(_encoded(service, log, after))

    @router.post("/v1/loops/{loop_id}/accept")
    async def accept(loop_id: str) -> Response:
        """Ends a loop before its next work or denoising step; its best image so far is the result."""
        job = running_job(service, loop_id)
        if job.best is None:
            raise ApiError(400, "the loop has no image yet; wait for the event image, or cancel it", code="no_image")
        service.scheduler.stop(job, STOPPED)
        return JSONResponse(loop_item(service, loop_id), 202)

    @router.post("/v1/loops/{loop_id}/cancel")
    async def cancel(loop_id: str) -> Response:
        """Cancels a loop before its next work or denoising step; what it has is stored."""
        service.scheduler.stop(running_job(service, loop_id), CANCELED)
        return JSONResponse(loop_item(service, loop_id), 202)

    @router.delete("/v1/loops/{loop_id}")
    async def delete(loop_id: str) -> Response:
        """Deletes a stored loop and its images."""
        if loop_id in service.jobs:
            raise ApiError(400, "the loop is running; cancel it first", code="running")
        if not await asyncio.to_thread(service.store.forget, loop_id):
            raise _unknown()
        return JSONResponse({"id": loop_id, "object": "loop.deleted", "deleted": True})

    return router


async def _encoded(service: Service, log: EventLog, after: int) -> AsyncIterator[bytes]:
    async for event in log.follow(after, service.limits.keepalive_seconds):
        yield KEEPALIVE if event is None else event_bytes(event, event["type"], event["id"])


def running_job(service: Service, loop_id: str) -> LoopJob:
    """Returns a loop that has not ended. Raises: ApiError, 404 for an unknown one, 400 for one that has."""
    job = service.jobs.get(loop_id)
    if job is None:
        entry = entry_of(service, loop_id)
        raise ApiError(400, f"the loop has ended already ({entry['status']})", code="not_running")
    return job


def entry_of(service: Service, loop_id: str) -> dict[str, Any]:
    """Returns what the index has about a loop. Raises: ApiError, 404, for an unknown one."""
    entry = service.store.entry(loop_id)
    if entry is None:
        raise _unknown()
    return entry


def _unknown() -> ApiError:
    return ApiError(404, "no such loop; it may have been deleted", "id", "not_found")


def loop_item(service: Service, loop_id: str, with_steps: bool = False) -> dict[str, Any]:
    """Returns a loop as the API shows it. Raises: ApiError, 404, for an unknown one."""
    entry = entry_of(service, loop_id)
    shown = _shown(service, entry)
    if with_steps and entry["images"] is not None:
        content: UncheckedJSON = service.store.trajectory(loop_id).to_dict()
        for number, step in enumerate(content["steps"]):
            step["image_id"] = None if step.pop("image") is None else f"{loop_id}_{number}"
        shown |= {"steps": content["steps"], "edits": content["edits"]}
    return shown


def _shown(service: Service, entry: dict[str, Any]) -> dict[str, Any]:
    """Returns an entry of the index as the API shows it, with what only a running loop knows."""
    request = {name: value for name, value in entry["request"].items() if name not in OWN_FIELDS}
    shown = {"object": "loop", **entry, "image_id": None, "parent": entry["request"].get("parent"), "request": request}
    best = entry["best"]
    job = service.jobs.get(entry["id"])
    if job is not None:
        best = job.best
        position = service.scheduler.position(job)
        shown |= {"queue_position": position, "images": len(job.state.steps) or None, "best": best}
        shown["status"] = "queued" if job.started is None else entry["status"]
    if best is not None:
        shown["image_id"] = f"{entry['id']}_{best}"
    return shown
