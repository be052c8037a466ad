"""What Ray's proxy says for itself, in our words, without Ray."""

import asyncio

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from serve.proxy import OneEnvelope, middlewares


def through(app: ASGIApp) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(OneEnvelope(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get("/search")

    return asyncio.run(run())


@pytest.mark.parametrize(
    "said, status, kind",
    [
        (PlainTextResponse("Request dropped due to backpressure", 429), 429, "overloaded"),
        (PlainTextResponse("Internal Server Error", 500), 503, "unavailable"),
        (PlainTextResponse("Path '/search' not found", 404), 503, "unavailable"),
        (PlainTextResponse("Request timed out", 408), 504, "timeout"),
        (Response(status_code=503), 503, "unavailable"),
    ],
)
def test_a_failure_in_plain_text_becomes_the_envelope(said, status, kind):
    reply = through(said)
    assert reply.status_code == status
    assert reply.json()["error"]["type"] == kind
    assert ("retry-after" in reply.headers) == (status in (429, 503))


def test_what_the_application_says_passes_untouched():
    body = {"error": {"type": "not_found", "message": "no route"}}
    for reply in (JSONResponse(body, 404), JSONResponse({"a": 1}, 200), PlainTextResponse("m")):
        passed = through(reply)
        assert (passed.status_code, passed.content) == (reply.status_code, reply.body)


def test_no_answer_at_all_is_503():
    async def silent(scope, receive, send):
        pass

    assert through(silent).status_code == 503


def test_ray_is_given_the_middleware():
    assert [m.cls for m in middlewares()] == [OneEnvelope]
