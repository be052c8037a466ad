"""The second stage: against the reranker in this process, and when it fails or is late."""

import asyncio
import shutil
import signal
import threading
import time
from typing import Any, cast

import httpx
import numpy as np
import pytest

from bixse.models.encoder import resolve
from bixse.models.reranker import Reranker, reranked, trained_directory
from bixse.models.settings import PACKAGED
from bixse.records import Document, Hit, document_text
from serve.client import Client
from serve.errors import ApiError
from serve.fanout import Answer, Coverage, Missing, head, reordered
from serve.generation import Generation, Generations
from serve.ledger import Ledger
from serve.limits import Limits
from serve.messages import Found, NotHeld, RefusedText, ScoredPairs
from serve.metrics import Metrics
from serve.request_log import line_of
from serve.reranker import RerankerStore, score_now
from serve.reranking import Reranking
from serve.schema import SearchRequest
from serve.settings import ServeArgs, ServedIndex, ServedReranker
from tests.encoders import WORDS, save_tiny_chat_reranker

QUESTIONS = ["where does the raven feed at dusk", "observation 3 of the naturalists"]
SEEN = Coverage(1.0, 2, 2, ())


@pytest.fixture(scope="module")
def model(reranker) -> Reranker:
    return Reranker.load(str(reranker), "cpu")


def hits_and_documents(*doc_ids: str) -> Found:
    hits = [Hit(doc_id, 0.9 - 0.1 * n, n + 1) for n, doc_id in enumerate(doc_ids)]
    return Found(hits, [Document(doc_id, "", f"text of {doc_id}") for doc_id in doc_ids])


def test_the_known_order_and_ties_by_doc_id():
    found = reordered(hits_and_documents("d", "c", "b", "a"), [1.0, -2.0, 3.0, 1.0], 3)
    assert found.hits == [Hit("b", 3.0, 1), Hit("a", 1.0, 2), Hit("d", 1.0, 3)]
    assert [d.doc_id for d in found.documents] == ["b", "a", "d"]
    assert [h.doc_id for h in found.first_stage] == ["d", "c", "b", "a"]
    assert [h.doc_id for h in head(hits_and_documents("d", "c", "b"), 2).hits] == ["d", "c"]


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_hits_are_in_the_rerankers_order(served, model, mode):
    texts = {d.doc_id: document_text(d.title, d.text) for d in served.corpus}
    before = served.search(queries=QUESTIONS, k=30, mode=mode).json()["results"]
    reply = served.search(queries=QUESTIONS, k=10, mode=mode, rerank=30).json()
    assert reply["reranker"] == model.fingerprint
    assert reply["timing_ms"]["rerank"] > 0
    for query, was, hits in zip(QUESTIONS, before, reply["results"], strict=True):
        scores = model.score(query, [texts[h["doc_id"]] for h in was]).tolist()
        first = [Hit(h["doc_id"], h["score"], h["rank"]) for h in was]
        expected = reranked(first, scores)[:10]
        assert [h["doc_id"] for h in hits] == [e.doc_id for e in expected]
        assert [h["score"] for h in hits] == pytest.approx([e.score for e in expected], abs=1e-4)
        assert [h["rank"] for h in hits] == list(range(1, 11))
        stood = {h["doc_id"]: h for h in was}
        for hit in hits:
            mine = stood[hit["doc_id"]]
            assert hit["first_stage"]["rank"] == mine["rank"]
            assert hit["first_stage"]["score"] == pytest.approx(mine["score"], abs=1e-5)
            assert hit["text"] == mine["text"]
            assert hit.get("dense", {}).get("rank") == mine.get("dense", {}).get("rank")
        assert [h["doc_id"] for h in hits] != [h["doc_id"] for h in was[:10]]
    bare = served.search(query=QUESTIONS[0], k=5, mode=mode, rerank=30, include_text=False).json()
    assert "text" not in bare["hits"][0]
    assert [h["doc_id"] for h in bare["hits"]] == [h["doc_id"] for h in reply["results"][0][:5]]
    nothing = served.search(query="zzz", mode="lexical", rerank=10).json()
    assert (nothing["hits"], nothing["reranker"]) == ([], model.fingerprint)


@pytest.mark.parametrize(
    "body",
    [{"rerank": 9}, {"rerank": 51}, {"rerank": 0}, {"rerank": "many"}, {"k": 5, "rerank": 4}],
    ids=str,
)
def test_what_cannot_be_meant_is_422(served, body):
    reply = served.search(query="otter", **body)
    assert reply.status_code == 422, reply.text
    assert reply.json()["error"]["param"] == "rerank"


