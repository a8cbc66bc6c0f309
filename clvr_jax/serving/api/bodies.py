"""Limits on the bodies of requests: bytes, seconds, and values of JSON."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message, Receive

from clvr_jax.serving.errors import ApiError

MAX_VALUES = 100_000
"""Maximum number of values in a JSON body; each takes up to 100 bytes, and reading many holds all other requests."""


def bounded_receive(receive: Receive, max_bytes: int, max_seconds: float) -> Receive:
    """Returns `receive` with limits on the whole body, whatever length its header announced and however it arrives.

    Args:
      receive: of ASGI.
      max_bytes: size of the body.
      max_seconds: time until the body is complete; afterwards `receive` waits for the end of the connection.
    """
    received, is_complete, deadline = 0, False, time.monotonic() + max_seconds

    async def bounded() -> Message:
        nonlocal received, is_complete
        try:
            seconds = None if is_complete else deadline - time.monotonic()
            message = await asyncio.wait_for(receive(), seconds)
        except TimeoutError as error:
            text = f"the body was not complete after {max_seconds:g} s"
            raise ApiError(408, text, code="body_too_slow") from error
        received += len(message.get("body", b""))
        is_complete = not message.get("more_body", False)
        if received > max_bytes:
            raise too_large(max_bytes)
        return message

    return bounded


def too_large(max_bytes: int) -> ApiError:
    """Returns the error of a body that is too large."""
    return ApiError(413, f"the body has more than {max_bytes:,} bytes, the limit of this server", code="body_too_large")


class BoundedRoute(APIRoute):
    """A route whose JSON body has at most `MAX_VALUES` values."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns the handler of FastAPI, which is given a request of ours."""
        handle = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handle(_BoundedRequest(request.scope, request.receive))

        return bounded


class _BoundedRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_VALUES:
            text = f"a body with more than {MAX_VALUES:,} values is not read"
            raise ApiError(400, text, code="too_many_values")
        return await super().json()
