"""Ray's proxy answers for itself when no replica can; this makes those answers ours.

Ray loads it where the variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH is
`serve.proxy.middlewares`. `python -m serve.app` sets that for the Ray that it starts; on a running
cluster set it, with a PYTHONPATH that finds this module, where Ray is started.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError

# What Ray says in plain text, and what it means to a caller.
_OURS = {
    404: ApiError(503, "unavailable", "the application is not running yet"),
    408: ApiError(504, "timeout", "no answer came before the server's own deadline"),
    429: ApiError(429, "overloaded", "too many requests are waiting: try again"),
    500: ApiError(503, "unavailable", "the replica that had this request is gone: try again"),
    503: ApiError(503, "unavailable", "no replica takes requests now: try again"),
}


def middlewares() -> list[Middleware]:
    """What Ray's proxy is to run around each request."""
    return [Middleware(OneEnvelope)]


class OneEnvelope:
    """ASGI middleware: a failure that Ray words itself becomes our error envelope.

    The application fails in JSON only, so plain text comes from Ray.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, replaced = False, False

        async def ours(message: Message) -> None:
            nonlocal begun, replaced
            if message["type"] == "http.response.start":
                begun = True
                error = _OURS.get(message["status"])
                if error is not None and not _is_json(message):
                    replaced = True
                    await error.response()(scope, receive, send)
                    return
            if not replaced:
                await send(message)

        await self._app(scope, receive, ours)
        if not begun:
            await _OURS[503].response()(scope, receive, send)


def _is_json(start: Message) -> bool:
    headers = {name.lower(): value for name, value in start.get("headers", ())}
    return bytes(headers.get(b"content-type", b"")).startswith(b"application/json")
