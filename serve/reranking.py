"""The second stage: what was found, in the order of a reranker; or as it was found, and said so."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from bixse.records import document_text
from serve.backend import CALLS_A_REPLICA, ask, within
from serve.batcher import Batcher
from serve.fanout import RERANKER, Answer, Missing, head, reordered
from serve.generation import Generation
from serve.lane import CANARY_WITHIN_S, MERGE_RESERVE_S
from serve.messages import Found, Refused, RefusedText
from serve.metrics import Metrics
from serve.settings import ServeArgs

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

Pair = tuple[str, str]
"""The text of a query, and what was found for it as the reranker was trained to read it."""


class Reranking:
    """Batches pairs of concurrent requests for the replicas that hold a generation's reranker.
    Belongs to one event loop.
    """

    def __init__(
        self,
        generation: Generation,
        handle: "DeploymentHandle[Any]",
        args: ServeArgs,
        metrics: Metrics,
    ) -> None:
        assert generation.reranker is not None
        self._fingerprint = generation.reranker.fingerprint
        self._number = generation.number
        self._handle = handle
        self._metrics = metrics
        self._most_waiting = args.rerank_waiting
        self.queue = Batcher[Pair, float | Refused](
            self._call,
            size=args.rerank_batch_size,
            wait_s=args.batch_wait_ms / 1e3,
            concurrency=CALLS_A_REPLICA * args.reranker_replicas,
            observe_size=metrics.batch_size.labels("rerank").observe,
        )

    async def rerank(
        self, queries: Sequence[str], answer: Answer, k: int, deadline: float
    ) -> Answer:
        """The best `k` of each ranking by the reranker, which reads all of its documents.

        Without its scores the best `k` as they were found, and `coverage.degraded` names it. Raises
        RefusedText as `in_order`.
        """
        start = time.perf_counter()
        pairs = [
            (query, document_text(document.title, document.text))
            for query, found in zip(queries, answer.results, strict=True)
            for document in found.documents or ()
        ]
        scored = await self._scores(pairs, deadline - MERGE_RESERVE_S)
        rankings = scored if isinstance(scored, Missing) else in_order(answer.results, scored, k)
        took_ms = {"rerank": round((time.perf_counter() - start) * 1e3, 3)}
        answer = replace(answer, timing_ms={**answer.timing_ms, **took_ms})
        if not isinstance(rankings, Missing):
            return replace(answer, results=rankings, reranker=self._fingerprint)
        seen = replace(answer.coverage, degraded=(*answer.coverage.degraded, rankings))
        return replace(answer, results=[head(f, k) for f in answer.results], coverage=seen)

    async def problem(self, query: str) -> str | None:
        """Why it does not score a query beside itself, or None when it does."""
        deadline = asyncio.get_running_loop().time() + CANARY_WITHIN_S
        scored = await self._scores([(query, query)], deadline)
        if isinstance(scored, Missing):
            if scored.reason == "shed":
                # Busy, and not broken: others would only get busier.
                return None
            return f"the reranker gave no score within {CANARY_WITHIN_S:g} s: {scored.reason}"
        if isinstance(scored[0], Refused):
            return f"the reranker cannot read the canary query: {scored[0].reason}"
        return None

    async def _scores(
        self, pairs: Sequence[Pair], deadline: float
    ) -> list[float | Refused] | Missing:
        if self.queue.depth >= self._most_waiting:
            return Missing(RERANKER, "shed")
        return await ask(RERANKER, self.queue, pairs, deadline)

    async def _call(self, pairs: list[Pair], deadline: float) -> list[float | Refused]:
        def call(budget_s: float) -> Any:
            return self._handle.score.remote(self._number, pairs, budget_s)

        with self._metrics.rerank_seconds.time():
            return list(await within(call, deadline, tries=2))


def in_order(
    results: Sequence[Found], scored: Sequence[float | Refused], k: int
) -> list[Found] | Missing:
    """The best `k` of each query by the scores of all hits of all queries, in their order.

    A document that cannot be read is a failure of the reranker. Raises RefusedText for a query
    beside which none can.
    """
    left, rankings = iter(scored), []
    for position, found in enumerate(results):
        own = list(islice(left, len(found.hits)))
        scores = [score for score in own if not isinstance(score, Refused)]
        if len(scores) < len(own):
            if not scores and isinstance(own[0], Refused):
                raise RefusedText(position, own[0].reason)
            return Missing(RERANKER, "failed")
        rankings.append(reordered(found, scores, k))
    return rankings
