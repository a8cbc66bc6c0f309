"""Errors of the API, all in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from concurrent.futures import CancelledError
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from clvr_jax.errors import ClvrError
from clvr_jax.serving.index.rows import DamagedRowError
from clvr_jax.serving.index.tables import IndexUnavailableError

NO_IMAGE = "the loop has no image yet; wait for the event image, or cancel it"
"""Why a loop cannot be accepted."""
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An error that is returned to the client.

    Args:
      status: HTTP status.
      message: what happened and what to do, in one line.
      param: the field at fault, if there is one.
      code: a word for programs.
      retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        headers = None if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, message, headers)
        self.message, self.param, self.code = message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        return error_body(self.status_code, self.message, self.param, self.code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Returns the body of an error."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def of_validation(error: ValidationError | RequestValidationError, unsupported: dict[str, str]) -> ApiError:
    """Returns the first problem that pydantic found as an error of the API.

    Args:
      error: of pydantic.
      unsupported: known fields that no model here supports, each with the reason.
    """
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    param = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path")) or None
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])[:100]
        if name in unsupported:
            return ApiError(422, f"{name} is not supported: {unsupported[name]}", param, "unsupported_parameter")
        message = f"unknown field {name!r}; docs/how-to/serving.md lists the fields"
        return ApiError(422, message, param, "unknown_parameter")
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "missing":
        return ApiError(422, f"the field {param} is required" if param else "a body is required", param, "missing")
    return ApiError(422, f"{param or 'body'}: {message}"[:500], param, "invalid_value")


def message_of(error: BaseException) -> str:
    """Returns what a client may know of an error: the message of our own errors, nothing of others."""
    return str(error) if isinstance(error, ClvrError) else "internal error; the server's log has the details"


def api_error(error: BaseException) -> ApiError:
    """Returns the error of a job as one of the API."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, CancelledError):
        return ApiError(503, "the server stopped this request", code="shutting_down", retry_after=10)
    if isinstance(error, IndexUnavailableError):
        return ApiError(503, message_of(error), code="index_unavailable", retry_after=10)
    if isinstance(error, DamagedRowError):
        return ApiError(500, message_of(error), code="damaged")
    if isinstance(error, ClvrError):
        return ApiError(422, message_of(error), code="model_failed")
    return ApiError(500, message_of(error), code="internal_error")