def test_without_a_reranker_the_answer_says_what_to_start():
    limits = Limits(ServeArgs(index="a", encoder="b", max_rerank=100))
    with pytest.raises(ApiError, match="start it with --reranker") as caught:
        limits.check_rerank(50, 10, 1, None)
    assert (caught.value.status, caught.value.param) == (422, "rerank")
    limits.check_rerank(50, 10, 2, ServedReranker("a", "f"))
    with pytest.raises(ApiError, match="at most 33 for 3 queries"):
        limits.check_rerank(50, 10, 3, ServedReranker("a", "f"))


def test_a_chat_template_counts_in_what_is_multiplied_at_a_time(tmp_path, monkeypatch):
    """Its tokens are read with every pair: batches of short pairs held thrice what was allowed."""
    reranker = Reranker.load(str(save_tiny_chat_reranker(tmp_path)), "cpu")
    pairs = [(WORDS[0], " ".join(WORDS[n : n + 2 + n % 3])) for n in range(40)]
    assert reranker.lengths(pairs).tolist() == [11 + 3 + n % 3 for n in range(40)]
    multiplied = []
    preprocess = reranker.model.preprocess

    def counting(*args, **kwargs):
        features = preprocess(*args, **kwargs)
        multiplied.append(features["input_ids"].numel())
        return features

    expected = reranker.logits(pairs)
    lengths = reranker.lengths(pairs)
    monkeypatch.setattr(reranker.model, "preprocess", counting)
    monkeypatch.setattr(reranker, "lengths", lambda _: lengths)
    scored = score_now(reranker, pairs, 100, time.monotonic() + 60)
    assert max(multiplied) <= 100
    np.testing.assert_allclose(scored.scores, expected, atol=1e-5)


@pytest.mark.slow
def test_a_late_reranker_leaves_the_first_stage_and_the_answer_says_so(served, wait_until):
    before = served.search(query=QUESTIONS[0], k=5, include_text=False).json()["hits"]
    replica = served.replica("RerankServer")
    replica.send_signal(signal.SIGSTOP)
    try:
        ask = {"query": QUESTIONS[0], "k": 5, "rerank": 20, "timeout_ms": 1500}
        reply = served.search(**ask, include_text=False).json()
        assert [h["doc_id"] for h in reply["hits"]] == [h["doc_id"] for h in before]
        assert "first_stage" not in reply["hits"][0]
        assert "reranker" not in reply
        assert reply["coverage"]["degraded"] == [{"shard": "reranker", "reason": "late"}]
        assert reply["coverage"]["fraction"] == 1.0
        refused = served.search(**ask, allow_partial=False)
        assert refused.status_code == 504
        assert "the reranker did not answer" in refused.json()["error"]["message"]
        with Client(served.url, served.search_key) as client:
            results = client.search(QUESTIONS[0], k=5, rerank=20, timeout_ms=1000)
        assert (results.reranker, results.degraded) == (None, (("reranker", "late"),))
        assert served.search(query="otter").status_code == 200, "others never wait for it"
        time.sleep(1.1)  # an earlier answer of the canary holds for a second
        ready = served.client.get("/readyz")
        assert ready.status_code == 503
        assert "reranker" in ready.json()["error"]["message"]
    finally:
        replica.send_signal(signal.SIGCONT)
    whole = {**ask, "timeout_ms": 20_000, "allow_partial": False}
    wait_until(lambda: served.search(**whole).status_code == 200, 30)
    replica.kill()
    gone = served.search(**ask, allow_partial=False)
    assert gone.status_code in (503, 504)
    wait_until(lambda: served.search(**whole).status_code == 200, 120)
    wait_until(lambda: served.client.get("/readyz").status_code == 200, 30)


def test_the_client_reads_where_a_hit_stood(served, model):
    with Client(served.url, served.search_key) as client:
        results = client.search(QUESTIONS[0], k=3, rerank=20)
    assert results.reranker == model.fingerprint
    assert results.degraded == ()
    assert 1 <= results.hits[0].first_stage.rank <= 20


def test_a_pair_that_cannot_be_scored_fails_alone_whatever_the_company(reranker, model):
    pairs = [(q, d) for q in QUESTIONS for d in ("the raven", "a lynx " * 40, "moths", "x")]
    alone = [float(model.logits([pair])[0]) for pair in pairs]
    pairs[2:2], alone[2:2] = [("half \ud800", "a moth")], [0.0]
    for budget in (1, 64, 10_000):
        scored = score_now(model, pairs, budget, time.monotonic() + 60)
        assert set(scored.refused) == {2}
        assert scored.scores.tolist() == pytest.approx(alone, abs=1e-4)
    with pytest.raises(TimeoutError):
        score_now(model, pairs[:2], 64, time.monotonic() - 1)


