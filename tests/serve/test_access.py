"""Keys, peers, places in flight and body sizes, without Ray."""

import asyncio
import logging
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serve.access import (
    Door,
    Keys,
    Places,
    Rate,
    authorize,
    check_binding,
    is_loopback,
    load_keys,
)
from serve.errors import ApiError

SEARCH, MONITOR = "search-key-0123456789", "monitor-key-012345678"
KEYS = load_keys(None, {"BIXSE_KEYS": f"search:{SEARCH},monitor:{MONITOR}"})


def test_keys_come_from_the_file_before_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# rotated in June\n\nsearch:{SEARCH}\n  monitor:{MONITOR}  \n")
    keys = load_keys(str(file), {"BIXSE_KEYS": "search:another-key-0123456"})
    assert keys.role_of(SEARCH) == "search"
    assert keys.role_of(MONITOR) == "monitor"
    assert keys.role_of("another-key-0123456") is None
    assert not load_keys(None, {})


@pytest.mark.parametrize(
    "near", ["", SEARCH[:-1], SEARCH + "x", SEARCH.upper(), "\ud800", "é" * 20]
)
def test_only_the_whole_key_fits(near):
    assert KEYS.role_of(near) is None


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        ("search:", "key 1: shorter than 16"),
        (f"search:{SEARCH}\nsearch:short", "key 2: shorter than 16"),
        (SEARCH, "key 1: expected search:KEY"),
        (f"root:{SEARCH}", "key 1: expected search:KEY"),
        (f"search:{SEARCH}\nmonitor:{SEARCH}", "key 2: stands there twice"),
        (f"search:{SEARCH}é", "key 1: a header can hold ASCII characters only"),
    ],
)
def test_bad_keys_are_refused_and_not_repeated_in_the_message(text, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        load_keys(None, {"BIXSE_KEYS": text})
    assert SEARCH not in str(caught.value)


def test_space_around_a_key_is_no_part_of_it():
    """No header could bring it: the key was known to nobody."""
    keys = load_keys(None, {"BIXSE_KEYS": f"search: {SEARCH} , monitor :{MONITOR}"})
    assert (keys.role_of(SEARCH), keys.role_of(MONITOR)) == ("search", "monitor")


def test_an_unreadable_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="absent"):
        load_keys(str(tmp_path / "absent"), {})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary"):
        load_keys(str(tmp_path / "binary"), {})


def test_keys_stand_in_no_representation_and_no_log(caplog):
    with caplog.at_level(logging.DEBUG):
        assert SEARCH not in repr(KEYS) + str(KEYS)
        KEYS.role_of(SEARCH)
    assert SEARCH not in caplog.text


def test_without_keys_only_loopback_is_bound():
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        assert is_loopback(host)
        check_binding(host, Keys())
    for host in ("0.0.0.0", "::", "10.1.2.3", "example.org", ""):
        check_binding(host, KEYS)
        with pytest.raises(ValueError, match="no keys are configured"):
            check_binding(host, Keys())


@pytest.mark.parametrize(
    "client, host, passes",
    [
        ("127.0.0.1", "127.0.0.1:8000", True),
        ("127.0.0.1", "localhost", True),
        ("::1", "[::1]:8000", True),
        ("10.1.2.3", "127.0.0.1:8000", False),
        ("127.0.0.1", "rebound.example.org:8000", False),
        ("127.0.0.1", "localhost.example.org", False),
        ("127.0.0.1", "", False),
        ("127.0.0.1", "[::1", False),
        ("127.0.0.1", "[x]", False),
        (None, "127.0.0.1", False),
    ],
)
def test_without_keys_only_this_machine_may_ask(client, host, passes):
    for path in ("/", "/livez", "/search", "/metrics"):
        if passes:
            authorize(path, {"host": host}, client, Keys())
        else:
            with pytest.raises(ApiError) as caught:
                authorize(path, {"host": host}, client, Keys())
            assert caught.value.status == 403


@pytest.mark.parametrize(
    "header", ["", SEARCH, f"Basic {SEARCH}", "Bearer", "Bearer ", f"Bearer {SEARCH} x"]
)
def test_a_header_that_is_not_a_bearer_key_is_401(header):
    with pytest.raises(ApiError) as caught:
        authorize("/search", {"authorization": header}, "10.1.2.3", KEYS)
    assert caught.value.status == 401
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}
    assert SEARCH not in caught.value.message


