"""Every failure is one envelope: {"error": {"type", "message", "param"?}}."""

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serve.messages import Unavailable

_LONGEST = 2000
"""Characters of a message, or of the name of a field."""


class ApiError(Exception):
    """A failure with its status, its type and one sentence for the caller."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        param: str | None = None,
        retry_after_s: int = 1,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.param = status, kind, message, param
        self.retry_after_s = retry_after_s

    def response(self) -> JSONResponse:
        """The answer that says so."""
        return JSONResponse(self.body, self.status, self.headers)

    @property
    def body(self) -> dict[str, Any]:
        error = {"type": self.kind, "message": _cut(self.message)}
        return {"error": error if self.param is None else {**error, "param": _cut(self.param)}}

    @property
    def headers(self) -> dict[str, str]:
        if self.status in (429, 503):
            after = {"Retry-After": str(self.retry_after_s)}
            # The next request of this caller should find another server.
            return {**after, "Connection": "close"} if self.kind == "draining" else after
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def invalid(message: str, param: str | None = None) -> ApiError:
    """A request that cannot be answered as it is; `param` is the field that is wrong."""
    return ApiError(422, "invalid_request", message, param)


def _cut(text: str) -> str:
    """Names and values come from the request, and may be as long as its body."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


async def _on_api_error(request: Request, error: ApiError) -> JSONResponse:
    return error.response()


async def _on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first["ctx"]["error"]
        return ApiError(400, "bad_json", f"the body is not JSON: {reason}").response()
    if first["type"] in ("missing", "model_attributes_type") and first["loc"] == ("body",):
        message = "expected a JSON object, sent as Content-Type: application/json"
        return invalid(message).response()
    # The first element says where in the request (body), not in which field.
    where = ".".join(str(part) for part in first["loc"][1:]) or None
    message = first["msg"].removeprefix("Value error, ")
    # Field names come from the body and may not be text that UTF-8 can hold.
    param = where.encode("utf-8", "replace").decode() if where else None
    return invalid(message, param).response()


async def _on_http_error(request: Request, error: HTTPException) -> JSONResponse:
    kinds = {400: "bad_json", 404: "not_found", 405: "method_not_allowed"}
    messages = {
        400: "the body cannot be read as JSON",
        404: f"no route {request.url.path}",
        405: f"{request.method} is not allowed here",
    }
    return ApiError(
        error.status_code,
        kinds.get(error.status_code, "http_error"),
        messages.get(error.status_code, str(error.detail)),
    ).response()


async def _on_timeout(request: Request, error: TimeoutError) -> JSONResponse:
    message = "no shard answered before the deadline: allow more time with timeout_ms"
    return ApiError(504, "timeout", message).response()


async def _on_unavailable(request: Request, error: Unavailable) -> JSONResponse:
    return ApiError(503, "unavailable", str(error)).response()


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    # Starlette logs the traceback after this answer.
    message = "the server failed; its log says why"
    return ApiError(500, "internal", message).response()


FAILURES = (400, 401, 403, 404, 405, 408, 413, 422, 429, 500, 503, 504)
"""Every status of a failure, for the OpenAPI document."""

HANDLERS: dict[Any, Any] = {
    ApiError: _on_api_error,
    RequestValidationError: _on_invalid,
    HTTPException: _on_http_error,
    TimeoutError: _on_timeout,
    Unavailable: _on_unavailable,
    Exception: _on_bug,
}
