"""What a production endpoint must withstand: kills, overload, whatever a schema allows, and changes
of what it serves.

Zero wrong answers throughout: an answer of full coverage is the exact one, one of partial coverage
is part of it, and everything else is a refusal with its reason.

The application is that of all tests of this directory, which come before these by their name: they
know it on its first generation.
"""

import itertools
import random
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from bixse.models.settings import PACKAGED

QUESTIONS = ("which animal sleeps in winter by the coast", "Where does the raven feed?", "x")
QUESTION = QUESTIONS[0]
K = 20
REFUSALS = {429, 503, 504}
DEPLOYMENTS = ("shard-00000", "QueryEncoder", "Ledger", "shard-00001", "Gateway")


@pytest.fixture(scope="module")
def whole(encoder, exact):
    """The exact ranking of all documents, by question."""
    found = exact(encoder.encode(QUESTIONS, "query"), 200)
    return {q: [h.doc_id for h in hits] for q, hits in zip(QUESTIONS, found, strict=True)}


def wrong(reply: httpx.Response, ranking: list[str], halves: list[set[str]]) -> str | None:
    """What is wrong with an answer, if anything is."""
    if reply.status_code in REFUSALS:
        error = reply.json()["error"]
        retry = reply.status_code == 504 or int(reply.headers["retry-after"]) >= 1
        return None if error["type"] and error["message"] and retry else f"refusal {reply.text}"
    if reply.status_code != 200:
        return f"{reply.status_code} {reply.text[:200]}"
    body = reply.json()
    found = [hit["doc_id"] for hit in body["hits"]]
    if body["coverage"]["fraction"] == 1.0:
        return None if found == ranking[:K] else f"full coverage, not the exact merge: {found}"
    parts = [[d for d in ranking if d in half][:K] for half in halves]
    return None if found in parts else f"partial coverage, not the merge of a shard: {found}"


def crash(served, corpus, whole, wait_until, seconds: float) -> Counter[int]:
    """Load while a deployment's replica dies every five seconds, in turn; the statuses seen."""
    halves = [{d.doc_id for d in corpus[n::2]} for n in (0, 1)]
    turn, stop = itertools.cycle(DEPLOYMENTS), threading.Event()
    statuses: Counter[int] = Counter()
    problems: list[str] = []

    def load(number: int) -> None:
        mine = random.Random(number)
        with httpx.Client(base_url=served.url, headers=served.client.headers) as client:
            while not stop.is_set():
                question = mine.choice(QUESTIONS)
                request = {"query": question, "k": K, "timeout_ms": 2000, "include_text": False}
                try:
                    reply = client.post("/search", json=request, timeout=120)
                except httpx.RemoteProtocolError as error:
                    problems.append(repr(error))
                    continue
                statuses[reply.status_code] += 1
                problem = wrong(reply, whole[question], halves)
                if problem is not None:
                    problems.append(problem)
                if reply.status_code != 200:
                    time.sleep(0.1)

    threads = [threading.Thread(target=load, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            for replica in served.replicas(next(turn)):
                with suppress(psutil.NoSuchProcess):
                    replica.kill()
            time.sleep(5)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert problems == []

    def recovered() -> bool:
        request = {"query": QUESTIONS[0], "k": K, "allow_partial": False}
        try:
            reply = served.client.post("/search", json=request, timeout=10)
        except httpx.TimeoutException:
            return False
        return reply.status_code == 200 and wrong(reply, whole[QUESTIONS[0]], halves) is None

    wait_until(recovered, 180)
    return statuses


def test_five_times_the_load_is_shed_in_our_words_and_then_all_is_normal(served, wait_until):
    seen: list[httpx.Response] = []

    def load(_: int) -> None:
        with httpx.Client(base_url=served.url, headers=served.client.headers) as client:
            for _ in range(5):
                seen.append(client.post("/search", json={"query": "otter"}, timeout=60))

    with ThreadPoolExecutor(30) as pool:
        list(pool.map(load, range(30)))
    statuses = Counter(reply.status_code for reply in seen)
    assert set(statuses) == {200, 429}
    for reply in seen:
        if reply.status_code == 429:
            assert reply.json()["error"]["type"] == "overloaded"
            assert reply.headers["retry-after"] == "1"
    wait_until(lambda: served.search(query="otter").status_code == 200, 30)


def no_bug(context: Any, response: Any, case: schemathesis.Case) -> bool | None:
    """A request may ask for its answer within a millisecond."""
    return None if response.status_code == 504 else not_a_server_error(context, response, case)


def test_whatever_the_openapi_document_allows_is_answered_as_it_says(served):
    headers = {"Authorization": f"Bearer {served.admin_key}"}
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json", headers=headers)
    checks = [
        no_bug,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    tested = []
    for found in schema.get_all_operations():
        operation = found.ok()
        quiet = list(HealthCheck)

        @settings(max_examples=25, deadline=None, suppress_health_check=quiet, database=None)
        @given(case=operation.as_strategy())
        def try_it(case: schemathesis.Case) -> None:
            case.call_and_validate(headers=headers, checks=checks, timeout=60)

        try_it()
        tested.append(operation.label)
    assert len(tested) >= 8
    assert served.client.get("/readyz").status_code == 200


def test_a_replica_dies_every_five_seconds_for_a_minute(served, corpus, whole, wait_until):
    statuses = crash(served, corpus, whole, wait_until, 60)
    assert statuses[200] > 0


@pytest.mark.slow
def test_a_replica_dies_every_five_seconds_for_ten_minutes(served, corpus, whole, wait_until):
    statuses = crash(served, corpus, whole, wait_until, 600)
    assert statuses[200] > 0


# ---- another index, encoder or both, in the running application


@pytest.fixture(scope="module")
def heldout(tmp_path_factory, corpus, make_heldout):
    """Each question's answer is the document that it was made from."""
    return make_heldout(tmp_path_factory.mktemp("heldout"), {d.doc_id: d.text for d in corpus[:20]})


@pytest.fixture(scope="module", params=["shard", pytest.param("replicate", marks=pytest.mark.slow)])
def changing(request, tmp_path_factory, run_app, index, corpus):
    if request.param == "shard":
        yield request.getfixturevalue("served")
        return
    place = tmp_path_factory.mktemp(request.param)
    with run_app(place, index, corpus, topology=request.param, replicas=2) as served:
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
