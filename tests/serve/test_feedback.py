"""Feedback over shards: equal to feedback over the whole corpus in one piece."""

import signal

import numpy as np
import pytest

from bixse.retrieval.feedback import rocchio
from serve.client import Client

QUESTIONS = ["where does the raven feed at dusk", "observation 3 of the naturalists", "x"]


@pytest.mark.parametrize("documents, weight", [(3, 0.5), (1, 0.0), (7, 1.0)])
def test_sharded_equals_whole(served, encoder, exact, vectors, documents, weight):
    reply = served.search(
        queries=QUESTIONS, k=25, feedback={"documents": documents, "weight": weight}
    ).json()
    rows = {d.doc_id: row for row, d in enumerate(served.corpus)}
    queries = encoder.encode(QUESTIONS, "query")
    moved = [
        rocchio(query, vectors[[rows[hit.doc_id] for hit in hits]], weight)
        for query, hits in zip(queries, exact(queries, documents), strict=True)
    ]
    plain = served.search(queries=QUESTIONS, k=25).json()["results"]
    for wanted, hits, was in zip(exact(np.array(moved), 25), reply["results"], plain, strict=True):
        assert [h["doc_id"] for h in hits] == [w.doc_id for w in wanted]
        assert [h["score"] for h in hits] == pytest.approx([w.score for w in wanted], abs=1e-5)
        assert hits[0]["text"]
        if weight:
            assert hits[0]["score"] > was[0]["score"]
    assert reply["coverage"]["fraction"] == 1.0


def test_a_shard_without_an_answer_gives_no_feedback_either(served, wait_until, encoder, vectors):
    shard = served.replica("shard-00001")
    shard.send_signal(signal.SIGSTOP)
    try:
        reply = served.search(query=QUESTIONS[0], k=5, feedback={}, timeout_ms=3000)
        assert reply.status_code == 200, reply.text
        assert reply.json()["coverage"]["degraded"] == [{"shard": "shard-00001", "reason": "late"}]
    finally:
        shard.send_signal(signal.SIGCONT)
    rows, query = np.arange(0, len(vectors), 2), encoder.encode(QUESTIONS[:1], "query")[0]
    head = rows[np.argsort(-vectors[rows] @ query)[:3]]
    best = rows[np.argsort(-vectors[rows] @ rocchio(query, vectors[head], 0.5))[:5]]
    expected = [served.corpus[row].doc_id for row in best]
    assert [hit["doc_id"] for hit in reply.json()["hits"]] == expected
    wait_until(lambda: served.search(query="x", allow_partial=False).status_code == 200, 30)


@pytest.mark.parametrize(
    "body, param",
    [
        ({"feedback": {"documents": 0}}, "feedback.documents"),
        ({"feedback": {"documents": 21}}, "feedback.documents"),
        ({"feedback": {"weight": 1.5}}, "feedback.weight"),
        ({"feedback": {"depth": 3}}, "feedback.depth"),
        ({"feedback": True}, "feedback"),
        ({"feedback": {}, "mode": "hybrid"}, None),
        ({"feedback": {}, "mode": "lexical"}, None),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_422(served, body, param):
    reply = served.search(query="otter", **body)
    assert reply.status_code == 422, reply.text
    assert reply.json()["error"].get("param") == param


def test_it_goes_through_the_client_and_before_a_reranker(served):
    with Client(served.url, served.search_key) as client:
        moved = client.search("the raven", k=30, feedback={"documents": 5}).hits
        both = client.search("the raven", k=30, feedback={"documents": 5}, rerank=30).hits
    assert {h.doc_id for h in moved} == {h.doc_id for h in both}
    stood = {h.doc_id: h.first_stage.rank for h in both}
    assert [stood[h.doc_id] for h in moved] == list(range(1, 31))


def test_only_what_a_filter_keeps_gives_feedback(served, encoder, vectors):
    otters = [row for row, d in enumerate(served.corpus) if d.doc_id.startswith("otter")]
    ask = {"query": QUESTIONS[0], "k": 5, "filter": {"animal": "otter"}}
    reply = served.search(**ask, feedback={}).json()
    rows, query = np.array(otters), encoder.encode(QUESTIONS[:1], "query")[0]
    head = rows[np.argsort(-vectors[rows] @ query)[:3]]
    best = rows[np.argsort(-vectors[rows] @ rocchio(query, vectors[head], 0.5))[:5]]
    assert [h["doc_id"] for h in reply["hits"]] == [served.corpus[row].doc_id for row in best]
    reranked = served.search(**ask, feedback={}, rerank=20).json()
    assert {h["doc_id"] for h in reranked["hits"]} <= {served.corpus[row].doc_id for row in otters}
    assert reranked["hits"][0]["first_stage"]["rank"] <= 20
