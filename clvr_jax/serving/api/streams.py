"""Server-sent events, and waiting for a result while the client may leave."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse

from clvr_jax.serving.errors import ApiError, api_error

Result = TypeVar("Result")
KEEPALIVE = b": keepalive\n\n"
_POLL_SECONDS = 0.25
_log = logging.getLogger("clvr.serving")


def event_bytes(data: Any, kind: str | None = None, number: int | None = None) -> bytes:
    """Encodes a server-sent event. data: a text, or JSON values."""
    text = data if isinstance(data, str) else json.dumps(data)
    head = "" if number is None else f"id: {number}\n"
    head += "" if kind is None else f"event: {kind}\n"
    return f"{head}data: {text}\n\n".encode()


def stream_response(events: AsyncIterator[bytes], on_leave: Callable[[], None] = lambda: None) -> StreamingResponse:
    """Returns a response that sends events.

    After the first byte the status cannot change, so an error becomes an event `error` with the usual body.

    Args:
      events: encoded events.
      on_leave: called at the end of the stream, also if the client left.
    """

    async def guarded() -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield event
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - becomes the last event
            found = error if isinstance(error, ApiError) else api_error(error)
            if found.status_code == 500:
                _log.error("stream failed", exc_info=error)
            yield event_bytes(found.body, "error")
        finally:
            on_leave()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(guarded(), media_type="text/event-stream", headers=headers)


async def result_of(future: Future[Result], request: Request, on_leave: Callable[[], None]) -> Result:
    """Waits for a job's result.

    Args:
      future: of the job.
      request: whose client may disconnect.
      on_leave: called if the client left before the result was there.
    Raises: ApiError for the error of the job, or 499 if the client left.
    """
    waiting = asyncio.wrap_future(future)
    while True:
        done, _ = await asyncio.wait([waiting], timeout=_POLL_SECONDS)
        if done:
            break
        if await request.is_disconnected():
            on_leave()
            waiting.cancel()
            raise ApiError(499, "the client closed the connection")
    try:
        return waiting.result()
    except asyncio.CancelledError as error:
        raise ApiError(503, "the server stopped this request", code="shutting_down") from error
    except Exception as error:
        raise api_error(error) from error


async def with_keepalive(future: Future[Any], seconds: float) -> AsyncIterator[bytes]:
    """Yields a comment each time that a job gave no result for some seconds, until it has one."""
    waiting = asyncio.wrap_future(future)
    while not (await asyncio.wait([waiting], timeout=seconds))[0]:
        yield KEEPALIVE