def test_a_store_holds_the_rerankers_it_was_told(reranker, model, other_reranker, index):
    def generation(number: int, start: str, fingerprint: str | None = None) -> Generation:
        second = ServedReranker.read(start)
        if fingerprint is not None:
            second = ServedReranker(start, fingerprint)
        return Generation(number, ServedIndex.read(index.url), PACKAGED, second)

    async def run() -> None:
        store, pairs = RerankerStore(1, 1024), [("x", "the raven")]
        store.load(generation(1, str(reranker)))
        store.load(generation(2, other_reranker))
        for number, start in ((1, str(reranker)), (2, other_reranker)):
            alone = Reranker.load(start, "cpu").score("x", ["the raven"]).tolist()
            assert list(await store.score(number, pairs, 60)) == pytest.approx(alone, abs=1e-5)
        with pytest.raises(TimeoutError):
            await store.score(1, pairs, -1.0)
        await store.check_health()
        store.drop(1)
        with pytest.raises(NotHeld, match="generation 1"):
            await store.score(1, pairs, 60)
        with pytest.raises(ValueError, match=f"expected reranker {'f' * 32}"):
            store.load(generation(3, str(reranker), "f" * 32))

    asyncio.run(run())


def test_a_store_rounds_the_rerankers_it_holds_where_it_is_told(reranker, model, index):
    second = ServedReranker.read(str(reranker))
    generation = Generation(1, ServedIndex.read(index.url), PACKAGED, second)
    store, pairs = RerankerStore(1, 1024, "bfloat16"), [("x", "the raven"), ("x", "a lynx")]
    store.load(generation)
    found, exact = np.array(asyncio.run(store.score(1, pairs, 60)).scores), model.logits(pairs)
    assert not np.array_equal(found, exact)
    np.testing.assert_allclose(found, exact, atol=0.05 * np.abs(exact).max())


