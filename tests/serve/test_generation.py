"""Changing what is served: the decisions alone, then a running application under load."""

import asyncio
import shutil
import threading
from dataclasses import replace

import httpx
import numpy as np
import pytest

from bixse.artifacts import begin
from bixse.models.encoder import Encoder, resolve
from bixse.models.settings import PACKAGED
from bixse.records import Document, document_text
from serve.generation import (
    Generations,
    Report,
    failure,
    ndcg_problem,
    not_loaded,
    not_turned,
    recall_problem,
    to_keep,
    undrained,
)
from serve.ledger import Ledger
from serve.settings import Canary, ServedIndex

QUESTION = "which animal sleeps in winter by the coast"


def index_named(name: str, recall: float | None = 1.0) -> ServedIndex:
    return ServedIndex(
        name, name, "e", 3, {"shard-00000": 1}, Canary(query="", doc_id="", score=0), recall
    )


def report(slot: str, *holds: int, current: int | None = None, in_use=()) -> Report:
    return Report(slot, slot, 1, frozenset(holds), {}, current, frozenset(in_use))


FIRST = Generations.first(index_named("a"), "start")


def test_numbers_are_never_given_twice_and_rollback_restores_the_old_one():
    second = FIRST.propose(index_named("b"), "start")
    assert (second.current.number, second.candidate.number) == (1, 2)
    given_up = second.abandon(2)
    assert given_up.candidate is None
    third = given_up.propose(index_named("c"), "other")
    turned = third.promote(3)
    assert (turned.current.number, turned.previous.number) == (3, 1)
    assert turned.candidate is None
    back = turned.roll_back()
    assert back.current == FIRST.current
    assert back.roll_back().current.number == 3
    versions = [g.version for g in (FIRST, second, given_up, third, turned, back)]
    assert versions == sorted(set(versions))


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="no previous generation"):
        FIRST.roll_back()
    second = FIRST.propose(index_named("b"), "start")
    with pytest.raises(ValueError, match="no longer the candidate"):
        second.promote(7)
    assert second.abandon(7) is second


def test_a_change_waits_for_each_replica_of_each_slot():
    slots = ("front", "encoder", "shard-00000")
    some = [report("front", 1, 2), report("encoder", 1)]
    assert not_loaded(2, some, slots) == ["encoder", "shard-00000"]
    late = Report("encoder-2", "encoder", 1, frozenset({1}))
    every = [report("front", 2), report("encoder", 2), late, report("shard-00000", 2)]
    assert not_loaded(2, every, slots) == ["encoder"]
    assert not_loaded(2, [r for r in every if r is not late], slots) == []
    assert failure(2, [*every, Report("x", "encoder", 1, frozenset(), {2: "why"})]) == "why"
    assert failure(1, every) is None


def test_a_generation_is_kept_while_a_request_may_ask_for_it():
    fronts = [report("front", 1, 3, current=3, in_use={1}), report("encoder", 1, 2, 3)]
    now = FIRST.propose(index_named("b"), "s").promote(2).propose(index_named("c"), "s").promote(3)
    assert to_keep(now, fronts) == {1, 2, 3}
    assert to_keep(now, [report("front", 3, current=3)]) == {2, 3}
    assert not_turned(3, [*fronts, report("late", 3, current=2)]) == ["late"]


def test_gates():
    assert recall_problem(index_named("a", 0.95), 0.9) is None
    assert "below 0.9000" in recall_problem(index_named("a", 0.85), 0.9)
    assert "does not say" in recall_problem(index_named("a", None), 0.0)
    assert ndcg_problem(0.50, 0.49, 0.02) is None
    assert "from 0.5000 to 0.4700" in ndcg_problem(0.50, 0.47, 0.02)


def test_a_new_ledger_is_told_by_its_followers_what_held():
    async def run() -> None:
        ledger = Ledger(FIRST, ("front",))
        later = FIRST.propose(index_named("b"), "start").promote(2)
        told, keep = await ledger.sync(report("front", 2, current=2), later, 0.0)
        assert told == later
        assert keep == {1, 2}
        # One that knows less is told more, and changes nothing.
        told, _ = await ledger.sync(report("encoder", 1), FIRST, 0.0)
        assert told == later

    asyncio.run(run())


def test_draining_waits_for_every_replica_to_hear_of_it_and_to_finish():
    def front(version: int, in_flight: int) -> Report:
        return Report(
            f"f{version}{in_flight}", "front", version, frozenset({1}), {}, 1, in_flight=in_flight
        )

    reports = [front(1, 0), front(2, 3), front(2, 0), report("encoder", 1)]
    assert undrained(2, reports) == ["f10", "f23"]
    assert undrained(2, [front(2, 0), report("encoder", 1)]) == []


