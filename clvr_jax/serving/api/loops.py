"""/v1/loops: loops that continue without a connection, their events, and their control."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from clvr_jax.files.json_input import UncheckedJSON
from clvr_jax.reasoning.trajectories.trajectory import CANCELED, STOPPED
from clvr_jax.serving.api.bodies import BoundedRoute
from clvr_jax.serving.api.streams import KEEPALIVE, event_bytes, stream_response
from clvr_jax.serving.errors import NO_IMAGE, ApiError
from clvr_jax.serving.event_log import Event, EventLog
from clvr_jax.serving.index.records import FAILED, RUNNING, Run
from clvr_jax.serving.jobs import LoopJob
from clvr_jax.serving.replicas.remote import follow_elsewhere, stop_elsewhere
from clvr_jax.serving.requests import LoopRequest
from clvr_jax.serving.service import Service

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
        (job,) = await service.start_loops(await asyncio.to_thread(service.specs, body, images))
        item = await asyncio.to_thread(loop_item, service, job.id)
        return JSONResponse(item, 202, {"Location": f"/v1/loops/{job.id}"})

    @router.get("/v1/loops")
    async def listing(
        limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = 20,
        before: Annotated[str | None, Query(max_length=64)] = None,
        query: Annotated[str, Query(max_length=200)] = "",
    ) -> Response:
        """Lists loops, newest first.

        `before` is the id after which the next page begins; `query` has words that must all be in the prompt.
        """
        return JSONResponse(await asyncio.to_thread(_page, service, limit, before, query))

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
        keepalive = service.limits.keepalive_seconds
        job = service.jobs.get(loop_id)
        if job is not None:
            return stream_response(_encoded(job.log.follow(after, keepalive)))
        if (run := await asyncio.to_thread(service.run_elsewhere, loop_id)) is not None:
            return stream_response(_encoded(follow_elsewhere(service, run.loop_id, after)))
        log = await asyncio.to_thread(_stored_log, service, loop_id)
        return stream_response(_encoded(log.follow(after, keepalive)))

    @router.post("/v1/loops/{loop_id}/accept")
    async def accept(loop_id: str) -> Response:
        """Ends a loop before its next work or denoising step; its best image so far is the result."""
        loop = await running_loop(service, loop_id)
        if loop.best is None:
            raise ApiError(400, NO_IMAGE, code="no_image")
        return await _stop(service, loop, loop_id, "accept", STOPPED)

    @router.post("/v1/loops/{loop_id}/cancel")
    async def cancel(loop_id: str) -> Response:
        """Cancels a loop before its next work or denoising step; what it has is stored."""
        return await _stop(service, await running_loop(service, loop_id), loop_id, "cancel", CANCELED)

    @router.delete("/v1/loops/{loop_id}")
    async def delete(loop_id: str) -> Response:
        """Deletes a stored loop and its images."""
        if service.is_running(await asyncio.to_thread(entry_of, service, loop_id)):
            raise ApiError(400, "the loop is running; cancel it first", code="running")
        if not await asyncio.to_thread(service.store.forget, loop_id):
            await asyncio.to_thread(entry_of, service, loop_id)  # another request may have deleted it
            raise ApiError(400, "the loop is running, and its entry is damaged; try again later", code="running")
        return JSONResponse({"id": loop_id, "object": "loop.deleted", "deleted": True})

    return router


async def _stop(service: Service, loop: LoopJob | Run, loop_id: str, kind: str, outcome: str) -> Response:
    """Ends a loop, and answers once the replica that runs it knows of it; with the state "sent" if that takes long."""
    state = "received"
    if isinstance(loop, LoopJob):
        service.scheduler.stop(loop, outcome)
    elif not await stop_elsewhere(service, loop, kind):
        state = "sent"
    item = await asyncio.to_thread(loop_item, service, loop_id)
    return JSONResponse({**item, "command": {"kind": kind, "state": state}}, 202)


async def _encoded(events: AsyncIterator[Event | None]) -> AsyncIterator[bytes]:
    async for event in events:
        yield KEEPALIVE if event is None else event_bytes(event, event["type"], event["id"])


def _stored_log(service: Service, loop_id: str) -> EventLog:
    """Returns the events of a loop that has ended."""
    if events := service.store.events(loop_id):
        return EventLog(None, events)
    item = loop_item(service, loop_id)
    return EventLog(None, [{"id": 0, "type": "done", "status": item["status"], "error": item["error"]}])


async def running_loop(service: Service, loop_id: str) -> LoopJob | Run:
    """Returns a loop that has not ended; a Run if another replica runs it.

    Raises: ApiError, 404 for an unknown one, 400 for one that has ended.
    """
    if (job := service.jobs.get(loop_id)) is not None:
        return job
    if (run := await asyncio.to_thread(service.run_elsewhere, loop_id)) is not None:
        return run
    item = await asyncio.to_thread(loop_item, service, loop_id)
    raise ApiError(400, f"the loop has ended already ({item['status']})", code="not_running")


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
    shown = _shown(service, entry, _runs_elsewhere(service, [entry]).get(loop_id))
    if with_steps and entry["images"] is not None:
        content: UncheckedJSON = service.store.trajectory(loop_id).to_dict()
        for number, step in enumerate(content["steps"]):
            step["image_id"] = None if step.pop("image") is None else f"{loop_id}_{number}"
        shown |= {"steps": content["steps"], "edits": content["edits"]}
    return shown


def _runs_elsewhere(service: Service, entries: Sequence[dict[str, Any]]) -> dict[str, Run]:
    """Returns those loops that other replicas run, by their ids."""
    ids = [each["id"] for each in entries if each["status"] == RUNNING and each["id"] not in service.jobs]
    return {run.loop_id: run for run in service.store.runs(ids)} if ids else {}


def _page(service: Service, limit: int, before: str | None, query: str) -> dict[str, Any]:
    """Returns a page of the history. Raises: ApiError, 404, if `before` is unknown."""
    if before is not None:
        entry_of(service, before)
    entries = service.store.entries(limit + 1, before, query)
    page = entries[:limit]
    runs = _runs_elsewhere(service, page)
    data = [_shown(service, entry, runs.get(entry["id"])) for entry in page]
    return {"object": "list", "data": data, "has_more": len(entries) > limit}


def _shown(service: Service, entry: dict[str, Any], run: Run | None) -> dict[str, Any]:
    """Returns an entry of the index as the API shows it, with what is known of a running loop.

    Args:
      service: of this server.
      entry: of the index.
      run: the loop if another replica runs it.
    """
    request = {name: value for name, value in entry["request"].items() if name not in OWN_FIELDS}
    shown = {"object": "loop", **entry, "image_id": None, "parent": entry["request"].get("parent"), "request": request}
    best = entry["best"]
    job = service.jobs.get(entry["id"])
    if job is not None:
        best = job.best
        position = service.scheduler.position(job)
        shown |= {"queue_position": position, "images": len(job.state.steps) or None, "best": best}
        if entry["status"] == RUNNING:  # else the entry is damaged
            shown |= {"status": "queued" if job.started is None else RUNNING, "error": None}
    elif run is not None and run.damage is not None:
        shown |= {"status": FAILED, "error": run.damage}
    elif run is not None:
        best = run.best
        shown |= {"images": run.images or None, "best": best}
        shown["status"] = "queued" if run.started is None else RUNNING
        if run.owner is not None:  # else why it could not be resumed at last
            shown["error"] = None
    if best is not None:
        shown["image_id"] = f"{entry['id']}_{best}"
    return shown
