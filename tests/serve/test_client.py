"""The Python client: its retries on a transport of its own, then against the application."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import numpy as np
import pytest

from serve.client import AsyncClient, Client, ServerError

ANSWER = {
    "hits": [{"doc_id": "a", "score": 0.5, "rank": 1, "title": "A"}],
    "coverage": {"fraction": 1.0, "shards_ok": 1, "shards": 1, "degraded": []},
    "index": {"generation": 3, "fingerprint": "f"},
    "encoder": "e",
    "timing_ms": {},
}


class Scripted:
    """Answers with one status after the other, the last for ever."""

    def __init__(self, *statuses: int, retry_after: str = "0") -> None:
        self.statuses, self.retry_after, self.asked = statuses, retry_after, 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        status = self.statuses[min(self.asked, len(self.statuses) - 1)]
        self.asked += 1
        if status == 200:
            return httpx.Response(200, json=ANSWER)
        body = {"error": {"type": "some", "message": "why", "param": "k"}}
        return httpx.Response(status, json=body, headers={"Retry-After": self.retry_after})


def search(server: Scripted, retry_for_s: float = 5.0) -> object:
    with Client(
        "http://test", retry_for_s=retry_for_s, transport=httpx.MockTransport(server)
    ) as client:
        return client.search("x")


def search_async(server: Scripted, retry_for_s: float = 5.0) -> object:
    async def run() -> object:
        transport = httpx.MockTransport(server)
        async with AsyncClient(
            "http://test", retry_for_s=retry_for_s, transport=transport
        ) as client:
            return await client.search("x")

    return asyncio.run(run())


both = pytest.mark.parametrize("ask", [search, search_async])


@both
def test_a_busy_server_is_asked_again(ask):
    server = Scripted(429, 503, 200)
    results = ask(server)
    assert server.asked == 3
    assert (results.hits[0].doc_id, results.generation, results.coverage) == ("a", 3, 1.0)


@both
@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 500, 504])
def test_what_will_not_change_is_raised_at_once(ask, status):
    server = Scripted(status)
    with pytest.raises(ServerError, match=f"{status} some: why") as caught:
        ask(server)
    assert server.asked == 1
    assert (caught.value.status, caught.value.param) == (status, "k")


@both
def test_retry_after_is_honoured_and_so_is_the_time_given(ask):
    server = Scripted(503, 200, retry_after="1")
    start = time.monotonic()
    ask(server)
    assert time.monotonic() - start >= 1
    with pytest.raises(ServerError, match="503"):
        ask(Scripted(503, retry_after="9"), retry_for_s=2)


@pytest.mark.parametrize(
    ("after", "least", "most"),
    [
        ("7", 7, 7),
        (format_datetime(datetime.now(UTC) + timedelta(days=9), usegmt=True), 8 * 86400, 9 * 86400),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("soon", None, None),
    ],
    ids=["seconds", "later", "past", "neither"],
)
def test_a_proxy_may_give_a_date_to_ask_again_at(after, least, most):
    """It was read as nothing, and the server asked again at once."""
    with pytest.raises(ServerError) as refused:
        search(Scripted(503, retry_after=after), retry_for_s=0)
    told = refused.value.retry_after_s
    assert told is None if least is None else least <= told <= most


def test_a_later_server_may_say_more():
    """Its first new field of a hit was a TypeError in every client before it."""
    more = {**ANSWER, "hits": [{**ANSWER["hits"][0], "snippet": "…"}], "took": 3}
    server = httpx.MockTransport(lambda request: httpx.Response(200, json=more))
    with Client("http://test", transport=server) as client:
        (hit,) = client.search("x").hits
    assert (hit.doc_id, hit.title) == ("a", "A")


@pytest.mark.parametrize(
    ("more", "waits_s"), [({}, 30), ({"timeout_ms": 2000}, 30), ({"timeout_ms": 60_000}, 65)]
)
def test_a_server_that_is_given_a_minute_is_waited_for(more, waits_s):
    def server(request: httpx.Request) -> httpx.Response:
        assert request.extensions["timeout"]["read"] == waits_s
        return httpx.Response(200, json=ANSWER)

    async def run() -> object:
        async with AsyncClient("http://test", transport=transport) as client:
            return await client.search("x", **more)

    transport = httpx.MockTransport(server)
    with Client("http://test", transport=transport) as client:
        assert client.search("x", **more) == asyncio.run(run())


def test_one_text_is_not_taken_for_many():
    """Each of its letters was searched for, or encoded."""
    server = Scripted(200)
    one = pytest.raises(TypeError, match=r"found one text: \['otter'\]\?")
    with Client("http://test", transport=httpx.MockTransport(server)) as client:
        with one:
            client.search_many("otter")
        with one:
            client.embed("otter")

    async def ask() -> None:
        transport = httpx.MockTransport(server)
        async with AsyncClient("http://test", transport=transport) as client:
            with one:
                await client.search_many("otter")
            with one:
                await client.embed("otter")

    asyncio.run(ask())
    assert server.asked == 0


def test_a_page_is_no_answer():
    """What stands at a wrong URL, or a proxy that asks to sign in, was an error of json's."""
    page = httpx.MockTransport(lambda request: httpx.Response(200, html="<p>Sign in</p>"))
    refused = pytest.raises(ServerError, match=r"^200 unknown: <p>Sign in</p>$")
    with Client("http://test", transport=page) as client, refused:
        client.search("x")


def test_against_the_application(served, encoder):
    with Client(served.url, served.search_key) as client:
        one = client.search("otter", k=3)
        many = client.search_many(["otter", "heron"], k=3, include_text=False)
        assert one.hits[0].text
        assert [h.doc_id for h in one.hits] == [h.doc_id for h in many.rankings[0]]
        assert one.index == served.index.fingerprint
        vectors = client.embed(["otter"], "document")
        assert vectors == pytest.approx(encoder.encode(["otter"], "document"), abs=1e-2)
        assert vectors.dtype == np.float32
        with pytest.raises(ServerError, match="422 invalid_request"):
            client.search("")
    with (
        Client(served.url, "not-a-key-of-this-server") as client,
        pytest.raises(ServerError, match="401 unauthorized"),
    ):
        client.search("otter")
