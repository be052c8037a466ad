"""The front without Ray: what it measures through a change of generation."""

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from bixse.records import Document
from serve.access import Keys, Places
from serve.api import application
from serve.gateway import Front, _Ingress
from serve.generation import Generation, Generations
from serve.ledger import Ledger, Outcome
from serve.messages import EncodedBatch, FoundInSlot, NotHeld
from serve.metrics import Metrics
from serve.settings import Canary, ServeArgs, ServedIndex, ServedReranker

INDEX = ServedIndex("i", "i", "e", 2, {"s": 1}, Canary(query="q", doc_id="d", score=1.0), 1.0)
RERANKER = ServedReranker("r", "r")
ARGS = ServeArgs(index="i", encoder="e")


class Backend:
    """Encodes once it may, and always finds the canary's document."""

    encoder_calls = shard_calls = 1

    def __init__(self) -> None:
        self.may_encode = asyncio.Event()

    def slots(self, generation: Generation) -> dict[str, list[str]]:
        return {"s": ["s"]}

    async def encode(self, generation: Any, role: Any, texts: list[str], deadline: float) -> Any:
        await self.may_encode.wait()
        return EncodedBatch(np.ones((len(texts), 2), np.float32), [1] * len(texts))

    async def search(
        self, generation: Any, slot: str, vectors: Any, wanted: list[Any], deadline: float
    ) -> list[FoundInSlot]:
        return [FoundInSlot(["d"], [1.0]) for _ in wanted]


class Handle:
    """A ledger that accepts all, and a reranker that scores all alike."""

    def __init__(self, method: str = "", held: list[Generations] | None = None) -> None:
        self.method = method
        self.held = held or [Generations.first(INDEX, "e", RERANKER)]

    def __getattr__(self, method: str) -> "Handle":
        return Handle(method, self.held)

    async def remote(self, *ask: Any) -> Any:
        now = self.held[-1]
        if self.method == "score":
            return [0.0] * len(ask[1])
        self.held.append(
            now.propose(INDEX, "e", RERANKER) if self.method == "prepare" else now.promote(ask[0])
        )
        return Outcome(self.held[-1])


def front_of(backend: Any, metrics: Metrics, ledger: Any = None, args: ServeArgs = ARGS) -> Front:
    """A front between these stand-ins and a reranker that scores all alike."""
    reranker: Any = Handle("score")
    ledger = ledger or Handle()
    return Front(args, ledger, backend, metrics, reranker)


def test_the_depth_of_a_queue_is_measured_after_a_change_too():
    """The lane of the gate, made last and thrown away, was what the gauges showed from then on."""

    async def run() -> None:
        metrics, backend = Metrics(), Backend()
        front = front_of(backend, metrics, args=ServeArgs(index="i", encoder="e", batch_size=1))

        def depth(stage: str) -> float | None:
            return metrics.registry.get_sample_value("bixse_queue_depth", {"stage": stage})

        def queue(texts: int) -> list[asyncio.Task[Any]]:
            until = asyncio.get_running_loop().time() + 30
            with front.pinned() as lane:
                return [
                    asyncio.create_task(lane.embed([str(n)], "query", until)) for n in range(texts)
                ]

        first = Generation(1, INDEX, "e", RERANKER)
        await front.load(first)
        front.turn(first)
        before = queue(5)
        await asyncio.sleep(0.01)
        assert depth("encode_query") == 4, "one of them is in the encoder"
        second = Generation(2, INDEX, "e", RERANKER)
        await front.load(second)
        backend.may_encode.set()
        assert (await front.change("i", None, None)).problem is None
        front.turn(second)
        await asyncio.gather(*before)
        backend.may_encode.clear()
        after = queue(9)
        await asyncio.sleep(0.01)
        assert depth("encode_query") == 8
        assert depth("encode_document") == depth("s") == depth("rerank") == 0
        front.drop(1)
        assert depth("encode_query") == 8
        backend.may_encode.set()
        await asyncio.gather(*after)
        assert depth("encode_query") == 0

    asyncio.run(run())


def test_an_index_that_is_served_is_no_reason_to_refuse_a_reranker():
    """It was started with less recall than a new index must have, and no reranker came to it."""
    poor, second = replace(INDEX, recall=0.5), ServedReranker("s", "s")
    backend = Backend()
    backend.may_encode.set()

    async def gated(candidate: Generation) -> str | None:
        front = front_of(backend, Metrics())
        first = Generation(1, poor, "e", RERANKER)
        await front.load(first)
        front.turn(first)
        return await front._gate(candidate)

    assert asyncio.run(gated(Generation(2, poor, "e", second))) is None
    other = replace(poor, url="j", fingerprint="j")
    refused = asyncio.run(gated(Generation(2, other, "e", second)))
    assert refused is not None
    assert "recall@10 0.5000, below 0.9000" in refused


