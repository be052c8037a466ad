"""What is counted of requests, without Ray."""

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from serve.metrics import Metered, Metrics


async def answered(request: Request) -> Response:
    return PlainTextResponse("")


async def failing(request: Request) -> Response:
    raise RuntimeError("a bug")


async def breaking_off(request: Request) -> Response:
    async def parts():
        yield "a"
        raise RuntimeError("a bug, later")

    return StreamingResponse(parts())


def test_replicas_that_count_apart_are_told_apart():
    """A scrape meets any of them: what both had counted fell and rose as one counter."""
    one, other = Metrics("a"), Metrics("b")
    for metrics, answered_ in ((one, 2), (other, 3)):
        metrics.request_total.labels("/search", "200").inc(answered_)
    lines = [*one.render().decode().splitlines(), *other.render().decode().splitlines()]
    samples = [line for line in lines if not line.startswith("#")]
    assert all('replica="a"' in line or 'replica="b"' in line for line in samples)
    assert len({line.rpartition(" ")[0] for line in samples}) == len(samples)
    assert 'bixse_request_total{code="200",replica="b",route="/search"} 3.0' in lines
    assert "bixse_in_flight 0.0" in Metrics().render().decode(), "one alone needs no name"


@pytest.mark.parametrize(
    "endpoint, code",
    [(answered, 200), (failing, 500), (breaking_off, 200)],
    ids=["answered", "failing", "breaking off"],
)
def test_each_answer_is_counted_once_those_to_bugs_too(endpoint, code):
    """Starlette answers a bug outside of the middleware that counts."""
    metrics = Metrics()
    app = Starlette(
        routes=[Route("/search", endpoint)], middleware=[Middleware(Metered, metrics=metrics)]
    )

    async def ask() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.get("/search")

    asyncio.run(ask())
    sample = metrics.registry.get_sample_value
    assert sample("bixse_request_total", {"route": "/search", "code": str(code)}) == 1
    assert sample("bixse_request_seconds_count", {"route": "/search"}) == 1