def test_a_head_is_never_drawn_to_score_with(tmp_path, reranker):
    with pytest.raises(ValueError, match="no trained reranker"):
        trained_directory(str(resolve(PACKAGED)))
    copy = tmp_path / "copy"
    shutil.copytree(reranker, copy)
    assert trained_directory(str(copy)) == copy
    (copy / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(ValueError, match="found BertModel"):
        trained_directory(str(copy))


class Handle:
    """Answers as a deployment handle does: with `scored`, or, where that is None, not at all."""

    def __init__(self, scored: ScoredPairs | None) -> None:
        self.score, self.scored = self, scored

    def remote(
        self, number: int, pairs: list[tuple[str, str]], budget_s: float
    ) -> "asyncio.Future":
        assert number == 7
        answer = asyncio.get_running_loop().create_future()
        if self.scored is not None:
            answer.set_result(self.scored)
        return answer


def rerank(scored: ScoredPairs | None, within_s: float = 5.0, **flags: int) -> Answer:
    async def run() -> Answer:
        args = ServeArgs(index="a", encoder="b", **flags)
        second = ServedReranker("a", "f")
        generation = Generation(7, cast("ServedIndex", None), "b", second)
        handle: Any = Handle(scored)
        reranking = Reranking(generation, handle, args, Metrics())
        answer = Answer([hits_and_documents("a", "b"), hits_and_documents("c")], SEEN, {})
        deadline = asyncio.get_running_loop().time() + within_s
        others = [
            asyncio.ensure_future(reranking.rerank(["x", "y"], answer, 1, deadline))
            for _ in range(3 if flags else 0)
        ]
        await asyncio.sleep(0.05)
        last = await reranking.rerank(["x", "y"], answer, 1, deadline)
        await asyncio.gather(*others)
        return last

    return asyncio.run(run())


def test_a_query_that_cannot_be_read_is_refused_and_a_document_is_a_failure():
    def scored(*refused: int) -> ScoredPairs:
        scores = np.array([1.0, 2.0, 3.0], np.float32)
        return ScoredPairs(scores, dict.fromkeys(refused, "unreadable"))

    whole = rerank(scored())
    assert (whole.results[0].hits, whole.reranker) == ([Hit("b", 2.0, 1)], "f")
    with pytest.raises(RefusedText, match="unreadable") as caught:
        rerank(scored(2))
    assert caught.value.position == 1
    document = rerank(scored(0))
    assert document.coverage.degraded == (Missing("reranker", "failed"),)
    assert [found.hits[0].doc_id for found in document.results] == ["a", "c"]


def test_a_full_queue_sheds():
    answer = rerank(None, 0.5, rerank_batch_size=1, rerank_waiting=2)
    assert answer.coverage.degraded == (Missing("reranker", "shed"),)
    assert answer.reranker is None
    assert [found.hits[0].doc_id for found in answer.results] == ["a", "c"]


def test_the_request_log_names_the_reranker(index):
    served = Generation(1, ServedIndex.read(index.url), PACKAGED)
    answer = Answer([hits_and_documents("a")], SEEN, {}, reranker="f" * 32)
    request = SearchRequest(query="x", k=1)
    assert line_of("r", ["x"], request, answer, served, "p", [None])["reranker"] == "f" * 32


def test_the_openapi_document_says_what_happens_without_scores(served):
    schemas = served.client.get("/openapi.json").json()["components"]["schemas"]
    assert "allow_partial" in schemas["SearchRequest"]["properties"]["rerank"]["description"]


# ---- another reranker in a running application


@pytest.fixture(scope="module", params=["replicate", "shard"])
def turning(request, tmp_path_factory, run_app, index, corpus, reranker):
    flags = {"reranker": reranker, "topology": request.param}
    if request.param == "replicate":
        flags["replicas"] = 2
    with run_app(tmp_path_factory.mktemp("turning"), index, corpus, **flags) as served:
        yield served


def order_of(served, reranker: Reranker) -> list[str]:
    """What a reranker makes of the first 20 hits, in this process."""
    texts = {d.doc_id: document_text(d.title, d.text) for d in served.corpus}
    was = served.search(query=QUESTIONS[0], k=20).json()["hits"]
    scores = reranker.score(QUESTIONS[0], [texts[h["doc_id"]] for h in was]).tolist()
    first = [Hit(h["doc_id"], h["score"], h["rank"]) for h in was]
    return [hit.doc_id for hit in reranked(first, scores)[:5]]


@pytest.mark.slow
def test_another_reranker_needs_no_restart(
    turning, model, other_reranker, reranker, index, tmp_path
):
    """Every answer under load is of exactly one reranker, and of the new one once it is served."""
    other = Reranker.load(other_reranker, "cpu")
    known = {one.fingerprint: order_of(turning, one) for one in (model, other)}
    assert len(set(map(tuple, known.values()))) == 2
    ask = {"query": QUESTIONS[0], "k": 5, "rerank": 20, "allow_partial": False}
    failed: list[str] = []
    stop = threading.Event()

    def answer(client: httpx.Client) -> str:
        """The fingerprint of the reranker that has answered."""
        reply = client.post("/search", json=ask, timeout=60)
        found = reply.json()
        order = [hit["doc_id"] for hit in found.get("hits", [])]
        if reply.status_code != 200 or order != known.get(found["reranker"]):
            failed.append(reply.text)
        return str(found.get("reranker"))

    def load() -> None:
        with httpx.Client(base_url=turning.url, headers=turning.client.headers) as client:
            while not stop.is_set():
                answer(client)

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert answer(turning.client) == model.fingerprint
        for change, one in (
            ({"reranker": other_reranker}, other),
            ({"index": index.url, "reranker": str(reranker)}, model),
            ({"index": index.url}, model),
            ({"reranker": other_reranker}, other),
            ({"rollback": True}, model),
        ):
            reply = turning.change(**change)
            assert reply.status_code == 200, reply.text
            assert reply.json()["current"]["reranker"] == one.fingerprint
            assert answer(turning.client) == one.fingerprint
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failed == []
    for change, sentence in (
        ({"reranker": str(resolve(PACKAGED))}, "no trained reranker"),
        ({"reranker": str(tmp_path / "absent")}, "no reranker"),
        ({"reranker": other_reranker, "index": str(tmp_path / "absent")}, "no finished artefact"),
    ):
        reply = turning.change(**change)
        assert reply.status_code == 422, reply.text
        assert sentence in reply.json()["error"]["message"]
    for change in ({"encoder": PACKAGED}, {"rollback": True, "reranker": other_reranker}):
        assert turning.change(**change).status_code == 422
    assert answer(turning.client) == model.fingerprint


def test_a_new_reranker_is_for_an_application_that_has_one(index):
    async def run() -> None:
        ledger = Ledger(Generations.first(ServedIndex.read(index.url), PACKAGED), ("front",))
        outcome = await ledger.prepare(None, None, "a", 1.0)
        assert outcome.problem == "this application was started without --reranker"
        assert outcome.generations.candidate is None

    asyncio.run(run())