def test_a_front_says_that_it_changes_until_the_change_is_settled():
    said: list[tuple[str, bool]] = []

    async def run() -> None:
        backend = Backend()
        backend.may_encode.set()

        class Asked(Handle):
            def __getattr__(self, method: str) -> "Asked":
                return Asked(method, self.held)

            async def remote(self, *ask: Any) -> Any:
                said.append((self.method, front.changing()))
                return await super().remote(*ask)

        front = front_of(backend, Metrics(), Asked())
        first = Generation(1, INDEX, "e", RERANKER)
        await front.load(first)
        front.turn(first)
        assert (await front.change("i", None, None)).problem is None
        assert not front.changing()

    asyncio.run(run())
    assert said == [("prepare", True), ("settle", True)]


@pytest.mark.parametrize(
    "topology, replicas, named",
    [("replicate", 2, True), ("replicate", 1, False), ("shard", 2, False)],
)
def test_a_replica_beside_others_is_named_where_it_counts(topology, replicas, named):
    """`/metrics` is answered by any of them: of 40 requests it said 19 or 21."""

    class Synced(Handle):
        def __getattr__(self, method: str) -> "Synced":
            return self

        async def remote(self, *ask: Any) -> Any:
            return await Ledger(Generations.first(INDEX, "e"), ()).sync(*ask)

    async def metrics() -> str:
        flags = {"topology": topology, "replicas": replicas}
        ingress = _Ingress()
        args = ServeArgs.model_validate({"index": "i", "encoder": "e", **flags})
        ledger: Any = Synced()
        backend: Any = Backend()
        await ingress._start(args, ledger, backend, None)
        return ingress._metrics.render().decode()

    said = {line for line in asyncio.run(metrics()).splitlines() if "index_generation" in line}
    assert any('{replica="' in line for line in said) == named
    assert ("bixse_index_generation 1.0" in said) != named


def test_what_answers_have_seen_is_counted_of_answers_alone():
    """Each probe of `/readyz` and each query of a gate was one more."""

    class Losing(Backend):
        lost = False

        async def search(self, *ask: Any) -> list[FoundInSlot]:
            if self.lost:
                raise NotHeld("it is being replaced")
            return await super().search(*ask)

    async def run() -> None:
        metrics, backend = Metrics(), Losing()
        backend.may_encode.set()
        front = front_of(backend, metrics)
        first = Generation(1, INDEX, "e", RERANKER)
        await front.load(first)
        front.turn(first)
        app = application(front, ARGS, Keys(), metrics, Places(8), None)

        def counted() -> tuple[float | None, float | None]:
            sample = metrics.registry.get_sample_value
            lost = {"shard": "s", "reason": "lost"}
            return sample("bixse_coverage_ratio_count"), sample("bixse_shard_missing_total", lost)

        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            assert (await client.get("/readyz")).status_code == 200
            assert await front._gate(Generation(2, INDEX, "e", RERANKER)) is None
            assert counted() == (0, None)
            bare = {"query": "q", "include_text": False}
            assert (await client.post("/search", json=bare)).status_code == 200
            assert counted() == (1, None)
            backend.lost = True
            assert (await client.post("/search", json=bare)).status_code == 503
            assert (await client.post("/retrieve", json={"queries": ["q"]})).status_code == 503
            assert await front._gate(Generation(3, INDEX, "e", RERANKER)) is not None
            assert counted() == (3, 2)

    asyncio.run(run())


def test_a_shard_that_hangs_leaves_the_reranker_its_time():
    """Both were late: the shard by itself, the reranker since it was never asked."""

    class Hanging(Backend):
        def slots(self, generation: Generation) -> dict[str, list[str]]:
            return {"s": ["s"], "hangs": ["hangs"]}

        async def search(
            self, generation: Any, slot: str, vectors: Any, wanted: list[Any], deadline: float
        ) -> list[FoundInSlot]:
            if slot == "hangs":
                async with asyncio.timeout_at(deadline):
                    await asyncio.Event().wait()
            found = FoundInSlot(["d"], [1.0], documents=[Document("d", "", "text")])
            return [found for _ in wanted]

    async def run() -> dict[str, Any]:
        metrics, backend = Metrics(), Hanging()
        backend.may_encode.set()
        front = front_of(backend, metrics)
        index = replace(INDEX, shard_rows={"s": 1, "hangs": 1})
        first = Generation(1, index, "e", RERANKER)
        await front.load(first)
        front.turn(first)
        app = application(front, ARGS, Keys(), metrics, Places(8), None)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            asked = {"query": "q", "k": 1, "rerank": 1, "timeout_ms": 1000}
            reply = await client.post("/search", json=asked)
        assert reply.status_code == 200, reply.text
        body: dict[str, Any] = reply.json()
        return body

    body = asyncio.run(run())
    assert body["reranker"] == "r"
    assert body["coverage"]["degraded"] == [{"shard": "hangs", "reason": "late"}]
