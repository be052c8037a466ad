"""The running application searched by words and by both: equal to the whole corpus in one piece."""

import signal
from typing import Any

import pytest

from bixse.records import document_text
from bixse.retrieval.fusion import FUSION_DEPTH, fuse_ranks, fuse_scores
from bixse.retrieval.lexical import LexicalIndex
from bixse.retrieval.settings import Lexical
from serve.client import Client

QUESTIONS = ["where does the raven feed at dusk", "observation 3 of the naturalists", "zzz", "?!"]


@pytest.fixture(scope="module")
def by_words(corpus):
    texts = [document_text(d.title, d.text) for d in corpus]
    return LexicalIndex([d.doc_id for d in corpus], texts, Lexical())


def same(hits: list[dict], expected: list, **close: Any) -> None:
    assert [h["rank"] for h in hits] == list(range(1, len(expected) + 1))
    assert [h["score"] for h in hits] == pytest.approx([e.score for e in expected], **close)
    assert [h["doc_id"] for h in hits] == [e.doc_id for e in expected]


def test_by_words_equals_bm25_of_the_whole_corpus(served, by_words):
    reply = served.search(queries=QUESTIONS, k=25, mode="lexical").json()
    for query, hits in zip(QUESTIONS, reply["results"], strict=True):
        same(hits, by_words.search(query, 25), rel=1e-6)
    assert reply["results"][2:] == [[], []], "words that no document holds"
    texts = {d.doc_id: d.text for d in served.corpus}
    assert all(hit["text"] == texts[hit["doc_id"]] for hit in reply["results"][0])
    assert reply["timing_ms"]["encode"] < reply["timing_ms"]["total"]


@pytest.mark.parametrize("fusion", [{}, {"fusion": "weighted", "dense_weight": 0.25}], ids=str)
def test_hybrid_equals_the_fusion_of_whole_rankings(served, by_words, exact, encoder, fusion):
    reply = served.search(queries=QUESTIONS, k=25, mode="hybrid", **fusion).json()
    vectors = encoder.encode(QUESTIONS, "query")
    for query, dense, hits in zip(
        QUESTIONS, exact(vectors, FUSION_DEPTH), reply["results"], strict=True
    ):
        lexical = by_words.search(query, FUSION_DEPTH)
        if fusion:
            expected = fuse_scores(dense, lexical, 0.25, 25)
        else:
            expected = fuse_ranks([dense, lexical], 25)
        same(hits, expected, abs=1e-5)
        ranks = {hit.doc_id: hit.rank for hit in lexical}
        cosines = {hit.doc_id: hit.score for hit in dense}
        for hit in hits:
            assert hit.get("lexical", {}).get("rank") == ranks.get(hit["doc_id"])
            if "dense" in hit:
                assert hit["dense"]["score"] == pytest.approx(cosines[hit["doc_id"]], abs=1e-5)
    assert reply["coverage"]["fraction"] == 1.0


def test_the_client_reads_both_sides(served):
    with Client(served.url, served.search_key) as client:
        hit = client.search("the raven", k=1, mode="hybrid").hits[0]
        assert hit.dense is not None
        assert hit.lexical is not None
        assert hit.score == pytest.approx(1 / (60 + hit.dense.rank) + 1 / (60 + hit.lexical.rank))
        assert client.search("the raven", mode="lexical").hits[0].dense is None


@pytest.mark.parametrize(
    "body, param",
    [
        ({"mode": "sparse"}, "mode"),
        ({"mode": "hybrid", "fusion": "borda"}, "fusion"),
        ({"mode": "hybrid", "fusion": "weighted", "dense_weight": 1.5}, "dense_weight"),
        ({"mode": "hybrid", "dense_weight": 0.5}, None),
        ({"fusion": "rrf"}, None),
        ({"mode": "lexical", "fusion": "weighted"}, None),
        ({"mode": "lexical", "k": 51}, "k"),
        ({"mode": "hybrid", "timeout_ms": 60_001}, "timeout_ms"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_422(served, body, param):
    reply = served.search(query="otter", **body)
    assert reply.status_code == 422, reply.text
    assert reply.json()["error"]["type"] == "invalid_request"
    assert reply.json()["error"].get("param") == param


def test_a_shard_without_an_answer_is_out_of_both_rankings(served, wait_until):
    shard = served.replica("shard-00001")
    shard.send_signal(signal.SIGSTOP)
    try:
        reply = served.search(query=QUESTIONS[0], mode="hybrid", k=50, timeout_ms=2000)
        assert reply.status_code == 200, reply.text
        assert reply.json()["coverage"]["degraded"] == [{"shard": "shard-00001", "reason": "late"}]
        first_half = {d.doc_id for d in served.corpus[::2]}
        assert {h["doc_id"] for h in reply.json()["hits"]} <= first_half
        whole = served.search(query="x", mode="lexical", allow_partial=False, timeout_ms=1500)
        assert whole.status_code == 503
        assert whole.json()["error"]["type"] == "partial_coverage"
        late = served.search(query="otter", mode="hybrid", timeout_ms=1)
        assert late.status_code == 504
    finally:
        shard.send_signal(signal.SIGCONT)
    wait_until(lambda: served.search(query="x", allow_partial=False).status_code == 200, 30)


def test_the_openapi_document_says_what_a_score_is(served):
    schemas = served.client.get("/openapi.json").json()["components"]["schemas"]
    assert "cosine" in schemas["HitReply"]["properties"]["score"]["description"]
    assert schemas["SearchRequest"]["properties"]["mode"]["enum"] == ["dense", "lexical", "hybrid"]