def test_a_ledger_drains_when_the_last_request_is_answered_or_time_is_over():
    async def run() -> None:
        ledger = Ledger(FIRST, ("front",))
        busy = report("front", 1, current=1)
        await ledger.sync(busy, FIRST, 0.0)
        assert not await ledger.drain(0.1), "the replica has not even heard of it"
        told, _ = await ledger.sync(busy, FIRST, 0.0)
        assert told.draining
        assert told.current == FIRST.current
        draining = asyncio.create_task(ledger.drain(30))
        await asyncio.sleep(0)
        heard = (await ledger.state()).generations.version
        for in_flight in (2, 1):
            await ledger.sync(replace(busy, version=heard, in_flight=in_flight), told, 0.0)
            await asyncio.sleep(0.05)
            assert not draining.done()
        await ledger.sync(replace(busy, version=heard), told, 0.0)
        assert await draining

    asyncio.run(run())


# ---- the running application


@pytest.fixture(scope="module")
def other_encoder(tmp_path_factory):
    """The packaged encoder with its weights shaken: other vectors, another fingerprint."""
    from safetensors.numpy import load_file, save_file

    url = tmp_path_factory.mktemp("other") / "encoder"
    shutil.copytree(resolve(PACKAGED), url)
    weights = load_file(url / "model.safetensors")
    draw = np.random.default_rng(0)
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            noise = draw.standard_normal(tensor.shape).astype(np.float32)
            weights[name] = tensor + 0.2 * tensor.std() * noise
    save_file(weights, url / "model.safetensors", metadata={"format": "pt"})
    return str(url)


@pytest.fixture(scope="module")
def other_index(tmp_path_factory, corpus, other_encoder, make_index):
    """Half of the documents, other ids, the other encoder, three shards for two slots."""
    encoder = Encoder.load(other_encoder)
    documents = [Document(f"b-{d.doc_id}", d.title, d.text) for d in corpus[:90]]
    vectors = encoder.encode([document_text(d.title, d.text) for d in documents], "document")
    url = tmp_path_factory.mktemp("other") / "index"
    return make_index(url, documents, vectors, encoder.fingerprint, shards=3)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory, corpus):
    """Each question's answer is the document that it was made from."""
    from bixse.records import JUDGMENTS, QUERIES

    place = tmp_path_factory.mktemp("heldout")
    rows = {"queries": [], "judgments": []}
    for number, document in enumerate(corpus[:20]):
        rows["queries"].append({"query_id": str(number), "text": document.text, "origin": "given"})
        rows["judgments"].append(
            {
                "query_id": str(number),
                "doc_id": document.doc_id,
                "grade_probs": [0.0, 1.0],
                "relevance": 1.0,
                "judge": "human",
                "prompt": "",
                "origin": "human",
            }
        )
    import pyarrow as pa

    for kind, schema in (("queries", QUERIES), ("judgments", JUDGMENTS)):
        draft = begin(str(place / kind), kind, config={}, inputs={})
        draft.write_part(0, pa.Table.from_pylist(rows[kind], schema=schema))
        draft.finish(rows=20)
    return {f"gate-{kind}": place / kind for kind in rows}


@pytest.fixture(scope="module", params=["shard", pytest.param("replicate", marks=pytest.mark.slow)])
def changing(request, tmp_path_factory, run_app, index, corpus):
    flags = {"replicas": 2} if request.param == "replicate" else {}
    place = tmp_path_factory.mktemp(request.param)
    with run_app(place, index, corpus, topology=request.param, **flags) as served:
        yield served


def answer_of(served) -> dict:
    reply = served.search(query=QUESTION, k=5)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    return {
        "hits": [(h["doc_id"], round(h["score"], 4)) for h in body["hits"]],
        "fingerprint": body["index"]["fingerprint"],
        "encoder": body["encoder"],
    }


def refused(reply: httpx.Response, because: str, param_free: int = 422) -> None:
    assert reply.status_code == param_free, reply.text
    error = reply.json()["error"]
    assert error["type"] == "refused"
    assert because in error["message"], error["message"]


def test_whatever_does_not_do_is_refused_and_the_old_keeps_serving(
    changing, index, other_index, corpus, vectors, encoder, make_index, tmp_path
):
    before = answer_of(changing)
    refused(changing.change(index=str(tmp_path / "absent")), "no finished artefact")
    # The packaged encoder did not make that index.
    refused(changing.change(index=other_index.url), other_index.manifest.extra["encoder"])
    poor = make_index(tmp_path / "poor", corpus, vectors, encoder.fingerprint, 2, recall=0.5)
    refused(changing.change(index=poor.url), "recall@10 0.5000, below 0.9000")
    odd = make_index(tmp_path / "odd", corpus, -vectors, encoder.fingerprint, 2)
    refused(changing.change(index=odd.url), "canary")
    for name, position in (
        ("shard-00000/index.faiss", -1),
        ("shard-00001/documents.arrow", 700),
        ("manifest.json", 40),
    ):
        url = tmp_path / f"damaged-{name.replace('/', '-')}"
        shutil.copytree(index.url, url)
        data = bytearray((url / name).read_bytes())
        data[position] ^= 1
        (url / name).write_bytes(data)
        refused(changing.change(index=str(url)), name)
    refused(changing.change(rollback=True), "no previous generation")
    assert answer_of(changing) == before
    assert changing.search(query="x").json()["index"]["generation"] == 1
    reply = changing.client.get("/admin/generation")
    assert reply.status_code == 403, "a search key changes nothing"
    assert changing.change(index=index.url, rollback=True).status_code == 422


