"""The running application over HTTP: answers, and the errors of single requests."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest

from bixse.models.encoder import resolve
from bixse.models.settings import PACKAGED

QUESTIONS = [
    "which animal sleeps in winter by the coast",
    "Where does the raven feed?",
    "nests in a city park",
    "水獭 🦦",
    "x",
]


def error_of(response: httpx.Response, status: int) -> dict:
    """The error of an envelope that holds nothing else."""
    assert response.status_code == status, response.text[:500]
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) <= {"type", "message", "param"}
    assert body["error"]["message"]
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
    return body["error"]


def post_json(served, body: object) -> httpx.Response:
    """POST /search with JSON that httpx itself would not write: NaN, half surrogate pairs."""
    headers = {"Content-Type": "application/json"}
    return served.client.post("/search", content=json.dumps(body), headers=headers)


def test_search_equals_exact_search_in_process(served, encoder, exact):
    expected = exact(encoder.encode(QUESTIONS, "query"), 25)
    reply = served.search(queries=QUESTIONS, k=25).json()
    texts = {d.doc_id: d for d in served.corpus}
    for hits, wanted in zip(reply["results"], expected, strict=True):
        assert [h["doc_id"] for h in hits] == [w.doc_id for w in wanted]
        assert [h["rank"] for h in hits] == list(range(1, 26))
        assert [h["score"] for h in hits] == pytest.approx([w.score for w in wanted], abs=1e-5)
        for hit in hits:
            assert (hit["title"], hit["text"]) == (
                texts[hit["doc_id"]].title,
                texts[hit["doc_id"]].text,
            )


def test_one_query_gives_hits_and_says_where_they_came_from(served):
    reply = served.search(query=QUESTIONS[0], include_text=False).json()
    assert set(reply) == {"hits", "coverage", "index", "encoder", "timing_ms"}
    assert len(reply["hits"]) == 10
    assert set(reply["hits"][0]) == {"doc_id", "score", "rank"}
    assert reply["coverage"] == {"fraction": 1.0, "shards_ok": 2, "shards": 2, "degraded": []}
    assert reply["index"] == {
        "generation": 1,
        "fingerprint": served.index.fingerprint,
        "modes": ["dense", "lexical", "hybrid"],
        "metadata": {"animal": "text", "number": "number", "seen": "boolean", "words": "texts"},
    }
    assert reply["encoder"] == served.index.manifest.extra["encoder"]
    timing = reply["timing_ms"]
    assert set(timing) == {"encode", "search", "merge", "total"}
    assert timing["encode"] + timing["search"] + timing["merge"] <= timing["total"] + 0.01


def test_concurrent_requests_each_get_their_own_answer(served):
    alone = {q: served.search(query=q, k=5).json()["hits"] for q in QUESTIONS}
    many = QUESTIONS * 8
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda q: served.search(query=q, k=5).json()["hits"], many))
    for question, hits in zip(many, replies, strict=True):
        assert [h["doc_id"] for h in hits] == [h["doc_id"] for h in alone[question]]


def test_served_vectors_are_those_of_sentence_transformers(served):
    from sentence_transformers import SentenceTransformer

    texts = [*QUESTIONS, served.corpus[3].text, "long " * 1000]
    expected = SentenceTransformer(str(resolve(PACKAGED))).encode(texts, normalize_embeddings=True)
    # Documents are read in bfloat16 where the machine multiplies that faster.
    for role, least in (("query", 0.9999), ("document", 0.9997)):
        request = {"input": texts, "model": "bixse", "input_type": role}
        reply = served.client.post("/v1/embeddings", json=request).json()
        vectors = np.array([d["embedding"] for d in reply["data"]])
        assert ((vectors * expected).sum(1) >= least).all()
        assert [d["index"] for d in reply["data"]] == list(range(len(texts)))
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)


def test_the_openai_client_works_unmodified(served, encoder):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.search_key, max_retries=0)
    expected = encoder.encode(QUESTIONS, "query")
    # The client asks for base64 unless told otherwise, and decodes it.
    reply = client.embeddings.create(model="bixse", input=QUESTIONS)
    assert np.array([d.embedding for d in reply.data]) == pytest.approx(expected, abs=1e-5)
    plain = client.embeddings.create(model="bixse", input=QUESTIONS[0], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(expected[0].tolist(), abs=1e-5)
    # [CLS] x [SEP]
    assert client.embeddings.create(model="bixse", input="x").usage.prompt_tokens == 3
    with pytest.raises(openai.NotFoundError, match="text-embedding-3-small"):
        client.embeddings.create(model="text-embedding-3-small", input="x")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="not-a-key-at-all").embeddings.create(model="bixse", input="x")


def test_base64_is_little_endian_float32(served, encoder):
    request = {"input": "x", "model": encoder.fingerprint, "encoding_format": "base64"}
    data = served.client.post("/v1/embeddings", json=request).json()["data"]
    vector = np.frombuffer(base64.b64decode(data[0]["embedding"]), "<f4")
    assert vector == pytest.approx(encoder.encode(["x"], "query")[0], abs=1e-5)


def test_retrieve_speaks_search_r1(served):
    request = {"queries": QUESTIONS[:2], "topk": 3}
    scored = served.client.post("/retrieve", json={**request, "return_scores": True}).json()
    plain = served.client.post("/retrieve", json=request).json()
    hits = served.search(queries=QUESTIONS[:2], k=3).json()["results"]
    for with_scores, without, wanted in zip(scored["result"], plain["result"], hits, strict=True):
        assert [r["document"]["id"] for r in with_scores] == [h["doc_id"] for h in wanted]
        assert [r["document"] for r in with_scores] == without
        assert without[0]["contents"] == f"{wanted[0]['title']}\n{wanted[0]['text']}"
    # More than there is: what there is, and no -1.
    reply = served.client.post("/retrieve", json={"queries": ["x"], "topk": 50}).json()
    assert len({d["id"] for d in reply["result"][0]}) == 50


def test_probes(served):
    assert served.client.get("/livez").json() == {"status": "live"}
    ready = served.client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json() == {
        "status": "ready",
        "index": served.index.fingerprint,
        "generation": 1,
    }


def test_metrics_count_what_was_asked(served):
    def value(name: str) -> float:
        lines = served.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    ok = 'bixse_request_total{code="200",route="/search"}'
    before, encoded = value(ok), value("bixse_encode_seconds_count")
    served.search(query="x")
    served.client.post("/search", json={"query": ""})
    assert value(ok) == before + 1
    assert value("bixse_encode_seconds_count") == encoded + 1
    assert value('bixse_request_total{code="422",route="/search"}') >= 1
    assert value('bixse_shard_seconds_count{shard="shard-00001"}') >= 1
    assert value("bixse_index_generation") == 1
    text = served.client.get("/metrics").text
    for name in ("request_seconds", "queue_depth", "batch_size", "shed_total", "coverage_ratio"):
        assert f"bixse_{name}" in text
    served.client.get("/a-path-that-makes-no-label")
    assert "a-path" not in served.client.get("/metrics").text


@pytest.mark.parametrize("route", ["/search", "/v1/embeddings", "/retrieve"])
@pytest.mark.parametrize("body", ["", "{", '{"query": "x"', "[" * 50_000, "nonsense", "\x00"])
def test_a_body_that_is_not_json_is_400(served, route, body):
    headers = {"Content-Type": "application/json"}
    reply = served.client.post(route, content=body, headers=headers)
    # No body at all reads as a missing object.
    assert error_of(reply, 422 if body == "" else 400)["type"] in ("bad_json", "invalid_request")


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, None),
        ([], None),
        ({"query": "x", "queries": ["x"]}, None),
        ({"query": ""}, "query"),
        ({"query": " \t\n "}, "query"),
        ({"query": "nul \0 byte"}, "query"),
        ({"query": "half a pair \ud800"}, "query"),
        ({"query": 7}, "query"),
        ({"query": None}, None),
        ({"query": "x" * 8193}, "query"),
        ({"queries": []}, "queries"),
        ({"queries": ["x"] * 17}, "queries"),
        ({"queries": ["x", "", "y"]}, "queries.1"),
        ({"query": "x", "k": 0}, "k"),
        ({"query": "x", "k": 51}, "k"),
        ({"query": "x", "k": "10"}, "k"),
        ({"queries": ["x"] * 16, "k": 26}, "k"),
        ({"query": "x", "k": 2.5}, "k"),
        ({"query": "x", "timeout_ms": 0}, "timeout_ms"),
        ({"query": "x", "timeout_ms": 60_001}, "timeout_ms"),
        ({"query": "x", "min_coverage": 1.1}, "min_coverage"),
        ({"query": "x", "min_coverage": float("nan")}, "min_coverage"),
        ({"query": "x", "top_k": 10}, "top_k"),
        ({"query": "x", "half \udfff": 10}, None),
    ],
    ids=repr,
)
def test_a_search_that_cannot_be_meant_is_422_and_names_the_field(served, body, param):
    error = error_of(post_json(served, body), 422)
    assert error["type"] == "invalid_request"
    assert error.get("param") == param


@pytest.mark.parametrize(
    "change, status, param",
    [
        ({"input": []}, 422, "input"),
        ({"input": ""}, 422, "input.0"),
        ({"input": ["x", "\0"]}, 422, "input.1"),
        ({"input": [[1, 2, 3]]}, 422, "input.0"),
        ({"input": [1, 2, 3]}, 422, "input.0"),
        ({"encoding_format": "hex"}, 422, "encoding_format"),
        ({"input_type": "passage"}, 422, "input_type"),
        ({"dimensions": 5}, 422, "dimensions"),
        ({"model": "other"}, 404, "model"),
        ({"model": None}, 422, "model"),
    ],
    ids=repr,
)
def test_embeddings_that_cannot_be_meant(served, change, status, param):
    request = {"input": "x", "model": "bixse", "dimensions": 384, **change}
    error = error_of(served.client.post("/v1/embeddings", json=request), status)
    assert error["param"] == param


def test_poison_fails_alone_and_the_next_request_is_fine(served):
    poison = ["", "\0", "half \udfff", "x" * 9000, "\x1b[2J", "\u202e\ufeff\u200b"]
    with ThreadPoolExecutor(8) as pool:
        good = [pool.submit(served.search, query=f"otter {n}") for n in range(4)]
        bad = [pool.submit(post_json, served, {"query": text}) for text in poison]
        assert {f.result().status_code for f in good} == {200}
        assert {f.result().status_code for f in bad} <= {200, 422, 429}
    assert served.search(query="otter").status_code == 200
    assert served.client.get("/readyz").status_code == 200


def test_a_large_body_is_413(served):
    big = b'{"query": "' + b"x" * 70_000 + b'"}'
    headers = {"Content-Type": "application/json"}

    def stream():
        for start in range(0, len(big), 8192):
            yield big[start : start + 8192]

    for content in (big, stream()):
        reply = served.client.post("/search", content=content, headers=headers)
        assert error_of(reply, 413)["type"] == "too_large"


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes_may_ask_for_no_body(served, path):
    reply = served.client.head(path)
    assert (reply.status_code, reply.content) == (200, b"")


def test_unknown_routes_and_methods(served):
    assert error_of(served.client.get("/nowhere"), 404)["type"] == "not_found"
    assert error_of(served.client.get("/docs"), 404)["type"] == "not_found"
    assert error_of(served.client.get("/search"), 405)["type"] == "method_not_allowed"


ROUTES = [
    ("GET", "/", True, True),
    ("GET", "/livez", True, True),
    ("GET", "/readyz", True, True),
    ("GET", "/metrics", False, True),
    ("GET", "/openapi.json", False, False),
    ("GET", "/nowhere", False, False),
    ("POST", "/search", False, False),
    ("POST", "/v1/embeddings", False, False),
    ("POST", "/retrieve", False, False),
    ("POST", "/admin/generation", False, False),
    ("GET", "/admin/generation", False, False),
    ("GET", "/admin/nowhere", False, False),
]


@pytest.mark.parametrize("method, path, anyone, monitor", ROUTES)
def test_keys_and_routes(served, method, path, anyone, monitor):
    def ask(key: str | None) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.request(method, served.url + path, headers=headers, timeout=30)

    for stranger in (None, "wrong-key-0123456789", served.search_key[:-1]):
        reply = ask(stranger)
        if anyone:
            assert reply.status_code == 200
        else:
            assert error_of(reply, 401)["type"] == "unauthorized"
            assert reply.headers["www-authenticate"] == "Bearer"
    reply = ask(served.monitor_key)
    if monitor:
        assert reply.status_code == 200
    else:
        assert error_of(reply, 403)["type"] == "forbidden"
    if path.startswith("/admin"):
        assert error_of(ask(served.search_key), 403)["type"] == "forbidden"
    else:
        assert ask(served.search_key).status_code in (200, 404, 422)
    assert ask(served.admin_key).status_code in (200, 404, 422)


def test_no_key_and_no_query_stands_in_the_log(served):
    secret = "a query that nobody may read in a log"
    assert served.search(query=secret).status_code == 200
    text = served.log.read_text()
    for hidden in (served.search_key, served.monitor_key, secret):
        assert hidden not in text
