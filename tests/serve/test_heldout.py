"""The gate of a generation that has a reranker: in this process, with all parts but Ray's own."""

import asyncio
from typing import Any

import numpy as np
import pytest

from bixse.artifacts import ArtifactError
from bixse.models.reranker import Reranker, reranked
from bixse.models.settings import PACKAGED
from bixse.records import document_text
from serve.backend import Local
from serve.fanout import RERANKER
from serve.gateway import FRONT, Front
from serve.generation import Generation, Generations, HeldOut
from serve.heldout import heldout_ndcg, read_judged
from serve.ledger import Follower, Ledger, Outcome
from serve.messages import ScoredPairs
from serve.metrics import Metrics
from serve.reranker import RerankerStore
from serve.settings import ServeArgs, ServedIndex, ServedReranker


class Handle:
    """What Ray makes of a deployment: `handle.method.remote(...)` can be awaited and cancelled."""

    def __init__(self, deployment: Any, method: str = "") -> None:
        self._deployment, self._method = deployment, method

    def __getattr__(self, method: str) -> "Handle":
        return Handle(self._deployment, method)

    def remote(self, *ask: Any) -> "asyncio.Future[Any]":
        return asyncio.ensure_future(getattr(self._deployment, self._method)(*ask))


async def application(
    args: ServeArgs, index: ServedIndex, start: str | None, kind: type = RerankerStore
) -> Front:
    """What serves `index` with the reranker at `start`: the front, a ledger and its followers."""
    second = None if start is None else ServedReranker.read(start)
    slots = (FRONT,) if start is None else (FRONT, RERANKER)
    ledger: Any = Handle(Ledger(Generations.first(index, PACKAGED, second), slots))
    reranker: Any = None
    if start is not None:
        reranker = Handle(store := kind(1, 1024))

        async def load(generation: Generation) -> None:
            await asyncio.to_thread(store.load, generation)

        await Follower(ledger, RERANKER, load, store.drop).start()
    front = Front(args, ledger, Local(args), Metrics(), reranker)
    follower = Follower(
        ledger, FRONT, front.load, front.drop, turn=front.turn, changing=front.changing
    )
    await follower.start()
    return front


@pytest.fixture(scope="module")
def gate(tmp_path_factory, make_heldout, reranker, corpus, vectors, exact) -> dict[str, Any]:
    """A question's answer is what the reranker puts first of the 20 documents that are found."""
    model, texts = Reranker.load(str(reranker), "cpu"), {}
    read = {d.doc_id: document_text(d.title, d.text) for d in corpus}
    rows = range(0, len(corpus), 8)
    for row, hits in zip(rows, exact(vectors[rows], 20), strict=True):
        query = read[corpus[row].doc_id]
        scores = model.score(query, [read[hit.doc_id] for hit in hits])
        texts.setdefault(reranked(hits, scores.tolist())[0].doc_id, query)
    flags = make_heldout(tmp_path_factory.mktemp("heldout"), texts)
    return {name.replace("-", "_"): str(url) for name, url in flags.items()}


@pytest.mark.timeout(120)
@pytest.mark.slow
def test_what_a_reranker_ruins_is_refused(index, gate, reranker, other_reranker):
    """The other reranker has the reverse order; what the search finds is the same every time."""
    args = ServeArgs(index=index.url, encoder=PACKAGED, gate_rerank=20, max_queries=8, **gate)

    async def changed(start: str | None, *change: str | None) -> tuple[Outcome, HeldOut]:
        front = await application(args, ServedIndex.read(index.url), start)
        outcome = await front.change(*change)
        with front.pinned() as lane:
            queries, judgments = gate.values()
            return outcome, await heldout_ndcg(lane, queries, judgments, 8, 20)

    bad, good = other_reranker, str(reranker)
    outcome, served = asyncio.run(changed(good, None, None, bad))
    assert "nDCG@10 of reranked hits would fall from 1.0000 to 0.0" in outcome.problem
    assert outcome.generations.current.number == 1
    assert served.reranked == 1.0
    assert served.found < 0.9
    outcome, better = asyncio.run(changed(bad, None, None, good))
    assert (outcome.problem, outcome.generations.current.number) == (None, 2)
    assert better == served
    outcome, without = asyncio.run(changed(None, index.url, None, None))
    assert (outcome.problem, outcome.generations.current.number) == (None, 2)
    assert (without.found, without.reranked) == (pytest.approx(served.found, abs=0.01), None)


@pytest.mark.timeout(60)
def test_a_reranker_without_scores_is_no_measurement(index, gate, reranker):
    args = ServeArgs(index=index.url, encoder=PACKAGED, gate_rerank=20, **gate)

    class Mute(RerankerStore):
        """Reads the canary, whose query stands beside itself, and no other document."""

        async def score(self, number: int, pairs: Any, budget_s: float) -> ScoredPairs:
            unread = {n: "unreadable" for n, (query, text) in enumerate(pairs) if query != text}
            return ScoredPairs(np.zeros(len(pairs), np.float32), unread)

    async def run(store: type[RerankerStore]) -> Outcome:
        front = await application(args, ServedIndex.read(index.url), str(reranker), store)
        outcome = await front.change(index.url, None, None)
        # Its followers hear of that now, and Python 3.11 loses a cancellation that comes meanwhile.
        await asyncio.sleep(0.1)
        return outcome

    outcome = asyncio.run(run(Mute))
    assert outcome.generations.current.number == 1
    assert "the reranker gave no scores for query 0" in outcome.problem


def test_what_is_no_judgments_is_refused(gate):
    """It was a bug of ours to whoever had asked for the change."""
    queries = gate["gate_queries"]
    with pytest.raises(ArtifactError, match=r"^expected judgments or qrels at .*, found queries$"):
        read_judged(queries, queries)


@pytest.mark.parametrize("flag", ["gate_queries", "gate_judgments"])
def test_half_a_gate_is_refused(flag):
    """It was none, and nobody was told."""
    with pytest.raises(ValueError, match="give both --gate-queries and --gate-judgments"):
        ServeArgs.model_validate({"index": "i", "encoder": "e", flag: "there"})
