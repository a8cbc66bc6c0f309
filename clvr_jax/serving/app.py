"""The application: all endpoints and the page, errors in one form, the key, the limit on bodies, and request ids."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clvr_jax.serving.api.bodies import bounded_receive, too_large
from clvr_jax.serving.api.chat import chat_routes
from clvr_jax.serving.api.edits import edit_routes
from clvr_jax.serving.api.images import image_routes
from clvr_jax.serving.api.loops import loop_routes
from clvr_jax.serving.api.responses import response_routes
from clvr_jax.serving.errors import ApiError, api_error, error_body, of_validation
from clvr_jax.serving.index.rows import DamagedRowError
from clvr_jax.serving.index.tables import IndexUnavailableError
from clvr_jax.serving.page_routes import is_page, page_routes
from clvr_jax.serving.requests import UNSUPPORTED
from clvr_jax.serving.service import Service

_OPEN_PATHS = ("/health", "/ready")
"""Paths without a key, for load balancers."""
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}")
_log = logging.getLogger("clvr.serving")


def make_app(service: Service, key: str | None = None) -> FastAPI:
    """Returns the application.

    Args:
      service: what it serves.
      key: that clients must send as a bearer token; None lets everybody in.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="clvr", version=_version(), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(image_routes(service))
    app.include_router(loop_routes(service))
    app.include_router(edit_routes(service))
    app.include_router(response_routes(service))
    app.include_router(chat_routes(service))
    app.include_router(page_routes(service, key is not None))
    _add_state_routes(app, service)
    app.add_exception_handler(RequestValidationError, _validation_response)
    app.add_exception_handler(HTTPException, _http_response)
    app.add_exception_handler(IndexUnavailableError, _index_response)
    app.add_exception_handler(DamagedRowError, _index_response)
    app.add_middleware(_Gate, service=service, key=key)
    return app


def _add_state_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        """Lists the models."""
        names = [name for name in (service.models.name, service.models.chat_name) if name]
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "clvr"} for name in names]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """Returns one model."""
        if name not in (service.models.name, service.models.chat_name):
            raise ApiError(404, f"no such model: {name[:100]!r}", "model", "model_not_found")
        return JSONResponse({"id": name, "object": "model", "created": 0, "owned_by": "clvr"})

    @app.get("/health")
    async def health() -> Response:
        """Says whether the server works: 200 once its programs are compiled."""
        scheduler = service.scheduler
        if scheduler.is_ready and scheduler.is_alive:
            return JSONResponse({"status": "ok"})
        status = "failed" if scheduler.failure is not None else "starting"
        return JSONResponse({"status": status}, 503)

    @app.get("/ready")
    async def ready() -> Response:
        """Says whether a further request would be accepted now."""
        is_ready = service.scheduler.is_ready and service.scheduler.is_alive and not service.scheduler.is_full
        is_ready = is_ready and (service.replica is None or service.replica.is_connected)
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/version")
    async def version() -> Response:
        """Returns the version of the program."""
        return JSONResponse({"version": _version()})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Returns all metrics as Prometheus reads them."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


class _Gate:
    """Middleware in front of everything: request id, key, limit on the body, and metrics of requests."""

    def __init__(self, app: ASGIApp, service: Service, key: str | None):
        self._app, self._service = app, service
        self._key = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        began, status, has_begun = time.monotonic(), 500, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            if refusal is not None:
                await refusal(scope, receive, send_with_id)
            else:
                limits = self._service.limits
                bounded = bounded_receive(receive, limits.max_body_bytes, limits.max_body_seconds)
                await self._app(scope, bounded, send_with_id)
        except ClientDisconnect:
            status = 499  # the client left before its body was complete; nobody reads an answer
        except Exception:
            _log.exception("%s %.20r %.200r", request_id, scope["method"], scope["path"])
            if has_begun:
                raise  # the connection is closed, which is all that can still be said
            body = error_body(500, "internal error; the server's log has the details", code="internal_error")
            await JSONResponse(body, 500)(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            # Each name is a time series of its own, and a client may send any.
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._service.metrics.requests.labels(route, method, str(status)).inc()
            if status >= 500 or _log.isEnabledFor(logging.DEBUG):
                _log.info("%s %s %s %d %.3f s", request_id, method, route, status, time.monotonic() - began)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> Response | None:
        """Returns the response to a request without the key or with a body that is too large, else None."""
        if self._key is not None and scope["path"] not in _OPEN_PATHS and not is_page(scope["path"]):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._key):  # in constant time, so that a key cannot be guessed by bytes
                body = error_body(401, "a valid key is needed: Authorization: Bearer KEY", code="invalid_api_key")
                return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        limit = self._service.limits.max_body_bytes
        if length.isdigit() and (len(length) > 18 or int(length) > limit):
            error = too_large(limit)
            return JSONResponse(error.body, error.status_code, {"Connection": "close"})
        return None


def _version() -> str:
    return metadata.version("clvr-jax")


async def _validation_response(_: Request, error: Any) -> Response:
    found = of_validation(error, UNSUPPORTED)
    return JSONResponse(found.body, found.status_code)


async def _index_response(_: Request, error: Any) -> Response:
    found = api_error(error)
    _log.error("%s", error)
    return JSONResponse(found.body, found.status_code, found.headers)


async def _http_response(request: Request, error: Any) -> Response:
    if isinstance(error, ApiError):
        return JSONResponse(error.body, error.status_code, error.headers)
    messages = {404: "no such path", 405: f"{request.method} is not possible here"}
    message = messages.get(error.status_code, str(error.detail))
    return JSONResponse(error_body(error.status_code, message), error.status_code, error.headers)