def test_twenty_swaps_under_fire(changing, index, other_index, other_encoder):
    """Zero errors, and every answer is of exactly one generation, encoder and index together."""
    known = {index.fingerprint: answer_of(changing)}
    seen: list[tuple[int, dict]] = []
    failed: list[str] = []
    stop = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=changing.url, headers=changing.client.headers) as client:
            while not stop.is_set():
                request = {"query": QUESTION, "k": 5}
                reply = client.post("/search", json=request, timeout=60)
                if reply.status_code != 200:
                    failed.append(f"{reply.status_code} {reply.text}")
                    continue
                body = reply.json()
                hits = [(h["doc_id"], round(h["score"], 4)) for h in body["hits"]]
                found = {"hits": hits, "fingerprint": body["index"]["fingerprint"]}
                seen.append((body["index"]["generation"], {**found, "encoder": body["encoder"]}))
                if body["coverage"]["fraction"] != 1.0:
                    failed.append(f"coverage {body['coverage']}")

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for swap in range(20):
            there = (other_index.url, other_encoder) if swap % 2 == 0 else (index.url, PACKAGED)
            reply = changing.change(index=there[0], encoder=there[1])
            assert reply.status_code == 200, reply.text
            now = answer_of(changing)
            assert now["fingerprint"] == reply.json()["current"]["fingerprint"], "at once"
            known.setdefault(now["fingerprint"], now)
            assert now == known[now["fingerprint"]]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failed == []
    assert set(known) == {index.fingerprint, other_index.fingerprint}
    assert {d.startswith("b-") for d, _ in known[other_index.fingerprint]["hits"]} == {True}
    for _, answer in seen:
        assert answer == known[answer["fingerprint"]]
    # Each number stands for one index, from first to last.
    by_number = {number: {a["fingerprint"] for n, a in seen if n == number} for number, _ in seen}
    assert all(len(fingerprints) == 1 for fingerprints in by_number.values())
    assert len(by_number) > 10


def test_rolling_back_and_forth(changing, wait_until):
    def generation() -> int:
        return changing.search(query=QUESTION).json()["index"]["generation"]

    now = generation()
    reply = changing.change(rollback=True)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert body["previous"]["generation"] == now
    assert generation() == body["current"]["generation"] == now - 1
    assert changing.change(rollback=True).json()["current"]["generation"] == now
    assert generation() == now
    wait_until(lambda: changing.client.get("/readyz").status_code == 200, 30)
    assert changing.client.get("/readyz").json()["generation"] == now


def test_the_modes_are_those_of_the_generation_served(changing, index, other_index, other_encoder):
    assert changing.change(index=other_index.url, encoder=other_encoder).status_code == 200
    assert changing.search(query=QUESTION).json()["index"]["modes"] == ["dense"]
    for mode in ("lexical", "hybrid"):
        error = changing.search(query=QUESTION, mode=mode)
        assert error.status_code == 422
        assert error.json()["error"]["param"] == "mode"
        assert "--retrieval.bm25" in error.json()["error"]["message"]
    assert changing.change(index=index.url, encoder=PACKAGED).status_code == 200
    hits = changing.search(query=QUESTION, mode="hybrid").json()["hits"]
    assert {"dense", "lexical"} <= set(hits[0])


@pytest.mark.slow
def test_a_killed_replica_comes_back_on_the_generation_that_is_served(changing, wait_until):
    expected = answer_of(changing)
    for name in ("Ledger", "shard-00001", "QueryEncoder", "Gateway", "Replica"):
        for process in changing.replicas(name)[:1]:
            process.kill()

    def whole() -> bool:
        request = {"query": QUESTION, "k": 5, "allow_partial": False}
        try:
            reply = changing.client.post("/search", json=request, timeout=5)
        except httpx.TimeoutException:
            return False
        return reply.status_code == 200 and answer_of(changing) == expected

    wait_until(whole, 180)
    for _ in range(5):
        assert whole(), "and it stays"
    wait_until(lambda: changing.change(rollback=True).status_code == 200, 60)


@pytest.mark.slow
def test_a_generation_that_ranks_worse_is_refused(
    run_app, tmp_path, index, other_index, other_encoder, corpus, heldout
):
    """The other index has none of the judged documents: nDCG@10 would be 0."""
    with run_app(tmp_path, index, corpus, topology="replicate", **heldout) as served:
        before = answer_of(served)
        reply = served.change(index=other_index.url, encoder=other_encoder)
        refused(reply, "nDCG@10 would fall from 1.0000 to 0.0000")
        assert answer_of(served) == before
        assert served.change(index=index.url).status_code == 200
