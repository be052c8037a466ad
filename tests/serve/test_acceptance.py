"""What a production endpoint must withstand: kills, overload, and whatever a schema allows.

One application with its own encoder and shard replicas. Zero wrong answers throughout: an answer of
full coverage is the exact one, one of partial coverage is part of it, and everything else is a
refusal with its reason.
"""

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

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

QUESTIONS = ("which animal sleeps in winter by the coast", "Where does the raven feed?", "x")
K = 20
REFUSALS = {429, 503, 504}


@pytest.fixture(scope="module")
def tried(tmp_path_factory, run_app, index, corpus):
    place = tmp_path_factory.mktemp("tried")
    with run_app(place, index, corpus, **{"max-in-flight": 4, "max-k": 200}) as served:
        yield served


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
    """Load while a random replica dies every five seconds; gives the statuses seen."""
    halves = [{d.doc_id for d in corpus[n::2]} for n in (0, 1)]
    draw, stop = random.Random(7), threading.Event()
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
            alive = served.replicas()
            if alive:
                with suppress(psutil.NoSuchProcess):
                    draw.choice(alive).kill()
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


def test_five_times_the_load_is_shed_in_our_words_and_then_all_is_normal(tried, wait_until):
    seen: list[httpx.Response] = []
    stop = time.monotonic() + 5

    def load(_: int) -> None:
        with httpx.Client(base_url=tried.url, headers=tried.client.headers) as client:
            while time.monotonic() < stop:
                seen.append(client.post("/search", json={"query": "otter"}, timeout=60))

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(load, range(20)))
    statuses = Counter(reply.status_code for reply in seen)
    assert set(statuses) == {200, 429}
    for reply in seen:
        if reply.status_code == 429:
            assert reply.json()["error"]["type"] == "overloaded"
            assert reply.headers["retry-after"] == "1"
    wait_until(lambda: tried.search(query="otter").status_code == 200, 30)


def test_whatever_the_openapi_document_allows_is_answered_as_it_says(tried):
    headers = {"Authorization": f"Bearer {tried.admin_key}"}
    schema = schemathesis.openapi.from_url(f"{tried.url}/openapi.json", headers=headers)
    checks = (
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    )
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
    assert tried.client.get("/readyz").status_code == 200


def test_a_replica_dies_every_five_seconds_for_a_minute(tried, corpus, whole, wait_until):
    statuses = crash(tried, corpus, whole, wait_until, 60)
    assert statuses[200] > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_replica_dies_every_five_seconds_for_ten_minutes(tried, corpus, whole, wait_until):
    statuses = crash(tried, corpus, whole, wait_until, 600)
    assert statuses[200] > 0