class Slow:
    """An application that answers with the size of the body, once its gate opens."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.inside += 1
        body = (await receive())["body"]
        await self.gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(len(body)).encode()})


def through(app: Slow, **limits: Any) -> httpx.AsyncClient:
    places = Places(limits.pop("max_in_flight", 2))
    door = Door(app, keys=Keys(), places=places, **{"max_body_bytes": 10, **limits})
    return httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://127.0.0.1")


def test_one_more_than_may_be_in_flight_is_429_and_probes_still_pass():
    async def run() -> None:
        app = Slow()
        async with through(app) as client:
            two = [asyncio.create_task(client.post("/search", content=b"x")) for _ in range(2)]
            while app.inside < 2:
                await asyncio.sleep(0.01)
            third = await client.post("/search", content=b"x")
            assert third.status_code == 429
            assert third.headers["retry-after"] == "1"
            assert third.json()["error"]["type"] == "overloaded"
            probe = asyncio.create_task(client.get("/livez"))
            app.gate.set()
            assert [(await t).status_code for t in (*two, probe)] == [200, 200, 200]
            assert (await client.post("/search", content=b"x")).status_code == 200

    asyncio.run(run())


def test_a_closed_door_lets_those_inside_finish_and_nobody_else_in():
    async def run() -> None:
        app, places, told = Slow(), Places(2), []
        door = Door(app, keys=Keys(), places=places, max_body_bytes=10, shed=told.append)
        transport = httpx.ASGITransport(door)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            inside = asyncio.create_task(client.post("/search", content=b"x"))
            while app.inside < 1:
                await asyncio.sleep(0.01)
            places.close()
            late = await client.post("/search", content=b"x")
            assert (late.status_code, late.json()["error"]["type"]) == (503, "draining")
            assert late.headers["retry-after"] == "1"
            assert late.headers["connection"] == "close"
            assert (places.taken, told) == (1, ["draining"])
            app.gate.set()
            assert (await inside).status_code == 200
            assert places.taken == 0
            assert (await client.get("/livez")).status_code == 200

    asyncio.run(run())


def test_a_key_has_a_burst_and_then_its_rate():
    now = [100.0]
    rate = Rate(2.0, burst=3, clock=lambda: now[0])
    assert [rate.take("a") for _ in range(3)] == [0, 0, 0]
    assert rate.take("a") == pytest.approx(0.5)
    assert rate.take("b") == 0, "another key has its own"
    now[0] += 0.25
    assert rate.take("a") == pytest.approx(0.25)
    now[0] += 0.25
    assert rate.take("a") == 0
    now[0] += 1000
    assert [rate.take("a") for _ in range(4)].count(0) == 3, "never more than the burst"


def test_a_key_over_its_rate_is_429_and_told_how_long_to_wait():
    async def run() -> None:
        app = Slow()
        app.gate.set()
        rate = Rate(0.1, burst=2)
        shed: list[str] = []
        door = Door(app, keys=KEYS, places=Places(9), max_body_bytes=9, rate=rate, shed=shed.append)
        headers = {"Authorization": f"Bearer {SEARCH}"}
        transport = httpx.ASGITransport(door)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            codes = [
                (await client.post("/search", content=b"x", headers=headers)).status_code
                for _ in range(3)
            ]
            assert codes == [200, 200, 429]
            last = await client.post("/search", content=b"x", headers=headers)
            assert last.json()["error"]["type"] == "rate_limited"
            assert 9 <= int(last.headers["retry-after"]) <= 10
            assert shed == ["rate", "rate"]
            assert (await client.get("/metrics", headers=headers)).status_code == 200

    asyncio.run(run())


def test_without_keys_the_rate_is_one_whatever_is_offered():
    """Another header was another key: without a limit, and remembered for ever."""

    async def run() -> None:
        app = Slow()
        app.gate.set()
        door = Door(app, keys=Keys(), places=Places(9), max_body_bytes=9, rate=Rate(0.1, burst=2))
        transport = httpx.ASGITransport(door)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            offered = [{"Authorization": f"Bearer {n}"} for n in range(3)]
            asked = [await client.post("/search", content=b"x", headers=each) for each in offered]
        assert [reply.status_code for reply in asked] == [200, 200, 429]

    asyncio.run(run())


def test_a_search_key_administers_nothing_and_an_admin_key_everything():
    keys = load_keys(None, {"BIXSE_KEYS": f"search:{SEARCH},admin:admin-key-0123456789"})

    def ask(path: str, key: str | None) -> int:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        try:
            authorize(path, headers, "10.0.0.1", keys)
        except ApiError as error:
            return error.status
        return 200

    for path in ("/admin", "/admin/generation", "/admin/anything"):
        assert ask(path, None) == 401
        assert ask(path, SEARCH) == 403
        assert ask(path, "admin-key-0123456789") == 200
    assert ask("/search", "admin-key-0123456789") == 200
    with pytest.raises(ApiError, match="needs one"):
        authorize("/admin/generation", {"host": "127.0.0.1"}, "127.0.0.1", Keys())


def test_a_body_over_the_bound_is_413_whether_declared_or_streamed():
    async def run() -> None:
        app = Slow()
        app.gate.set()

        async def stream(size: int):
            for _ in range(size):
                yield b"x"

        async with through(app) as client:
            for content in (b"x" * 11, stream(11)):
                reply = await client.post("/search", content=content)
                assert reply.status_code == 413
                assert "10 bytes" in reply.json()["error"]["message"]
            assert app.inside == 0, "refused before the application saw it"
            assert (await client.post("/admin/generation", content=b"x" * 11)).status_code == 403
            for content in (b"x" * 10, stream(10)):
                reply = await client.post("/search", content=content)
                assert (reply.status_code, reply.text) == (200, "10")

    asyncio.run(run())


def test_a_body_that_does_not_come_is_408_and_frees_its_place(monkeypatch):
    monkeypatch.setattr("serve.access.BODY_WITHIN_S", 0.05)

    async def run() -> None:
        app = Slow()
        app.gate.set()

        async def stalled():
            yield b"x"
            await asyncio.sleep(5)

        async with through(app, max_in_flight=1) as client:
            assert (await client.post("/search", content=stalled())).status_code == 408
            assert (await client.post("/search", content=b"x")).status_code == 200

    asyncio.run(run())
